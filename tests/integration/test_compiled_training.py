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


def losses_of(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "log.txt").read_text().splitlines())
    return [line[name] for line in lines for name in ("train_loss", "test_loss") if name in line]


def same_losses(folder: Path) -> bool:
    return losses_of(folder / "compiled") == pytest.approx(losses_of(folder / "plain"), rel=1e-4)


COUNTED = """
import json, sys
from beit.__main__ import main
assert main(sys.argv[1:]) == 0
from torch._dynamo.utils import counters
print(json.dumps({"graphs": counters["stats"]["unique_graphs"], **counters["inductor"]}))
"""


def test_compiled_pretraining_learns_as_plain_and_goes_on_with_the_graph_in_torchs_cache(
    tmp_path, pretraining_flags, images
):
    # Masks of many sizes and an evaluation with a smaller last batch. Breaks if padding counts in the loss, or if a
    # shape or a constant depends on the data or the step: then there are more graphs, or others after a resume.
    flags = (*pretraining_flags, *FLAGS, "--eval_data_path", images, "--batch_size", "7")
    flags += ("--min_mask_patches_per_block", "4")
    run(PRETRAIN, *flags, "--epochs", "2", "--output_dir", tmp_path / "plain")
    compiled = ("-c", COUNTED, "pretrain", *flags, "--output_dir", tmp_path / "compiled", "--compile")
    for epochs in (1, 2):
        done = run(*compiled, "--epochs", epochs, timeout=500, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
        counts = json.loads(done.stdout.splitlines()[-1])
        assert counts["graphs"] == 1
        assert 1 <= done.stderr.count("compiled in ") <= 2  # forward, and backward where torch leaves it for later
        assert "epoch 1, step 0" in done.stderr or epochs == 1
    assert counts["fxgraph_cache_hit"] == 2
    assert "fxgraph_cache_miss" not in counts
    assert same_losses(tmp_path)


def test_two_compiled_processes_learn_as_one_plain(tmp_path, pretraining_flags):
    # Breaks if compiled processes do not add up their gradients.
    flags = (*pretraining_flags, *FLAGS, "--total_batch_size", "8")
    run(PRETRAIN, *flags, "--output_dir", tmp_path / "plain")
    flags += ("--grad_checkpointing", "--tokenizer_compile", "--compile", "--output_dir", tmp_path / "compiled")
    run(*TORCHRUN, PRETRAIN, *flags, timeout=500)
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
