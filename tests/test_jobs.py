"""Jobs called from Python: the command line's settings, log and files, in a script and in a notebook."""

import inspect
import json
import multiprocessing
import os
import signal

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

import beit
from beit.commands import COMMANDS
from beit.launch import launch
from beit.registry import locate
from beit.storage import load_checkpoint
from beit.training.loop import Trainer

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = {
    **{"model": "beit_tiny_patch16_224_8k_vocab", "model_kwargs": TINY, "input_size": 32, "target": "pixels"},
    **{"num_mask_patches": 6, "min_mask_patches_per_block": 2, "batch_size": 8, "epochs": 2, "warmup_epochs": 0},
    **{"device": "cpu", "num_workers": 0},
}
TIMING = ("images_per_second", "data_wait")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(16):
        kind = folder / ("train", "val")[number % 2] / ("cat", "dog")[number // 2 % 2]
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(kind / f"{number}.png")
    return folder


def untimed(log):
    return [{key: value for key, value in entry.items() if key not in TIMING} for entry in log]


def test_a_call_is_the_command(images, tmp_path):
    result = beit.pretrain(**SMALL, data_path=images, output_dir=tmp_path / "called")
    flags = {**SMALL, "model_kwargs": [f"{key}={value}" for key, value in TINY.items()], "data_path": images}
    argv = ["--output_dir", str(tmp_path / "launched")]
    for key, value in flags.items():
        argv += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    pretrain = COMMANDS["pretrain"]
    assert launch(locate(pretrain.settings), pretrain.main, "", argv) == 0
    lines = [json.loads(line) for line in (tmp_path / "launched/log.txt").read_text().splitlines()]
    assert [entry["epoch"] for entry in result.log] == [0, 1]
    assert untimed(result.log) == untimed(lines)
    assert (result.output_dir, result.checkpoint.name) == (tmp_path / "called", "checkpoint-1.pth")
    weights = load_checkpoint(tmp_path / "launched/checkpoint-1.pth")["model"]
    assert all(torch.equal(it, weights[name]) for name, it in load_checkpoint(result.checkpoint)["model"].items())


def test_a_job_leaves_no_workers(images, tmp_path):
    # Breaks if their end is left to the garbage collector, which then waits for each of them for ten seconds.
    beit.pretrain(**{**SMALL, "epochs": 1, "num_workers": 2}, data_path=images, output_dir=tmp_path)
    assert not multiprocessing.active_children()


def test_what_was_pretrained_is_finetuned_and_evaluated(images, tmp_path):
    pretrained = beit.pretrain(**{**SMALL, "epochs": 1}, data_path=images / "train", output_dir=tmp_path / "pretrain")
    common = {"model": "beit_tiny_patch16_224", "model_kwargs": TINY, "data_path": images, "device": "cpu"}
    common |= {"num_workers": 0, "batch_size": 4, "input_size": (32, 32)}
    tuned = beit.finetune(finetune=pretrained.checkpoint, epochs=1, warmup_epochs=0, **common)
    assert (tuned.output_dir, tuned.checkpoint) == (None, None)
    assert tuned.log[0]["test_acc1"] >= 0
    tuned = beit.finetune(init_from=pretrained.checkpoint, epochs=1, warmup_epochs=0, output_dir=tmp_path, **common)
    evaluated = beit.finetune(eval=True, resume=tuned.checkpoint, **common)
    assert evaluated.log[0]["test_loss"] == pytest.approx(tuned.log[0]["test_loss"])


def test_a_stop_signal_saves_and_the_same_call_continues(images, tmp_path, monkeypatch):
    steps = []
    original = Trainer._update

    def update(self):
        steps.append(0)
        if len(steps) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Trainer, "_update", update)
    call = {**SMALL, "data_path": images, "output_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt, match="stopped at epoch 0, step 1; the same call resumes from there"):
        beit.pretrain(**call)
    assert (tmp_path / "checkpoint-last.pth").exists()
    assert [entry["epoch"] for entry in beit.pretrain(**call).log] == [0, 1]
    assert len(steps) == 4
    assert [entry["epoch"] for entry in beit.pretrain(**call).log] == [0, 1]  # of a run that is done
    assert len(steps) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bach_size": 3}, "unknown key 'bach_size' .did you mean 'batch_size'"),
        ({"batch_size": "many"}, "batch_size: cannot use 'many': expected a whole number"),
        ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"config": "pretrain_base_800"}, "no settings file pretrain_base_800"),
        ({**SMALL, "data_path": "nowhere"}, "nowhere"),
        ({}, "^--data_path is missing"),
        ({"no_lr": True}, "unknown key 'no_lr'"),
    ],
)
def test_a_mistake_is_one_line(settings, message):
    with pytest.raises(beit.InputError, match=message) as raised:
        beit.pretrain(**settings)
    assert "\n" not in str(raised.value)


def test_settings_go_by_every_name_that_they_have_as_flags(monkeypatch):
    given = []
    monkeypatch.setattr("beit.tasks.pretraining.main", given.append)
    beit.pretrain(disable_rel_pos_bias=True, no_auto_resume=False, min_crop_scale=0.5, tokenizer_weight="tokenizer/")
    beit.pretrain(config="pretrain_base_1k_800ep", update_freq=2, lr=1e-3)
    spelled, recipe = given
    assert (spelled.rel_pos_bias, spelled.auto_resume, spelled.min_crop) == (False, True, 0.5)
    assert spelled.discrete_vae_weight_path == "tokenizer/"
    assert (recipe.epochs, recipe.lr) == (800, 1e-3)
    assert recipe.total_batch_size == 0  # which --update_freq takes the place of


def test_every_job_is_a_function_that_lists_its_settings():
    from semantic_segmentation import train_segmentor

    names = ("pretrain", "pretrain_v2", "finetune", "linear_probe", "train_dvae", "train_vqkd")
    for name, job in {**{name: getattr(beit, name) for name in names}, "train_segmentor": train_segmentor}.items():
        assert job.__name__ == name
        parameters = inspect.signature(job).parameters
        assert {"config", "data_path", "batch_size", "output_dir"} <= parameters.keys()
        assert all(f"    {name}: " in job.__doc__ for name in parameters)
    assert inspect.signature(beit.pretrain_v2).parameters["mask_strategy"].default == "block_exact"


CELL = """
import beit

result = beit.pretrain(**{settings})
result
"""


@pytest.mark.slow  # starts a kernel
def test_in_a_notebook_a_run_shows_bars_and_lines_and_a_mistake_is_one_line(images, tmp_path):
    settings = {**SMALL, "data_path": str(images), "output_dir": str(tmp_path / "run"), "log_every": 1}
    cells = [CELL.format(settings=it) for it in (settings, {**settings, "bach_size": 1})]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    with pytest.raises(CellExecutionError):
        NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    trained, mistaken = (cell.outputs for cell in notebook.cells)
    streams = {"stdout": "", "stderr": ""}
    for output in trained[:-1]:
        streams[output.name] += output.text
    assert "epoch" not in streams["stderr"].lower()  # which a notebook paints red
    assert "epoch 1: train_loss" in streams["stdout"]
    assert "Epoch [2/2]" in streams["stdout"]
    assert "checkpoint-1.pth" in trained[-1]["data"]["text/plain"]
    (error,) = mistaken
    assert error.traceback == ["InputError: unknown key 'bach_size' (did you mean 'batch_size' or 'total_batch_size'?)"]
