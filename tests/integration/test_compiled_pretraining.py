"""run_beit_pretraining.py with model and tokenizer compiled, by a real compiler."""

import json
from pathlib import Path

import pytest

from tests.commands import run

pytestmark = pytest.mark.slow

SCRIPT = "run_beit_pretraining.py"


def loss_of(folder: Path) -> float:
    (line,) = (folder / "log.txt").read_text().splitlines()
    return json.loads(line)["train_loss"]


@pytest.mark.timeout(600)
def test_a_compiled_run_learns_as_a_plain_one(tmp_path, pretraining_flags):
    # Without stochastic depth, whose random numbers are drawn in another order. Breaks if padding counts in the loss.
    flags = (*pretraining_flags, "--epochs", "1", "--drop_path", "0")
    run(SCRIPT, *flags, "--output_dir", tmp_path / "plain")
    run(SCRIPT, *flags, "--output_dir", tmp_path / "compiled", "--compile", "--tokenizer_compile", timeout=500)
    assert loss_of(tmp_path / "compiled") == pytest.approx(loss_of(tmp_path / "plain"), rel=1e-4)
