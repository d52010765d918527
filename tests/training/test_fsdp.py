"""Training with weights, gradients and optimizer state split over two processes equals training without."""

import json
import socket

import pytest
import torch

from beit.errors import InputError
from beit.storage import load_checkpoint
from beit.training import distributed
from beit.training.checkpoint import RunFolder
from tests.shell import run
from tests.training.sharded_runs import CASES, EPOCHS, LR, go_on, make_trainer

pytestmark = pytest.mark.slow
LAST_EPOCH = f"checkpoint-{EPOCHS - 1}.pth"


def alone(sharded, folder, monkeypatch, resumed=None, **options):
    """Runs in this process, without any other."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    run_folder = RunFolder(folder)
    try:
        trainer = make_trainer(sharded, run_folder, **options)
        go_on(trainer, resumed or folder) if resumed else trainer.fit()
    finally:
        run_folder.close()
        distributed.disconnect()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs of two processes, after those that they go on with."""
    folder = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as monkeypatch:
        alone(True, folder / "one", monkeypatch, epochs=2)
        alone(False, folder / "plain", monkeypatch, epochs=2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", port)
    run(*torchrun, "tests/training/sharded_runs.py", folder)
    return folder


def log_of(folder):
    timing = ("images_per_second", "data_wait")
    entries = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key not in timing} for entry in entries]


def assert_same_run(folder, reference, name=LAST_EPOCH, tolerance=1e-6):
    """Compares weights and logs of two runs whose gradients are summed in another order.

    Adam divides each gradient by its own size, so a weight whose gradient is mostly rounding error (relative size r)
    differs by r * lr a step, whatever the format's epsilon. State at the wrong parameter shows as a difference of the
    size of lr. A hundredth of lr is therefore far from both.
    """
    ours, theirs = load_checkpoint(folder / name), load_checkpoint(reference / name)
    for key in ("model", "model_ema"):
        torch.testing.assert_close(ours[key], theirs[key], atol=max(tolerance, LR / 100), rtol=1e-4)
    for entry, expected in zip(log_of(folder), log_of(reference), strict=True):
        assert entry == pytest.approx(expected, rel=1e-4, abs=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_it_equals_ddp_in_losses_norms_weights_averages_and_scores(runs, name):
    # Breaks if gradients are summed instead of averaged, exchanged before the last batch, clipped by the norm of a
    # part, if a parameter outside the blocks is forgotten, or if an evaluation waits for a process without images.
    last = f"checkpoint-{CASES[name].get('epochs', EPOCHS) - 1}.pth"
    tolerance = 1e-6 if CASES[name].get("dtype", torch.float32) == torch.float32 else 1e-3
    assert_same_run(runs / f"{name}-fsdp", runs / f"{name}-ddp", last, tolerance)
    start = make_trainer(False, None).model.state_dict()
    assert all(not torch.equal(t, start[n]) for n, t in load_checkpoint(runs / f"{name}-fsdp" / last)["model"].items())


def test_an_overflow_on_one_process_is_skipped_by_both(runs):
    skipped = [log_of(runs / f"overflow-{kind}")[-1]["skipped_steps"] for kind in ("ddp", "fsdp")]
    assert skipped[0] == skipped[1] >= 1


def test_each_process_holds_about_half(runs):
    held = [load_checkpoint(runs / "adamw-fsdp" / f"held-by-{rank}.pth") for rank in (0, 1)]
    whole = load_checkpoint(runs / "adamw-ddp" / "held-by-0.pth")["held"]
    assert held[0]["held"] + held[1]["held"] == held[0]["whole"] == whole
    assert abs(held[0]["held"] - held[1]["held"]) < 0.1 * whole


@pytest.mark.parametrize("name", ["one", "plain"])
def test_two_processes_go_on_with_what_one_has_left(runs, name):
    # From pieces of one process, and from a plain checkpoint. Breaks if the optimizer's state goes to other parameters.
    assert_same_run(runs / name, runs / "adamw-ddp")


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "plain"])
def test_one_process_goes_on_with_what_two_have_left(runs, tmp_path, monkeypatch, sharded):
    alone(sharded, tmp_path, monkeypatch, resumed=runs / "two")
    (tmp_path / "log.txt").write_text((runs / "two" / "log.txt").read_text() + (tmp_path / "log.txt").read_text())
    assert_same_run(tmp_path, runs / "adamw-ddp")
    if not sharded:
        ours, theirs = (load_checkpoint(path / LAST_EPOCH)["optimizer"] for path in (tmp_path, runs / "adamw-ddp"))
        torch.testing.assert_close(ours["state"], theirs["state"], atol=1e-6, rtol=1e-4)


def test_what_cannot_be_resumed_is_said_in_one_line(runs, monkeypatch):
    trainer = make_trainer(False, None)
    best = load_checkpoint(runs / "two" / "checkpoint-best.pth")
    with pytest.raises(InputError, match="holds no training state"):
        trainer.resume(best, str(runs / "two" / "checkpoint-best.pth"))
    last = load_checkpoint(runs / "two" / "checkpoint-1.pth")
    with pytest.raises(InputError, match=r"needs the folder .*elsewhere/checkpoint-1, which is missing"):
        trainer.resume(last, str(runs / "elsewhere" / "checkpoint-1.pth"))
    with pytest.raises(InputError, match=r"AdamW.*SGD"):
        make_trainer(False, None, opt="sgd").resume(last, str(runs / "two" / "checkpoint-1.pth"))
