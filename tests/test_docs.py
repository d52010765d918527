"""What readers meet outside the code: every shown command parses, and every link leads somewhere."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from beit.__main__ import COMMANDS
from beit.checkpoints.released import RELEASED
from beit.config import read_command_line
from beit.tasks.settings import (
    DvaeConfig,
    FinetuningConfig,
    LinearProbeConfig,
    PretrainingConfig,
    PretrainingV2Config,
    VqkdConfig,
)
from semantic_segmentation.__main__ import COMMANDS as SEGMENTATION_COMMANDS
from semantic_segmentation.config import TestConfig, TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "semantic_segmentation" / "README.md",
]
LAUNCHERS = [*sorted(ROOT.glob("run_*.py")), *sorted((ROOT / "semantic_segmentation" / "tools").glob("*.py"))]
SCRIPTS = {
    "run_beit_pretraining.py": PretrainingConfig,
    "run_beitv2_pretraining.py": PretrainingV2Config,
    "run_class_finetuning.py": FinetuningConfig,
    "run_dvae_training.py": DvaeConfig,
    "run_linear_eval.py": LinearProbeConfig,
    "run_vqkd_training.py": VqkdConfig,
    "tools/train.py": TrainConfig,
    "tools/test.py": TestConfig,
}
ANY_CONFIG = "upernet_beit_tiny_64_slide_ade20k"
PLACEHOLDERS = ("CHECKPOINT", "SOURCE")
LONGEST = 250


def blocks_in(path):
    """Returns language and text of each code block of a page; of a launcher, its docstring."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".md":
        return [("", text.split('"""')[1])]
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


def commands_of(block):
    """Yields the commands of a code block, in words without the comments."""
    for line in block.replace("\\\n", " ").splitlines():
        if re.match(r" *(python|torchrun|bash|srun|beit|mpirun|run_\w+\.py) ", line):
            yield shlex.split(line, comments=True)


def commands_in(path):
    """Yields the commands of a page or a launcher."""
    for language, block in blocks_in(path):
        if language in ("", "bash", "sh"):
            yield from commands_of(block)


def settings_of(words):
    """Returns the settings class of a shown command and its flags; None for a command that is not one of ours."""
    if words[0] == "beit" or words[1:3] == ["-m", "semantic_segmentation"]:
        known, rest = (COMMANDS, words[1:]) if words[0] == "beit" else (SEGMENTATION_COMMANDS, words[3:])
        name = " ".join(rest[:2]) if " ".join(rest[:2]) in known else rest[0]
        module, _, settings = known[name].settings.partition(":")
        return getattr(importlib.import_module(module), settings), rest[len(name.split()) :]
    for at, word in enumerate(words):
        if re.search(r"tools/dist_(train|test)\.sh$", word):
            training = word.endswith("train.sh")
            places = 1 if training else 2
            rest = words[at + 1 :]
            assert rest[places].isdigit(), words  # the number of GPUs
            return TrainConfig if training else TestConfig, rest[:places] + rest[places + 1 :]
        for script, settings in SCRIPTS.items():
            if word.endswith(script):
                return settings, [flag for flag in words[at + 1 :] if flag != "…"]
    return None


SHOWN = [(path, words) for path in (*PAGES, *LAUNCHERS) for words in commands_in(path) if settings_of(words)]


@pytest.mark.parametrize(
    ("path", "words"), SHOWN, ids=[f"{path.relative_to(ROOT)}-{at}" for at, (path, _) in enumerate(SHOWN)]
)
def test_a_shown_command_parses(path, words, monkeypatch):
    # Breaks with a flag, a choice, a recipe or a config that does not exist; the files it names need not.
    monkeypatch.setattr("beit.config._check_exists", lambda *_: None)
    settings, flags = settings_of(words)
    flags = [ANY_CONFIG if flag.endswith("/config.yaml") else flag for flag in flags]  # of a run that is not there
    config = read_command_line(settings, flags, path.name, "")
    for source in (getattr(config, name, "") for name in ("init_from", "checkpoint", "resume")):
        assert (
            not source
            or source.removesuffix(".pth") in RELEASED
            or source.startswith(("output/", "demo/", *PLACEHOLDERS))
        ), words


def test_commands_of_every_kind_are_shown():
    # Breaks when the pattern above no longer finds them.
    assert {settings_of(words)[0] for _, words in SHOWN} >= set(SCRIPTS.values())
    assert len(SHOWN) > 60


def anchors_of(path):
    """Returns the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            linked = (path.parent / name).resolve() if name else path
            assert linked.exists(), target
            assert not anchor or anchor in anchors_of(linked), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_can_be_read_in_one_go(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def resolves(name):
    """Whether a dotted name is a module, or something in one."""
    module, _, attribute = name.rpartition(".")
    try:
        return importlib.util.find_spec(name) is not None or hasattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:  # of an attribute of a class
        owner, _, class_name = module.rpartition(".")
        return bool(owner) and hasattr(getattr(importlib.import_module(owner), class_name), attribute)


@pytest.mark.parametrize("path", [path for path in PAGES if path.name != "CHANGELOG.md"], ids=lambda path: path.name)
def test_named_modules_exist(path):
    # Breaks when a page names what was moved; the changelog has old names on purpose.
    text = path.read_text(encoding="utf-8")
    names = re.findall(r"`((?:beit|semantic_segmentation|dall_e|examples)(?:\.\w+)+)", text)
    for module, imported in re.findall(
        r"^from ((?:beit|semantic_segmentation)[\w.]*) import (.*)$", text, re.MULTILINE
    ):
        names += [f"{module}.{name}" for name in imported.split(", ")]
    assert not [name for name in names if not name.startswith("beit.encoder.") and not resolves(name)]
