"""Agents of ``torchrun --nnodes 1:2``, each with one worker, and what their runs are held to."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.shell import ROOT, run

MOST_SECONDS = 200  # that anything is waited for
LAST_EPOCH = 3
BATCH = ("--total_batch_size", "8", "--batch_size", "4", "--epochs", "4", "--save_ckpt_steps", "2")
# Exactly as many masked patches in every image: then the mean over processes is the mean over the batch, and how the
# batch is shared out changes nothing. Stochastic depth is drawn by each process for itself.
COMPARABLE = ("--mask_strategy", "random", "--drop_path", "0")
# A machine counts as lost after 3 seconds and not 15; the others wait 6 seconds for more to come and not 30.
IMPATIENT = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=6"


class Agents:
    """Starts agents of one run and ends those that are left.

    Args:
        endpoint: Where the agents meet: ADDRESS:PORT. The first agent listens there.
        flags: The flags of the run.
        log_folder: Where each agent's output goes.
    """

    def __init__(self, endpoint: str, flags: Sequence[str | Path], log_folder: Path) -> None:
        self._endpoint, self._flags, self._folder = endpoint, flags, log_folder
        self._started: list[subprocess.Popen] = []

    def start(self, name: str, *prefix: str, options: Sequence[str] = (), **environment: str) -> subprocess.Popen:
        """Starts an agent.

        Args:
            name: Of its log.
            *prefix: A command that runs commands.
            options: More flags of torchrun.
            **environment: More variables.
        """
        hosts = "true" if not self._started else "false"
        torchrun = ("-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3")
        meeting = (
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self._endpoint}",
            f"--rdzv-conf={IMPATIENT},is_host={hosts}",
        )
        command = [*prefix, sys.executable, *torchrun, *meeting, *options, "tests/integration/elastic_run.py"]
        # Else an agent that comes later looks in vain for the address where the first one's workers meet (torch 2.15).
        apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        env = {**os.environ, **apart, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        with (self._folder / f"{name}.log").open("w") as log:
            agent = subprocess.Popen([*command, *map(str, self._flags)], cwd=ROOT, env=env, stdout=log, stderr=log)
        self._started.append(agent)
        return agent

    def log(self, name: str) -> str:
        """Returns what an agent and its workers have said."""
        return (self._folder / f"{name}.log").read_text()

    def end(self) -> None:
        """Ends what is left; an agent takes its workers with it."""
        for agent in self._started:
            if agent.poll() is None:
                agent.send_signal(signal.SIGTERM)
        for agent in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.wait(40)
            agent.kill()


@contextlib.contextmanager
def agents_of(endpoint: str, flags: Sequence[str | Path], log_folder: Path) -> Iterator[Agents]:
    agents = Agents(endpoint, flags, log_folder)
    try:
        yield agents
    finally:
        agents.end()


def assert_same_curve(folder: Path, reference: Path) -> None:
    """Holds losses, gradients and final weights to those of another run, but for the order of additions.

    Adam moves a weight whose gradient is mostly rounding error by a share of lr a step; other batches, or state at the
    wrong parameter, move it by several lr. A tenth of lr (5e-4) is far from both.
    """
    ours, theirs = (
        [json.loads(line) for line in (path / "log.txt").read_text().splitlines()] for path in (folder, reference)
    )
    assert [entry["epoch"] for entry in ours] == list(range(LAST_EPOCH + 1))
    for name in ("train_loss", "train_mlm_acc", "train_grad_norm", "train_lr"):
        assert [entry[name] for entry in ours] == pytest.approx([entry[name] for entry in theirs], rel=1e-4)
    weights, expected = (
        torch.load(path / f"checkpoint-{LAST_EPOCH}.pth", weights_only=True)["model"] for path in (folder, reference)
    )
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=5e-5, msg=name)


def undisturbed_run(folder: Path, flags: Sequence[str | Path]) -> Path:
    """Trains with the same flags in one process that nothing happens to."""
    run("run_beit_pretraining.py", *flags, "--output_dir", folder)
    return folder
