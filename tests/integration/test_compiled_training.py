"""The launchers with their models compiled, by a real compiler: each run learns as it does without."""

import json
import shutil
from pathlib import Path

import pytest

from tests.shell import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PRETRAIN, FINETUNE = "run_beit_pretraining.py", "run_class_finetuning.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
# Without stochastic depth, whose random numbers are drawn in another order. Each block is compiled, for seconds.
FLAGS = ("--epochs", "1", "--drop_path", "0")
FLAGS += ("--model_kwargs", "patch_size=8", "embed_dim=32", "depth=1", "num_heads=2")


def losses_of(folder: Path) -> dict[str, float]:
    (line,) = (folder / "log.txt").read_text().splitlines()
    return {name: value for name, value in json.loads(line).items() if name in ("train_loss", "test_loss")}


def same_losses(folder: Path) -> bool:
    return losses_of(folder / "compiled") == pytest.approx(losses_of(folder / "plain"), rel=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_compiled_pretraining_learns_as_plain(tmp_path, pretraining_flags, processes):
    # Breaks if padding counts in the loss, or compiled processes do not add up their gradients.
    flags = (*pretraining_flags, *FLAGS, "--total_batch_size", "8")
    run(PRETRAIN, *flags, "--output_dir", tmp_path / "plain")
    command = (PRETRAIN,) if processes == 1 else (*TORCHRUN, PRETRAIN)
    flags += ("--grad_checkpointing",) if processes > 1 else ("--tokenizer_compile",)
    run(*command, *flags, "--output_dir", tmp_path / "compiled", "--compile", timeout=500)
    assert same_losses(tmp_path)


@pytest.fixture
def two_classes(tmp_path, images) -> Path:
    for number, path in enumerate(sorted(images.rglob("*.jpg"))[:10]):
        folder = tmp_path / "classes" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return tmp_path / "classes"


def test_compiled_finetuning_learns_as_plain(tmp_path, two_classes):
    # Breaks if a batch of another size, a copy of the model or the evaluation mode meets the graph made for training.
    flags = ("--data_path", two_classes, "--data_set", "image_folder", "--eval_data_path", two_classes)
    flags += ("--model", "beit_tiny_patch16_224")
    flags += ("--input_size", "32", "--device", "cpu", "--batch_size", "3", "--model_ema")
    flags += ("--init_scale", "10", "--warmup_epochs", "0", "--lr", "1e-3")  # else every loss is that of guessing
    run(FINETUNE, *flags, *FLAGS, "--output_dir", tmp_path / "plain")
    run(FINETUNE, *flags, *FLAGS, "--output_dir", tmp_path / "compiled", "--compile", timeout=500)
    assert same_losses(tmp_path)
