"""--shard fsdp as a user runs it: two processes, killed, with another number of them, and wrongly called."""

import re
import shutil
import socket

import pytest
import torch

from tests.integration.test_finetuning import NOTHING_RANDOM, write_data
from tests.integration.test_finetuning import SCRIPT as FINETUNE
from tests.integration.test_finetuning import SMALL_MODEL as SMALL_CLASSIFIER
from tests.integration.test_finetuning import SMALL_RUN as SMALL_FINETUNING
from tests.integration.test_pretraining import KILLED, SCRIPT, final_checkpoint, log_of
from tests.shell import run

pytestmark = pytest.mark.slow

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port")
SHARDED = ("--shard", "fsdp", "--total_batch_size", "8", "--save_ckpt_steps", "2", "--save_ckpt_freq", "1")


@pytest.fixture(scope="module")
def flags(pretraining_flags):
    # Masks of one patch each have equal counts, so the mean over processes is the mean over the batch.
    return (*pretraining_flags, "--drop_path", "0", "--num_mask_patches", "1", "--min_mask_patches_per_block", "1")


# At most a tenth of lr. Where sums are in another order, Adam moves a weight whose gradient is mostly rounding error by
# a share of lr per step; state at the wrong parameter moves it by several lr.
ANOTHER_ORDER = 5e-5


def assert_same_run(folder, reference, tolerance):
    ours, theirs = (final_checkpoint(path)["model"] for path in (folder, reference))
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    losses = [[entry["train_loss"] for entry in log_of(path)] for path in (folder, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, flags):
    """A run of two processes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    run(*TORCHRUN, port, SCRIPT, *flags, *SHARDED, "--output_dir", folder)
    return folder


def test_killed_in_the_middle_of_a_save_it_ends_with_the_same_bits(tmp_path, flags, whole, free_port):
    # With all pieces of epoch 0 written, and nothing that names them.
    sharded = (*flags, *SHARDED, "--output_dir", tmp_path)
    killed = run(*TORCHRUN, free_port, KILLED, "pieces", "3", "--", *sharded, check=False)
    assert killed.returncode == 1
    assert "Signal 9" in killed.stderr
    assert (tmp_path / "checkpoint-0" / "__1_0.distcp").exists()
    assert not list(tmp_path.glob("checkpoint-0.pth"))
    finished = run(*TORCHRUN, free_port, SCRIPT, *sharded)
    assert "checkpoint-last.pth at epoch 0, step 4" in finished.stderr
    assert_same_run(tmp_path, whole, 0.0)
    folders = sorted(path.name for path in tmp_path.glob("checkpoint-*") if path.is_dir())
    # What the killed save left is not written into and not removed: only a folder that was named is known to be ours.
    assert folders == ["checkpoint-0", "checkpoint-0-2", "checkpoint-1", "checkpoint-2", "checkpoint-last-14"]
    assert len(list((tmp_path / "checkpoint-2").glob("*.distcp"))) == 2


def test_one_process_without_sharding_goes_on_to_the_same_losses(tmp_path, flags, whole):
    shutil.copytree(whole, tmp_path, ignore=shutil.ignore_patterns("*-2*", "*last*", ".lock"), dirs_exist_ok=True)
    finished = run(SCRIPT, *flags, "--total_batch_size", "8", "--output_dir", tmp_path)
    assert "checkpoint-1.pth at epoch 2, step 0" in finished.stderr
    assert_same_run(tmp_path, whole, ANOTHER_ORDER)
    assert "optimizer" in final_checkpoint(tmp_path)


def test_an_index_that_would_run_code_ends_in_one_line(tmp_path, flags, whole):
    shutil.copytree(whole, tmp_path, ignore=shutil.ignore_patterns(".lock"), dirs_exist_ok=True)
    (tmp_path / "checkpoint-2" / ".metadata").write_bytes(b"cbuiltins\nexec\n(S'raise SystemExit(7)'\ntR.")
    again = (*flags, "--total_batch_size", "8", "--epochs", "4", "--output_dir", tmp_path)
    refused = run(SCRIPT, *again, "--shard", "fsdp", check=False)
    assert refused.returncode == 2
    assert len(re.findall(r"^error: .*builtins.exec.*never run$", refused.stderr, re.MULTILINE)) == 1


def test_two_losses_in_parts_equal_those_alone(tmp_path, flags, free_port):
    # Breaks if the blocks for the class token are not gathered, or not saved.
    script, v2 = (
        "run_beitv2_pretraining.py",
        ("--model", "beit_base_patch16_224_8k_vocab_cls_pt", "--early_layers", "1"),
    )
    run(script, *flags, *v2, "--total_batch_size", "8", "--output_dir", tmp_path / "alone")
    run(*TORCHRUN, free_port, script, *flags, *v2, *SHARDED, "--output_dir", tmp_path / "two")
    ours, theirs = (log_of(tmp_path / name)[-1] for name in ("two", "alone"))
    for name in ("train_loss_1", "train_loss_2", "train_grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    shutil.copytree(tmp_path / "two", tmp_path / "on", ignore=shutil.ignore_patterns(".lock"), dirs_exist_ok=True)
    run(script, *flags, *v2, "--total_batch_size", "8", "--epochs", "4", "--output_dir", tmp_path / "on")
    assert (
        "cls_pt_layers.1.mlp.fc2.weight" in torch.load(tmp_path / "on" / "checkpoint-3.pth", weights_only=True)["model"]
    )


def test_finetuning_in_parts_equals_finetuning_alone(tmp_path, free_port):
    # 30 validation images do not come out even: one process has a batch more than the other.
    data = write_data(tmp_path / "data", classes=10, train=4, val=3)
    small = (*SMALL_CLASSIFIER, *SMALL_FINETUNING, *NOTHING_RANDOM, "--data_path", str(data), "--clip_grad", "1.0")
    small += ("--total_batch_size", "8", "--init_scale", "1", "--model_ema", "--model_ema_decay", "0.8")
    run(FINETUNE, *small, "--output_dir", tmp_path / "alone")
    run(
        *TORCHRUN, free_port, FINETUNE, *small, "--batch_size", "2", "--shard", "fsdp", "--output_dir", tmp_path / "two"
    )
    assert_same_run(tmp_path / "two", tmp_path / "alone", ANOTHER_ORDER)
    ours, theirs = (log_of(tmp_path / name)[-1] for name in ("two", "alone"))
    for name in ("test_acc1", "test_loss", "test_ema_acc1", "test_ema_loss"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
