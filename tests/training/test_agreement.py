"""Two processes end together, whichever of them met the trouble."""

import pytest

from beit.storage import load_checkpoint
from tests.shell import run

pytestmark = pytest.mark.slow


def outcomes(folder, kind, port):
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", port)
    run(*torchrun, "tests/training/two_processes.py", kind, folder)
    return [(folder / f"rank{rank}.txt").read_text() for rank in (0, 1)]


def test_a_loss_that_is_not_finite_on_one_process_ends_both_with_its_step(tmp_path, free_port):
    first, second = outcomes(tmp_path, "nan", free_port)
    assert first == second
    assert first.startswith("NonFiniteLossError: the loss is nan at step 7 ")


def test_sigterm_to_one_process_stops_both_at_the_same_step_with_a_checkpoint(tmp_path, free_port):
    # Breaks (by hanging) if a process stops on its own signal alone: the other would wait for its gradients. And if one
    # is gone before the other has written the checkpoint, which some launchers take as a reason to end that one too.
    # A thread of gloo that is left when the interpreter ends aborts the process, though rarely.
    first, second = outcomes(tmp_path, "term", free_port)
    stopped = "Stopped: stopped at epoch 0, step 11; the same command resumes from there"
    assert first == second == f"{stopped}; 1 checkpoints; 0 threads of gloo left"
    assert load_checkpoint(tmp_path / "run" / "checkpoint-last.pth")["progress"]["global_step"] == 11
