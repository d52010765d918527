"""run_class_finetuning.py as a user runs it: the chain from pre-training on, killed, and on two processes."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.shell import run

pytestmark = pytest.mark.slow

SCRIPT = "run_class_finetuning.py"
KILLED = "tests/integration/killed_finetuning.py"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port")
KILL_SEED = 20210615
EPOCHS, STEPS = 3, 15

SMALL_MODEL = ("--model", "beit_tiny_patch16_224", "--model_kwargs", "patch_size=8", "embed_dim=32", "depth=2")
SMALL_MODEL += ("num_heads=2", "--input_size", "48")
SMALL_RUN = ("--device", "cpu", "--num_workers", "0", "--batch_size", "8", "--epochs", str(EPOCHS))
SMALL_RUN += ("--warmup_epochs", "1", "--lr", "1e-3")
# Everything that a resumed run must draw again as the undisturbed one did.
EVERYTHING = ("--model_ema", "--model_ema_decay", "0.8", "--mixup", "0.8", "--cutmix", "1.0", "--drop", "0.1")
EVERYTHING += ("--recount", "2", "--clip_grad", "1.0", "--save_ckpt_freq", "2")
NOTHING_RANDOM = ("--aa", "none", "--color_jitter", "0", "--reprob", "0", "--drop_path", "0")


def write_data(folder: Path, classes: int, train: int, val: int) -> Path:
    """Images that tell their class by a coarse pattern."""
    rng = np.random.default_rng(classes)
    patterns = rng.integers(0, 200, (classes, 3, 3, 3))
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            (folder / split / f"class{label:02}").mkdir(parents=True)
            for number in range(count):
                pixels = (patterns[label] + rng.integers(0, 56, (3, 3, 3))).astype(np.uint8)
                image = Image.fromarray(pixels).resize((60, 52), Image.Resampling.BICUBIC)
                image.save(folder / split / f"class{label:02}" / f"{number}.jpg")
    return folder


@pytest.fixture(scope="module")
def fifty(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("fifty"), 50, train=2, val=1)


@pytest.fixture(scope="module")
def ten(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("ten"), 10, train=4, val=3)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def reported(stderr: str) -> str:
    return re.findall(r"\* (Acc@1 .*)", stderr)[-1]


def test_from_pretraining_to_a_larger_size(tmp_path, fifty, ten, pretraining_flags):
    """Pre-train, fine-tune on 50 classes, then on 10, then at 1.5 times the size: each from the last one's file."""
    run("run_beit_pretraining.py", *pretraining_flags, "--epochs", "1", "--output_dir", tmp_path / "pretrain")
    intermediate = run(
        *(SCRIPT, *SMALL_MODEL, *SMALL_RUN, "--epochs", "1", "--data_set", "image_folder", "--nb_classes", "50"),
        *("--data_path", fifty / "train", "--disable_eval_during_finetuning", "--output_dir", tmp_path / "fifty"),
        *("--finetune", tmp_path / "pretrain" / "checkpoint-0.pth"),
    )
    assert "its shared bias table copied into 2 blocks" in intermediate.stderr
    assert "4 x 4 to 6 x 6 patches" in intermediate.stderr
    second = run(
        *(SCRIPT, *SMALL_MODEL, *SMALL_RUN, "--data_path", ten, "--output_dir", tmp_path / "ten"),
        *("--finetune", tmp_path / "fifty" / "checkpoint-0.pth", "--lr", "5e-3", "--init_scale", "1"),
    )
    assert re.search(r"dropped \(the head has 50 outputs, the model 10\): head.weight, head.bias", second.stderr)
    larger = (*SMALL_MODEL, "--input_size", "72", *SMALL_RUN, "--data_path", ten)
    third = run(
        SCRIPT, *larger, "--output_dir", tmp_path / "72", "--finetune", tmp_path / "ten" / "checkpoint-best.pth"
    )
    assert "6 x 6 to 9 x 9 patches" in third.stderr
    assert "dropped" not in third.stderr
    # What is evaluated afterwards, with whatever batch or on whatever worker, is what training reported.
    last, best = log_of(tmp_path / "72")[-1], max(log_of(tmp_path / "72"), key=lambda entry: entry["test_acc1"])
    for checkpoint, entry in (("checkpoint-2.pth", last), ("checkpoint-best.pth", best)):
        done = run(SCRIPT, *larger, "--eval", "--resume", tmp_path / "72" / checkpoint)
        expected = f"Acc@1 {entry['test_acc1']:.3f} Acc@5 {entry['test_acc5']:.3f} loss {entry['test_loss']:.3f}"
        assert reported(done.stderr) == expected
    assert reported(done.stderr) in third.stderr


@pytest.fixture(scope="module")
def flags(ten) -> tuple[str, ...]:
    return (*SMALL_MODEL, *SMALL_RUN, "--data_path", str(ten))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, flags) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(SCRIPT, *flags, *EVERYTHING, "--output_dir", folder)
    return folder


def assert_same_bits(folder: Path, reference: Path) -> None:
    for name in ("checkpoint-2.pth", "checkpoint-best.pth", "checkpoint-best-ema.pth"):
        ours, theirs = (torch.load(place / name, weights_only=True) for place in (folder, reference))
        for part in {"model", "model_ema"} & theirs.keys():
            assert ours[part].keys() == theirs[part].keys()
            assert all(torch.equal(tensor, theirs[part][key]) for key, tensor in ours[part].items())
        for index, state in theirs.get("optimizer", {"state": {}})["state"].items():
            assert all(torch.equal(value, ours["optimizer"]["state"][index][key]) for key, value in state.items())
        assert (ours["best"], ours["epoch"]) == (theirs["best"], theirs["epoch"])
    timing = ("images_per_second", "data_wait")
    logs = [[{k: v for k, v in entry.items() if k not in timing} for entry in log_of(f)] for f in (folder, reference)]
    assert logs[0] == logs[1]


def test_a_run_writes_what_is_promised(undisturbed):
    entries = log_of(undisturbed)
    assert [entry["epoch"] for entry in entries] == [0, 1, 2]
    assert {"test_loss", "test_acc1", "test_acc5", "test_ema_acc1", "train_loss", "n_parameters"} <= entries[0].keys()
    names = {f"checkpoint-{name}.pth" for name in ("1", "2", "best", "best-ema", "last")}
    assert {path.name for path in undisturbed.glob("*.pth")} == names
    state = torch.load(undisturbed / "checkpoint-2.pth", weights_only=True)
    assert {"model", "optimizer", "epoch", "scaler", "args", "model_ema", "labels"} <= state.keys()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_killed_twice_it_ends_with_the_same_bits(tmp_path, flags, undisturbed, workers):
    steps = sorted(random.Random(KILL_SEED + int(workers)).sample(range(1, STEPS), 2))
    print(f"seed {KILL_SEED}, {workers} workers: SIGKILL at steps {steps}")
    again = (*flags, *EVERYTHING, "--output_dir", tmp_path, "--save_ckpt_steps", "1", "--num_workers", workers)
    for step in steps:
        assert run(KILLED, "step", str(step), "--", *again, check=False).returncode == -9
    finished = run(SCRIPT, *again)
    assert "resuming" in finished.stderr
    assert_same_bits(tmp_path, undisturbed)


@pytest.mark.parametrize("write", ["3", "5"])
def test_killed_between_temporary_file_and_rename(tmp_path, flags, undisturbed, write):
    # The first epoch writes checkpoint-last.pth and both best files; the second that and its checkpoint.
    again = (*flags, *EVERYTHING, "--output_dir", tmp_path)
    killed = run(KILLED, "rename", write, "--", *again, check=False)
    assert killed.returncode == -9, killed.stderr
    run(SCRIPT, *again)
    assert_same_bits(tmp_path, undisturbed)


def test_two_processes_equal_one(tmp_path, flags, free_port):
    # 30 validation images on 2 processes of batch 4 do not come out even: each must still count once.
    plain = (*flags, *NOTHING_RANDOM, "--lr", "2e-4", "--init_scale", "1", "--log_every", "1", "--dist_eval")
    run(SCRIPT, *plain, "--output_dir", tmp_path / "one")
    done = run(*TORCHRUN, free_port, SCRIPT, *plain, "--batch_size", "4", "--output_dir", tmp_path / "two")
    assert "batch 8 = 4 images x 2 processes" in done.stderr
    one, two = (torch.load(tmp_path / name / "checkpoint-2.pth", weights_only=True) for name in ("one", "two"))
    # A tenth of lr: Adam moves a weight whose gradient is mostly rounding error by a share of lr a step; gradients that
    # are not averaged, or other batches, move it by several lr.
    assert max((tensor - two["model"][key]).abs().max().item() for key, tensor in one["model"].items()) < 2e-5
    for ours, theirs in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert (ours["test_acc1"], ours["test_acc5"]) == (theirs["test_acc1"], theirs["test_acc5"])
        for name in ("train_loss", "train_class_acc", "test_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    # And one process evaluates to the same what two trained.
    alone = run(SCRIPT, *plain, "--eval", "--resume", tmp_path / "two" / "checkpoint-2.pth")
    assert reported(alone.stderr) in done.stderr


def test_a_mistake_is_one_line_from_two_processes_too(tmp_path, flags, free_port):
    wrong = (*flags, "--output_dir", tmp_path, "--nb_classes", "11")
    done = run(*TORCHRUN, free_port, SCRIPT, *wrong, check=False)
    assert done.returncode != 0
    assert len(re.findall(r"^error: --nb_classes 11, but .* has 10 classes", done.stderr, re.MULTILINE)) == 1
