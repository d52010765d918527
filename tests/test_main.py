"""The console command: every subcommand is reachable, mistakes are one line and exit code 2."""

import importlib
import io
import json
import re
import subprocess
import sys

import pytest
from PIL import Image

import beit
from beit.__main__ import COMMANDS, main
from beit.commands.settings import ModelsConfig
from beit.launch import launch
from beit.tokenizers.vqkd import DOWNLOADS
from beit.zoo import create_model, list_models


def test_alone_it_lists_the_commands(capsys):
    assert main([]) == main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"beit {beit.__version__}\n"


def test_names_that_the_console_cannot_show_are_written_out(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert launch(ModelsConfig, lambda _: console.write("caf\u00e9"), "", []) == 0
    console.flush()
    assert console.buffer.getvalue() == b"caf\\xe9"


LIGHT = """
import contextlib, os, sys
from beit.__main__ import COMMANDS, main

words = [["--version"], [], ["visualize", "--help"], ["pretrian"], ["models", "--patern", "x"]]
words += [["visualize", "curves", "nowhere"], ["predict", "nowhere.jpg"], ["knn", "--data_path", "nowhere"]]
words += [[*name.split(), "--help"] for name in COMMANDS]
with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
    for arguments in words:
        with contextlib.suppress(SystemExit):
            main(arguments)
        heavy = {"torch", "numpy", "timm", "torchvision", "PIL"} & set(sys.modules)
        if heavy:
            sys.exit(f"{arguments} imported {heavy}")
"""


def test_help_and_mistakes_need_no_torch():
    # Shell completion, a look at --help or a misspelled path should not take seconds.
    subprocess.run([sys.executable, "-c", LIGHT], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_and_explains_itself(name, capsys):
    module, function = COMMANDS[name].main.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: beit {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["pretrian"], "did you mean 'pretrain'"),
        (["visualise", "curves"], "did you mean 'visualize'"),
        (["visualize"], "visualize reconstruct, visualize attention"),
        (["visualize", "curve", "log.txt"], "did you mean 'visualize curves'"),
        (["download"], "download tokenizer"),
        (["download", "tokenizer"], "required: OUTPUT_DIR"),
        (["models", "--patern", "x"], "did you mean '--pattern'"),
        (["models", "--pattern", "vit*"], "no model matches"),
        (["visualize", "curves", "nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["visualize", "reconstruct"], "--checkpoint and --images"),
        (
            ["visualize", "reconstruct", "--checkpoint", "no.pth", "--images", "a.png"],
            "images a.png: no such file or folder",
        ),
        (["dvae"], "--data_path is missing"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, hint, capsys):
    assert main(arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert hint in error[0]


def test_models_are_listed_with_their_sizes(capsys):
    assert main(["models", "--pattern", "*tiny*"]) == 0
    listed = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines())
    assert sorted(listed) == list_models("*tiny*")
    for name, count in listed.items():
        assert int(count.replace(",", "")) == sum(parameter.numel() for parameter in create_model(name).parameters())


def test_models_are_listed_with_their_cost_and_the_released_checkpoints(capsys):
    # 17.58 is quoted by mmpretrain, which counts small operations too.
    assert main(["models", "--pattern", "beit_base_patch16_224*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (base,) = (line for line in lines if line.startswith("beit_base_patch16_224 "))
    assert float(base.split()[-2]) == pytest.approx(17.58, abs=0.05)
    assert any(re.match(r"beit_base_patch16_224_pt22k_ft22k +21,841 classes, 224 px", line) for line in lines)


def test_released_tokenizers_are_listed(capsys):
    assert main(["models", "--pattern", "vqkd*"]) == 0
    assert capsys.readouterr().out.split("\n")[2:-1] == list(DOWNLOADS)


def test_curves_of_two_runs_become_a_picture(tmp_path):
    for run, loss in (("first", 3.0), ("second", 2.0)):
        (tmp_path / run).mkdir()
        lines = (json.dumps({"epoch": epoch, "train_loss": loss / (epoch + 1)}) for epoch in range(3))
        (tmp_path / run / "log.txt").write_text("\n".join(lines))
    output = tmp_path / "curves.png"
    assert (
        main(["visualize", "curves", str(tmp_path / "first"), str(tmp_path / "second" / "log.txt"), "-o", str(output)])
        == 0
    )
    with Image.open(output) as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize("arguments", [["visualize", "--help"], ["help", "visualize"]])
def test_a_group_of_commands_says_what_is_in_it(arguments, capsys):
    # Breaks when `beit visualize --help` is taken for a misspelt command.
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "visualize attention" in told
    assert "pretrain " not in told
