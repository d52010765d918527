"""A process's place in a run, from the environment of its launcher (read only here); imports no torch."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from beit.errors import InputError

PATIENCE = 30.0  # minutes that processes wait for one another, if nothing else is said


@dataclass(frozen=True)
class Placement:
    """Where a process stands among the processes of a run.

    Args:
        rank: Number of the process among all.
        world_size: Number of processes.
        local_rank: Number of the process on its machine, and of its GPU.
        init_method: Where the processes meet: ``env://`` or ``tcp://host:port``.
        bound: Whether a scheduler started it, which may show each process only its own GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    init_method: str = "env://"
    bound: bool = False


def find_placement(
    environment: Mapping[str, str] | None = None,
    *,
    local_rank: int = -1,
    init_method: str = "env://",
    use_open_mpi: bool = False,
) -> Placement:
    """Reads this process's place from the environment; without a launcher's variables the run has one process.

    torchrun and ``torch.distributed.launch`` set RANK, ``srun`` SLURM_PROCID, ``mpirun`` OMPI_COMM_WORLD_RANK.

    Args:
        environment: The environment variables; the process's own by default.
        local_rank: The ``--local_rank`` that old launchers pass; LOCAL_RANK wins.
        init_method: The ``--dist_url``.
        use_open_mpi: Whether to read Open MPI's variables (``--dist_on_itp``).

    Raises:
        InputError: A variable that the launcher should have set is missing.
    """
    env = os.environ if environment is None else environment
    try:
        if use_open_mpi:
            return _open_mpi_placement(env)
        if "RANK" in env and "WORLD_SIZE" in env:
            local = int(env.get("LOCAL_RANK", max(local_rank, 0)))
            if int(env["WORLD_SIZE"]) > 1 and init_method == "env://":
                _ = env["MASTER_ADDR"], env["MASTER_PORT"]
            return Placement(int(env["RANK"]), int(env["WORLD_SIZE"]), local, init_method)
        # SLURM_STEP_NUM_TASKS is there under srun only, so `python run_….py` inside an allocation stays one process.
        if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            return _slurm_placement(env)
    except KeyError as missing:
        raise InputError(f"the launcher did not set {missing.args[0]}; start the run with torchrun instead") from None
    return Placement()


def _open_mpi_placement(env: Mapping[str, str]) -> Placement:
    rank, size, local_rank = (int(env[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE", "LOCAL_RANK"))
    return Placement(rank, size, local_rank, f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}", bound=True)


def _slurm_placement(env: Mapping[str, str]) -> Placement:
    host = env.get("MASTER_ADDR") or first_slurm_host(env["SLURM_STEP_NODELIST"])
    job = env.get("SLURM_JOB_ID", "0")
    port = env.get("MASTER_PORT") or str(20000 + int(job) % 20000)  # the same on all ranks, another for another job
    rank, size, local_rank = (int(env[f"SLURM_{name}"]) for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID"))
    return Placement(rank, size, local_rank, f"tcp://{host}:{port}", bound=True)


def first_slurm_host(node_list: str) -> str:
    """Returns the first machine of a SLURM list such as ``gpu[03-07,11],login1``."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", node_list)
    if match is None:
        raise InputError(f"SLURM_STEP_NODELIST={node_list!r} names no machine; set MASTER_ADDR")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + (suffix or "")


def may_follow_another(environment: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun or SLURM may have restarted this run, so that its old lock may be released a little later."""
    env = os.environ if environment is None else environment
    return any(int(env.get(name) or 0) > 0 for name in ("TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT"))


def name_local_rank(local_rank: int) -> None:
    """Sets LOCAL_RANK where no launcher has, for libraries that read it."""
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
