"""run_beit_pretraining.py as a user runs it: one process, two, killed, and wrongly called."""

import json
import random
import re
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import SMALL_MODEL
from tests.shell import run

pytestmark = pytest.mark.slow

SCRIPT = "run_beit_pretraining.py"
KILLED = "tests/integration/killed_run.py"
STEPS = 15
KILL_SEED = 20210615


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def final_checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint-2.pth", weights_only=True)


def assert_same_bits(folder: Path, reference: Path) -> None:
    ours, theirs = final_checkpoint(folder), final_checkpoint(reference)
    assert ours["model"].keys() == theirs["model"].keys()
    assert all(torch.equal(tensor, theirs["model"][name]) for name, tensor in ours["model"].items())
    for index, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(value, ours["optimizer"]["state"][index][key]) for key, value in state.items())
    assert [entry["train_loss"] for entry in log_of(folder)] == [entry["train_loss"] for entry in log_of(reference)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, pretraining_flags) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(SCRIPT, *pretraining_flags, "--output_dir", folder, "--log_dir", folder / "tensorboard")
    return folder


def test_a_run_writes_what_is_promised(undisturbed):
    entries = log_of(undisturbed)
    assert [entry["epoch"] for entry in entries] == [0, 1, 2]
    names = ("loss", "mlm_acc", "loss_scale", "lr", "min_lr", "weight_decay", "grad_norm")
    assert {f"train_{name}" for name in names} | {"epoch", "n_parameters"} <= entries[0].keys()
    assert entries[0]["train_loss"] == pytest.approx(torch.tensor(16.0).log().item(), abs=0.2)  # ln(tokens) at first
    assert entries[2]["train_loss"] < entries[0]["train_loss"]
    assert (undisturbed / "config.yaml").exists()
    assert list((undisturbed / "tensorboard").glob("events*"))
    checkpoint = final_checkpoint(undisturbed)
    assert {"model", "optimizer", "epoch", "scaler", "args"} <= checkpoint.keys()
    assert checkpoint["epoch"] == 2
    assert not [name for name in checkpoint["model"] if "relative_position_index" in name]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_killed_three_times_it_ends_with_the_same_bits(tmp_path, pretraining_flags, undisturbed, workers):
    steps = sorted(random.Random(KILL_SEED + int(workers)).sample(range(1, STEPS), 3))
    print(f"seed {KILL_SEED}, {workers} workers: SIGKILL at steps {steps}")
    flags = (*pretraining_flags, "--output_dir", tmp_path, "--save_ckpt_steps", "1", "--num_workers", workers)
    for step in steps:
        killed = run(KILLED, "step", str(step), "--", *flags, check=False)
        assert killed.returncode == -9, killed.stderr
    finished = run(SCRIPT, *flags)
    assert "resuming" in finished.stderr
    assert_same_bits(tmp_path, undisturbed)


def test_killed_between_temporary_file_and_rename(tmp_path, pretraining_flags, undisturbed):
    flags = (*pretraining_flags, "--output_dir", tmp_path, "--save_ckpt_steps", "2")
    killed = run(KILLED, "rename", "2", "--", *flags, check=False)
    assert killed.returncode == -9, killed.stderr
    run(SCRIPT, *flags)
    assert_same_bits(tmp_path, undisturbed)
    assert sorted(path.name for path in tmp_path.glob("*.pth*")) == ["checkpoint-2.pth", "checkpoint-last.pth"]


def test_killed_after_a_log_line_and_in_an_evaluation(tmp_path, pretraining_flags, undisturbed, images):
    # Breaks if an epoch is logged twice, or an evaluation leaves a trace in what follows.
    flags = (*pretraining_flags, "--output_dir", tmp_path, "--save_ckpt_steps", "4", "--eval_data_path", images)
    for moment, when in (("log", "1"), ("evaluation", "1"), ("log", "2")):
        killed = run(KILLED, moment, when, "--", *flags, check=False)
        assert killed.returncode == -9, killed.stderr
    run(SCRIPT, *flags, "--num_workers", "2")  # another number than before
    assert_same_bits(tmp_path, undisturbed)
    assert [entry["epoch"] for entry in log_of(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_sigterm_saves_exits_and_goes_on(tmp_path, pretraining_flags, undisturbed, workers):
    flags = (*pretraining_flags, "--output_dir", tmp_path, "--num_workers", workers)
    stopped = run(KILLED, "term", "7", "--", *flags, check=False)
    assert stopped.returncode == 143
    assert "stopped at epoch 1, step 3; the same command resumes from there" in stopped.stderr
    run(SCRIPT, *flags)
    assert_same_bits(tmp_path, undisturbed)


LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port"),
    "torch.distributed.launch": ("-m", "torch.distributed.launch", "--nproc_per_node=2", "--master_port"),
}
OFFICIAL_22K = (
    *("--num_mask_patches", "75", "--model", "beit_base_patch16_224_8k_vocab", "--batch_size", "128", "--lr", "1.5e-3"),
    *("--warmup_steps", "10000", "--epochs", "150", "--clip_grad", "3.0", "--drop_path", "0.1"),
    *("--layer_scale_init_value", "0.1"),
)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_official_command_made_small_under_two_processes(tmp_path, images, tokenizer, launcher, free_port):
    small = (*SMALL_MODEL, "--batch_size", "4", "--epochs", "1", "--warmup_steps", "2", "--num_workers", "1")
    done = run(
        *(*LAUNCHERS[launcher], free_port, SCRIPT, "--data_path", images, "--output_dir", tmp_path),
        *(*OFFICIAL_22K, "--discrete_vae_weight_path", tokenizer, *small, "--eval_data_path", images),
    )
    (entry,) = log_of(tmp_path)
    assert 0 < entry["test_mlm_acc"] < 1
    assert "batch 8 = 4 images x 2 processes" in done.stderr


def test_two_processes_see_the_same_global_batches_as_one(tmp_path, pretraining_flags, free_port):
    # Masks of one patch each have equal counts, so the mean over ranks is the mean over the batch.
    flags = (*pretraining_flags, "--drop_path", "0", "--num_mask_patches", "1", "--min_mask_patches_per_block", "1")
    run(SCRIPT, *flags, "--output_dir", tmp_path / "one", "--log_dir", tmp_path / "one" / "tb", "--log_every", "1")
    run(
        *(*LAUNCHERS["torchrun"], free_port, SCRIPT, *flags, "--batch_size", "4", "--log_every", "1"),
        *("--output_dir", tmp_path / "two", "--log_dir", tmp_path / "two" / "tb"),
    )
    one, two = losses(tmp_path / "one" / "tb"), losses(tmp_path / "two" / "tb")
    assert len(one) == STEPS
    assert one == pytest.approx(two, rel=1e-5)  # another order of float32 sums; another batch differs by percents


def losses(folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars("loss/loss")]


def test_held_out_accuracy_is_reported_alike_for_one_and_two_processes(tmp_path, pretraining_flags, images, free_port):
    # 40 images on 2 processes of batch 3 do not come out even: each must still count once.
    flags = (*pretraining_flags, "--epochs", "1", "--lr", "0", "--min_lr", "0", "--eval_data_path", images)
    run(SCRIPT, *flags, "--output_dir", tmp_path / "one")
    run(*LAUNCHERS["torchrun"], free_port, SCRIPT, *flags, "--output_dir", tmp_path / "two", "--batch_size", "3")
    (one,), (two,) = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for name in ("test_loss", "test_mlm_acc", "test_most_frequent_acc"):
        assert one[name] == pytest.approx(two[name], rel=1e-5)  # an image more or less is 2 %


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, pretraining_flags):
    from beit.training.checkpoint import RunFolder

    folder = RunFolder(tmp_path)
    done = run(SCRIPT, *pretraining_flags, "--output_dir", tmp_path, check=False)
    folder.close()
    assert done.returncode == 2
    assert re.search(r"^error: --output_dir \S+ is in use by process \d+ on ", done.stderr, re.MULTILINE)


def test_going_on_from_another_run_s_weights(tmp_path, pretraining_flags, undisturbed):
    checkpoint = undisturbed / "checkpoint-2.pth"
    flags = (*pretraining_flags, "--lr", "0", "--min_lr", "0", "--epochs", "1", "--output_dir", tmp_path)
    done = run(SCRIPT, *flags, "--init_from", checkpoint)
    assert "39 tensors loaded from" in done.stderr
    ours = torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)["model"]
    assert all(torch.equal(tensor, ours[name]) for name, tensor in final_checkpoint(undisturbed)["model"].items())


def test_the_cpu_takes_over_where_there_is_no_gpu(tmp_path, pretraining_flags):
    flags = [flag for flag in pretraining_flags if flag not in ("--device", "cpu")]
    done = run(SCRIPT, *flags, "--epochs", "1", "--output_dir", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.stderr.count("no CUDA device here, computing on the CPU") == 1


def test_a_mistake_is_one_line_from_two_processes_too(tmp_path, pretraining_flags, free_port):
    flags = (*pretraining_flags, "--output_dir", tmp_path, "--data_path", tmp_path / "nowhere")
    done = run(*LAUNCHERS["torchrun"], free_port, SCRIPT, *flags, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: ") - done.stderr.count("exitcode") <= 2
    assert len(re.findall(r"^error: .*nowhere", done.stderr, re.MULTILINE)) == 1
