import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import beit

ROOT = Path(__file__).parents[1]
LAUNCHERS = sorted(path.name for path in ROOT.glob("run_*.py"))
PACKAGES = ("beit", "dall_e", "semantic_segmentation")
NOT_SOURCE = (".*", "__pycache__", "build", "dist", "*.egg-info", "demo", "output", "tests")

V100_TORCH = "torch>=2.6,<2.15"  # as in requirements-v100.txt

pytestmark = pytest.mark.slow


def run(*command, **options):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source distribution, built from a copy of this tree, without the network."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    run("-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source")
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel):
    return Parser().parsestr(read(wheel, "*.dist-info/METADATA"))


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def read(wheel, pattern):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if Path(name).match(pattern))
        return archive.read(name).decode()


def test_the_wheel_holds_all_that_a_run_needs(wheel):
    # Broken by package data or a launcher that pyproject.toml forgets.
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    segmentation = ROOT / "semantic_segmentation"
    data = [*(ROOT / "beit" / "recipes").glob("*.yaml"), ROOT / "beit" / "py.typed"]
    data += [*segmentation.rglob("*.yaml"), *(segmentation / "tools").glob("*.sh"), segmentation / "ade20k.txt"]
    data += [ROOT / "beit" / "commands" / "report.html"]
    data += [ROOT / package / "py.typed" for package in PACKAGES]
    needed = {str(path.relative_to(ROOT)) for path in [*sources, *data]} | set(LAUNCHERS)
    assert len(data) > 3
    assert {"run_beit_pretraining.py", "run_dvae_training.py", "dall_e/encoder.py"} <= needed
    assert {f"semantic_segmentation/tools/{name}" for name in ("train.py", "dist_train.sh", "dist_test.sh")} <= needed
    assert needed - names(wheel) == set()


def test_the_wheel_holds_nothing_else(wheel):
    others = {name for name in names(wheel) if not name.startswith(tuple(f"{package}/" for package in PACKAGES))}
    assert {name for name in others if ".dist-info/" not in name} == set(LAUNCHERS)
    assert any(re.search(r"\.dist-info/.*LICENSE$", name) for name in others)


TYPOS = """
import beit
from beit import crate_model

beit.creat_model("x")
beit.inference_model("x", "photo.jpg")["top5"]
beit.inference_model("x", ["a.jpg", "b.jpg"])[0]["name"]
"""


# All of what torch and others have would take it a minute.
MYPY = """
[mypy]
strict = true
follow_imports = silent
ignore_missing_imports = true
[mypy-torch.*,torchvision.*,timm.*,scipy.*,transformers.*,matplotlib.*]
follow_imports = skip
[mypy-torch,torch._tensor,torch._C]
follow_imports = silent
"""


def test_a_type_checker_sees_misspelt_names_and_passes_the_code_of_the_readme(tmp_path):
    (code,) = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    for name, text in {"mypy.ini": MYPY, "readme.py": code, "typos.py": TYPOS}.items():
        (tmp_path / name).write_text(text)
    command = (sys.executable, "-m", "mypy", "--config-file", tmp_path / "mypy.ini", "--cache-dir", tmp_path / "cache")
    done = subprocess.run(
        [*command, tmp_path / "readme.py", tmp_path / "typos.py"], capture_output=True, text=True, cwd=ROOT
    )
    found = [line for line in done.stdout.splitlines() if "error:" in line]
    assert [re.findall(r"(\w+)\.py:.*\[([\w-]+)\]", line)[0] for line in found] == [("typos", "attr-defined")] * 2, (
        found
    )


def test_the_dependencies_are_those_of_requirements_txt(metadata):
    # Broken by a second list of dependencies beside requirements.txt.
    declared = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    always = {str(requirement) for requirement in declared if "extra" not in str(requirement.marker)}
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    assert always == {str(Requirement(line)) for line in lines if line}
    extras = "app data deepspeed demo docs hub jax onnx test trackio wandb webdataset"
    assert set(metadata.get_all("Provides-Extra")) == set(extras.split())


def test_the_version_is_the_same_everywhere(metadata):
    assert beit.__version__ == metadata["Version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == metadata["Version"]


def test_the_console_command_is_declared(wheel):
    entry_points = configparser.ConfigParser()
    entry_points.read_string(read(wheel, "*.dist-info/entry_points.txt"))
    assert dict(entry_points["console_scripts"]) == {"beit": "beit.__main__:main"}


def test_an_installed_wheel_runs_away_from_the_sources(wheel, tmp_path):
    # Broken by code that looks for its recipes, or a launcher, beside the repository.
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    where = run("-c", "import beit; print(beit.__file__)", cwd=tmp_path, env=environment)
    assert where.startswith(str(tmp_path))
    for launcher in LAUNCHERS:
        assert "--data_path" in run("-m", Path(launcher).stem, "--help", cwd=tmp_path, env=environment)
    recipes = sorted(path.stem for path in (ROOT / "beit" / "recipes").glob("pretrain*.yaml"))
    show = (
        "import sys, beit.config as c, beit.tasks.pretraining as m; "
        "[print(c.read_yaml(m.PretrainingConfig, name)) for name in sys.argv[1:]]"
    )
    assert run("-c", show, *recipes, cwd=tmp_path, env=environment).count("'lr':") == len(recipes) > 1
    segment = (
        "import sys, beit.config as c, semantic_segmentation.config as s; argv = sys.argv[1:]; "
        "print(c.read_command_line(s.TrainConfig, argv, '', '').max_steps)"
    )
    config = "configs/beit/upernet/upernet_beit_tiny_64_slide_ade20k.py"
    assert int(run("-c", segment, config, cwd=tmp_path, env=environment)) > 0
    for tool in ("train", "test"):
        module = f"semantic_segmentation.tools.{tool}"
        assert "CONFIG" in run("-m", module, "--help", cwd=tmp_path, env=environment)
    shell = tmp_path / "site" / "semantic_segmentation" / "tools" / "dist_train.sh"
    assert os.access(shell, os.X_OK)


def workflows():
    return {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def test_the_workflows_test_what_the_package_promises(metadata):
    # They have not run. Broken by a verb that make does not have, or a Python that is promised and not tested.
    jobs = {**workflows()["ci"]["jobs"], **workflows()["release"]["jobs"]}
    assert jobs.keys() == {"lint", "docs", "test-fast", "test", "wheel", "publish"}
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all({"run", "uses"} & step.keys() for step in steps)
    verbs = {words[1] for step in steps if (words := step.get("run", "").split())[:1] == ["make"]}
    assert verbs == {"lint", "docs", "test-fast"}
    assert all(re.search(rf"^{verb}:", (ROOT / "Makefile").read_text(), re.M) for verb in verbs)
    matrix = jobs["test-fast"]["strategy"]["matrix"]
    promised = re.findall(r"Python :: (3\.\d+)$", "\n".join(metadata.get_all("Classifier")), re.M)
    assert matrix["python-version"] == promised
    assert matrix["include"] == [{"python-version": promised[0], "torch": "oldest"}]


def test_the_oldest_torch_of_the_workflow_is_that_of_requirements_txt(tmp_path):
    (step,) = (step for step in workflows()["ci"]["jobs"]["test-fast"]["steps"] if "if" in step)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    environment = {**os.environ, "GITHUB_ENV": str(tmp_path / "env")}
    subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "env").read_text() == f"PIP_CONSTRAINT={tmp_path}/oldest.txt\n"
    lines = [Requirement(line) for line in (tmp_path / "oldest.txt").read_text().split()]
    lowest = {r.name: r for r in map(Requirement, (ROOT / "requirements.txt").read_text().split())}
    assert [line.name for line in lines] == ["torch", "torchvision"]
    for line in lines:
        oldest = str(lowest[line.name].specifier).removeprefix(">=")
        assert f"{oldest}.0" in line.specifier
        assert f"{oldest[:-1]}{int(oldest[-1]) + 1}.0" not in line.specifier


def test_issue_forms_and_the_dockerfile_are_what_their_readers_expect():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys()
        assert all({"type", "id", "attributes"} <= field.keys() for field in form["body"])
    text = (ROOT / "Dockerfile").read_text()
    assert f'ARG TORCH="{V100_TORCH}"' in text
    assert re.findall(r"/whl/(\w+)", (ROOT / "requirements-v100.txt").read_text()) == re.findall("CUDA=(cu126)", text)
