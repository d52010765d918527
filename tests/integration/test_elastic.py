"""``torchrun --nnodes 1:2``: two agents on this machine, one of which is lost in the middle of the run."""

import pytest

from tests.integration.agents import BATCH, COMPARABLE, MOST_SECONDS, agents_of, assert_same_curve, undisturbed_run

pytestmark = pytest.mark.slow


def test_a_run_that_loses_an_agent_goes_on_with_the_other_and_the_same_losses(tmp_path, pretraining_flags, free_port):
    # Breaks if the restarted process finds its own folder locked, begins anew, or sees other batches than two did.
    flags = (*pretraining_flags, *BATCH, *COMPARABLE)
    with agents_of(f"127.0.0.1:{free_port}", (*flags, "--output_dir", tmp_path / "run"), tmp_path) as agents:
        survivor, victim = agents.start("survivor"), agents.start("victim", DIES_AT="7")
        assert victim.wait(MOST_SECONDS) == -9
        reference = undisturbed_run(tmp_path / "undisturbed", flags)
        assert survivor.wait(MOST_SECONDS) == 0, agents.log("survivor")
    said = agents.log("survivor") + agents.log("victim")
    assert "batch 8 = 4 images x 2 processes x 1 batch per step" in said
    assert "batch 8 = 4 images x 1 process x 2 batches per step" in said
    assert "error: another process ended or cannot be reached" in said
    assert "checkpoint-last.pth at epoch 1, step 1" in said  # 6 steps are done, 5 are an epoch
    assert_same_curve(tmp_path / "run", reference)
