"""Walks the imports of the library and holds them to the table below, which docs/architecture.md explains."""

import ast
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# ----------------------------------------------------------------------------------------------- who may import whom
# Module (or package.*) -> what else of ours it may import. Every module must be found here; `beit.errors` is open to
# all of beit, `beit` itself (the re-exports) to nobody below the launchers.
EVERYBODY_MAY = ("beit.errors",)
PARTS = (
    *("beit.modeling", "beit.zoo", "beit.inference", "beit.masking", "beit.targets", "beit.tokenizers.*"),
    *("beit.registry", "beit.teachers"),
    *("beit.checkpoints.*", "beit.relative_position", "beit.storage", "beit.config", "beit.outputs", "beit.data.*"),
)
MAY_IMPORT = {
    # the ground floor: nothing else of ours
    "beit.errors": (),
    "beit.registry": (),  # names what it lists as "module:object"
    "beit.relative_position": (),
    "beit.masking": (),
    "beit.storage": (),
    "beit.config": (),
    "beit.outputs": (),
    "dall_e.*": ("dall_e.*",),
    # the engine: any module on any loader, knowing neither models nor data
    "beit.training.*": ("beit.training.*", "beit.storage", "beit.checkpoints.pieces"),
    "beit.launch": ("beit.config", "beit.registry", "beit.training.*"),
    # the parts of the method
    "beit.attention": ("beit.relative_position",),
    "beit.modeling": ("beit.relative_position", "beit.attention"),
    "beit.tokenizers.*": (
        *("beit.tokenizers.*", "dall_e.*", "beit.storage", "beit.registry", "beit.modeling", "beit.checkpoints.*"),
        "beit.data.preprocessing",
    ),
    "beit.data.*": ("beit.data.*", "beit.masking", "beit.storage"),
    "beit.targets": ("beit.tokenizers.*", "beit.data.*", "beit.teachers"),
    # checkpoints of every dialect, and the models they are of
    "beit.checkpoints.formats.*": ("beit.checkpoints.formats.*", "beit.registry"),
    "beit.checkpoints.*": (
        *("beit.checkpoints.*", "beit.storage", "beit.registry", "beit.relative_position", "beit.modeling"),
        *("beit.outputs", "beit.data.preprocessing"),
    ),
    "beit.zoo": ("beit.modeling", "beit.checkpoints.*", "beit.registry"),
    "beit.jax": ("beit.modeling", "beit.relative_position", "beit.checkpoints.*", "beit.zoo"),
    "beit.teachers": ("beit.modeling", "beit.checkpoints.*", "beit.zoo", "beit.storage"),
    "beit.inference": ("beit.modeling", "beit.checkpoints.*", "beit.zoo", "beit.data.*"),
    "beit.features": (
        *("beit.modeling", "beit.inference", "beit.data.*", "beit.training.precision", "beit.training.distributed"),
    ),
    # the jobs, their pictures, and the commands around them
    "beit.visualization.*": ("beit.visualization.*", *PARTS),
    "beit.tasks.*": ("beit.tasks.*", "beit.visualization.*", *PARTS, "beit.features", "beit.training.*"),
    "beit.commands.*": (
        *("beit.commands.*", "beit.tasks.*", "beit.launch", "beit.visualization.*", *PARTS),
        *("beit.features", "beit.training.*"),
    ),
    "beit.jobs": ("beit.commands.*", "beit.tasks.base", "beit.config", "beit.registry", "beit.training.*"),
    # segmentation stands on all of beit, which does not know it
    "semantic_segmentation.tools.*": (
        *("semantic_segmentation.config", "semantic_segmentation.task", "semantic_segmentation.testing"),
        "beit.launch",
    ),
    "semantic_segmentation.*": (
        *("semantic_segmentation.*", "beit.commands.*", "beit.tasks.*", "beit.jobs", "beit.launch"),
        *(*PARTS, "beit.visualization.*", "beit.training.*"),
    ),
    # on top: the public names, the console command, the launchers
    "beit": (*PARTS, "beit.jobs"),
    "beit.__main__": ("beit.commands", "beit.commands.dispatch", "beit"),
    "run_*": ("beit.launch", "beit.tasks.settings"),
}

PACKAGES = ("beit", "dall_e", "semantic_segmentation")

# What only some modules may import.
ONLY_IN = {
    "argparse": ("beit.config", "beit.storage"),  # storage: official checkpoints hold an argparse.Namespace
    "yaml": ("beit.config",),
    "matplotlib": ("beit.visualization.figures", "beit.visualization.plots"),  # pictures; diagrams
    "tensorboard": ("beit.training.trackers",),
    "torch.utils.tensorboard": ("beit.training.trackers",),
    **dict.fromkeys(("wandb", "trackio"), ("beit.training.trackers",)),
    "gradio": ("beit.commands.app",),
    "jax": ("beit.jax",),
    "flax": ("beit.jax",),
}

# `dall_e` stands alone, so that it could be published by itself.
DALL_E_NEEDS = {"torch", "safetensors"}

APPLICATION, NAMES_AN_APPLICATION = re.compile(r"semantic_segmentation[\w.]*:\w+"), "beit.registry"
LAUNCHER_VARIABLE = re.compile(r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|LOCAL_(WORLD_)?SIZE|(SLURM|OMPI)_\w*")
READS_LAUNCHER_VARIABLES = "beit.training.placement"
MAY_EXIT = (
    *("beit.__main__", "semantic_segmentation.__main__", "semantic_segmentation.tools.*", "run_*"),
    "beit.launch",  # for them, where threads of gloo would abort the process at its end
)
NO_SUCH_MODULE = ("utils", "helpers")  # a name that says what is in it is asked for; OpenAI's package has its utils
UTILS_OF_OTHERS = ("dall_e.utils",)


# -------------------------------------------------------------------------------------------------- reading a tree
class Module:
    """A file of the library: its dotted name, its syntax tree, the modules it imports, wherever in the file."""

    def __init__(self, name, path):
        self.name = name
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self._nodes = list(ast.walk(self.tree))
        self.package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def imports(self, known=(), at_the_top=False):
        """Yields the full names of imported modules; `from a import b` is a.b where that is one of `known`.

        A text that is the full name of a known module counts too: it is there to be given to importlib.
        """
        yield from (text for text in self.strings() if "." in text and text in known)
        for node in self.tree.body if at_the_top else self._nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                for alias in node.names:
                    yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base

    def _absolute(self, node):
        if not node.level:
            return node.module
        parents = self.package.split(".")
        parents = parents[: len(parents) - node.level + 1]
        return ".".join([*parents, *([node.module] if node.module else [])])

    def strings(self):
        return (node.value for node in self._nodes if isinstance(node, ast.Constant) and type(node.value) is str)

    def calls(self):
        return (ast.unparse(node.func) for node in self._nodes if isinstance(node, ast.Call))


def read_tree(root):
    files = [*root.glob("run_*.py"), *(path for top in PACKAGES for path in (root / top).rglob("*.py"))]
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in files}
    return {name: Module(name, path) for path, name in sorted(names.items())}


def matches(name, patterns):
    """Whether a module is named by a pattern; `package.*` names the package itself too."""
    return any(fnmatchcase(name, p) or (p.endswith(".*") and name == p.removesuffix(".*")) for p in patterns)


def is_ours(name):
    return matches(name, ("beit.*", "dall_e.*", "semantic_segmentation.*", "run_*"))


# ---------------------------------------------------------------------------------------------------- the checks
def forbidden_imports(modules):
    for module in modules.values():
        rows = [allowed for pattern, allowed in MAY_IMPORT.items() if matches(module.name, (pattern,))]
        if not rows:
            yield f"{module.name} is in no rule: give it a row in MAY_IMPORT and in docs/architecture.md"
            continue
        everybody = () if matches(module.name, ("dall_e.*", "run_*")) else EVERYBODY_MAY
        for imported in module.imports(known=modules):
            if is_ours(imported) and not matches(imported, (*rows[0], *everybody)):
                yield f"{module.name} imports {imported}, which MAY_IMPORT does not let it"


def circles(modules):
    graph = {name: {i for i in module.imports(known=modules) if i in modules} for name, module in modules.items()}
    done = set()

    def walk(name, path):
        if name in path:
            yield " -> ".join([*path[path.index(name) :], name])
        elif name not in done:
            for imported in sorted(graph[name]):
                yield from walk(imported, [*path, name])
            done.add(name)

    for name in graph:
        yield from walk(name, [])


def libraries_out_of_place(modules):
    for module in modules.values():
        for imported in module.imports():
            for library, places in ONLY_IN.items():
                if f"{imported}.".startswith(f"{library}.") and module.name not in places:
                    yield f"{module.name} imports {library}, which only {' and '.join(places)} may"
            if matches(module.name, ("dall_e.*",)) and not is_ours(imported):
                top = imported.partition(".")[0]
                if top not in DALL_E_NEEDS | sys.stdlib_module_names:
                    yield f"{module.name} imports {top}; dall_e needs only {', '.join(sorted(DALL_E_NEEDS))}"


def applications_out_of_place(modules):
    for module in modules.values():
        for text in module.strings() if matches(module.name, ("beit.*",)) else ():
            if APPLICATION.fullmatch(text) and module.name != NAMES_AN_APPLICATION:
                yield f"{module.name} names {text}; only {NAMES_AN_APPLICATION} may, for what is installed beside beit"


def launcher_variables_out_of_place(modules):
    for module in modules.values():
        for text in module.strings():
            if LAUNCHER_VARIABLE.fullmatch(text) and module.name != READS_LAUNCHER_VARIABLES:
                yield f"{module.name} knows {text}; only {READS_LAUNCHER_VARIABLES} reads the launchers' environment"


def prints_and_exits(modules):
    for module in modules.values():
        for call in module.calls():
            if call == "print":
                yield f"{module.name} prints; library code logs"
            elif call in ("sys.exit", "exit", "quit", "os._exit", "SystemExit") and not matches(module.name, MAY_EXIT):
                yield f"{module.name} calls {call}; library code raises, launchers exit"


def nameless_modules(modules):
    for name in modules:
        if name.rpartition(".")[2] in NO_SUCH_MODULE and name not in UTILS_OF_OTHERS:
            yield f"{name}: name the module after what is in it"


def undocumented(modules):
    nodes = [node for module in modules.values() for node in ast.walk(module.tree)]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    for module in modules.values():
        if module.package != module.name and not ast.get_docstring(module.tree):
            yield f"{module.name} has no docstring"
        for kind, name, node in public_definitions(module.tree):
            owner, _, method = name.rpartition(".")
            if not ast.get_docstring(node) and method not in inherited_docstrings(classes.get(owner), classes):
                yield f"{module.name}: {kind} {name} has no docstring"


def inherited_docstrings(owner, classes):
    """The methods that a class inherits with a docstring: an override says what differs, or nothing."""
    found = set()
    for base in owner.bases if owner else ():
        above = classes.get(ast.unparse(base).partition("[")[0])
        found |= {node.name for node in above.body if isinstance(node, ast.FunctionDef)} if above else set()
        found |= inherited_docstrings(above, classes)
    return found


def public_definitions(tree, prefix=""):
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            if not any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list):
                yield kind, prefix + node.name, node
            if kind == "class":
                yield from public_definitions(node, f"{node.name}.")


def changeable_configs(modules):
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Options")):
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                if any("dataclass" in d for d in decorators) and not any("frozen=True" in d for d in decorators):
                    yield f"{module.name}: {node.name} is not frozen, and a config never changes"


CHECKS = (
    forbidden_imports,
    circles,
    libraries_out_of_place,
    applications_out_of_place,
    launcher_variables_out_of_place,
    prints_and_exits,
    nameless_modules,
    undocumented,
    changeable_configs,
)


# ------------------------------------------------------------------------------------------------------ the tests
@pytest.fixture(scope="module")
def modules():
    return read_tree(ROOT)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_library_keeps_the_rules(modules, check):
    assert {"beit.modeling", "beit.launch", "run_beit_pretraining"} <= modules.keys()  # the walk finds them
    assert not list(check(modules))


DOC = '"""A module."""\n'
VIOLATIONS = {
    "upwards": (forbidden_imports, "beit/masking.py", "from beit.zoo import create_model"),
    "inside a function": (forbidden_imports, "beit/masking.py", "def _late():\n    import beit.modeling"),
    "by importlib": (forbidden_imports, "beit/masking.py", "import_module('beit.modeling')"),
    "relative": (forbidden_imports, "beit/training/loop.py", "from ..data import loaders"),
    "a submodule by name": (forbidden_imports, "beit/modeling.py", "from beit import storage"),
    "the package itself": (forbidden_imports, "beit/zoo.py", "import beit"),
    "the engine knows data": (forbidden_imports, "beit/training/loop.py", "from beit.data.loaders import EpochLoader"),
    "a second door to dall_e": (forbidden_imports, "beit/zoo.py", "import dall_e"),
    "dall_e knows beit": (forbidden_imports, "dall_e/encoder.py", "from beit.errors import InputError"),
    "segmentation from beit": (forbidden_imports, "beit/tasks/x.py", "from semantic_segmentation import modeling"),
    "a tool from segmentation": (
        forbidden_imports,
        "semantic_segmentation/tools/train.py",
        "from beit.modeling import Backbone",
    ),
    "a script": (forbidden_imports, "beit/tasks/x.py", "import run_beit_pretraining"),
    "a script from a script": (forbidden_imports, "run_other.py", "from run_beit_pretraining import main"),
    "a module in no rule": (forbidden_imports, "beit/novelty.py", ""),
    "a package in no rule": (forbidden_imports, "beit/novelties/one.py", ""),
    "a circle": (circles, "beit/training/a.py", "from beit.training import b"),
    "argparse": (libraries_out_of_place, "beit/tasks/x.py", "import argparse"),
    "yaml": (libraries_out_of_place, "beit/data/x.py", "from yaml import safe_load"),
    "matplotlib": (libraries_out_of_place, "beit/visualization/curves.py", "def f():\n    from matplotlib import cm"),
    "tensorboard": (libraries_out_of_place, "beit/tasks/x.py", "from torch.utils.tensorboard import SummaryWriter"),
    "dall_e's needs": (libraries_out_of_place, "dall_e/encoder.py", "import numpy"),
    "a launcher's variable": (launcher_variables_out_of_place, "beit/tasks/x.py", "import os\nos.environ['RANK']"),
    "another": (launcher_variables_out_of_place, "beit/data/x.py", "from os import getenv\ngetenv('SLURM_PROCID')"),
    "an application": (applications_out_of_place, "beit/tasks/x.py", "locate('semantic_segmentation.api:figures_of')"),
    "print": (prints_and_exits, "beit/tasks/x.py", "def _f():\n    print(1)"),
    "exit": (prints_and_exits, "beit/tasks/x.py", "import sys\nsys.exit(2)"),
    "raised exit": (prints_and_exits, "dall_e/x.py", "raise SystemExit(2)"),
    "utils": (nameless_modules, "beit/data/utils.py", ""),
    "no docstring": (undocumented, "beit/tasks/x.py", "def public():\n    pass"),
    "no docstring of a method": (
        undocumented,
        "beit/x.py",
        'class A:\n    """A."""\n    def public(self):\n        pass',
    ),
    "a config that changes": (
        changeable_configs,
        "beit/tasks/x.py",
        "from dataclasses import dataclass\n@dataclass\nclass XConfig:\n    a: int = 1",
    ),
}


@pytest.mark.parametrize(("check", "path", "code"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_each_rule_can_be_broken(tmp_path, check, path, code):
    lawful = {
        "beit/__init__.py": "",
        "beit/errors.py": DOC,
        "beit/storage.py": DOC + "from beit.errors import InputError",
        "beit/modeling.py": DOC,
        "beit/data/__init__.py": "",
        "beit/data/loaders.py": DOC,
        "beit/training/__init__.py": "",
        "beit/training/b.py": DOC + "from beit import storage\ndef _f():\n    from beit.training import a",
        "beit/training/a.py": DOC,
        "run_beit_pretraining.py": DOC + "import sys\nsys.exit(0)",
    }
    write_tree(tmp_path, lawful)
    assert not list(check(read_tree(tmp_path)))
    write_tree(tmp_path, {path: DOC + code})
    found = list(check(read_tree(tmp_path)))
    assert len(found) == 1
    assert path.removesuffix(".py").replace("/", ".") in found[0]


def write_tree(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


HEAVY = {"matplotlib", "tensorboard", "torch.utils.tensorboard", "skimage", "transformers", "deepspeed", "scipy"}
HEAVY |= {"gradio", "wandb", "trackio"}
LIGHT = f"""
import sys, semantic_segmentation, beit.registry, beit.zoo
from beit.commands.recipes import read_recipe
beit.zoo.list_models()
read_recipe("pretrain_base_22k")
assert not {{"torch", "numpy"}} & sys.modules.keys(), "names and recipes need neither torch nor numpy"
public = [getattr(beit, name) for name in beit.__all__]
import beit.relative_position, beit.visualization.figures, beit.visualization.plots
print(*sorted({HEAVY} & sys.modules.keys() - {{"wandb"}}))  # timm imports it where it is installed
"""


def test_the_document_has_a_row_for_every_rule():
    document = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert [pattern for pattern in MAY_IMPORT if f"`{pattern}`" not in document] == []


def test_no_module_imports_at_its_top_what_only_one_job_needs(modules):
    found = {
        (module.name, imported)
        for module in modules.values()
        for imported in module.imports(at_the_top=True)
        if any(f"{imported}.".startswith(f"{library}.") for library in HEAVY)
    }
    assert found == set()


@pytest.mark.slow
def test_importing_is_light():
    # Broken by a module-level import of what only one job needs. In one process: each one imports torch anew.
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
