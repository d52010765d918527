"""A process's place in a run, from the environment of its launcher (read only here); imports no torch."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from beit.errors import InputError

HIGHEST_PORT = 65535
PATIENCE = 30.0  # minutes that processes wait for one another, if nothing else is said


@dataclass(frozen=True)
class Placement:
    """Where a process stands among the processes of a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # number of the process on its machine, and of its GPU
    init_method: str = "env://"  # where the processes meet; else tcp://host:port
    bound: bool = False  # a scheduler started it, which may show each process only its own GPU


def find_placement(
    env: Mapping[str, str] = os.environ,
    *,
    local_rank: int = -1,
    init_method: str = "env://",
    use_open_mpi: bool = False,
) -> Placement:
    """Reads this process's place from the environment; without a launcher's variables the run has one process.

    torchrun and ``torch.distributed.launch`` set RANK, ``srun`` SLURM_PROCID, ``mpirun`` OMPI_COMM_WORLD_RANK.

    ``local_rank`` is what old launchers pass, LOCAL_RANK wins; ``init_method`` is the ``--dist_url``. With
    ``use_open_mpi`` Open MPI's variables are read (``--dist_on_itp``).

    Raises:
        InputError: A variable that the launcher should have set is missing, or is not what it should be.
    """
    try:
        if use_open_mpi:
            return _open_mpi_placement(env)
        if "RANK" in env and "WORLD_SIZE" in env:
            size = _number(env, "WORLD_SIZE", least=1)
            if size > 1 and init_method == "env://":
                _ = env["MASTER_ADDR"], _number(env, "MASTER_PORT", most=HIGHEST_PORT)
            local = _number(env, "LOCAL_RANK", max(local_rank, 0))
            return Placement(_number(env, "RANK", most=size - 1), size, local, init_method)
        # SLURM_STEP_NUM_TASKS is there under srun only, so `python run_….py` inside an allocation stays one process.
        if _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
            return _slurm_placement(env)
        if max(_number(env, "WORLD_SIZE", 1), 1 + _number(env, "RANK", 0)) > 1:
            raise KeyError("RANK" if "WORLD_SIZE" in env else "WORLD_SIZE")
    except KeyError as missing:
        hint = "start the run with torchrun instead, or unset RANK and WORLD_SIZE for a single process"
        raise InputError(f"the launcher did not set {missing.args[0]}; {hint}") from None
    return Placement()


def _number(env: Mapping[str, str], name: str, default: int | None = None, least: int = 0, most: int = 2**31) -> int:
    text = env[name] if default is None else env.get(name) or str(default)
    number = int(text) if text.isdecimal() and len(text) < 20 else -1
    if not least <= number <= most:
        where = "in the environment: unset it, or start the run with torchrun"
        raise InputError(f"{name}={text!r}, no whole number from {least} to {most}, {where}")
    return number


def _open_mpi_placement(env: Mapping[str, str]) -> Placement:
    rank, size, local_rank = (_number(env, f"OMPI_COMM_WORLD_{name}") for name in ("RANK", "SIZE", "LOCAL_RANK"))
    port = _number(env, "MASTER_PORT", most=HIGHEST_PORT)
    return Placement(rank, size, local_rank, f"tcp://{env['MASTER_ADDR']}:{port}", bound=True)


def _slurm_placement(env: Mapping[str, str]) -> Placement:
    host = env.get("MASTER_ADDR") or first_slurm_host(env["SLURM_STEP_NODELIST"])
    own = 20000 + _number(env, "SLURM_JOB_ID", 0) % 20000  # the same on all ranks, another for another job
    port = _number(env, "MASTER_PORT", own, most=HIGHEST_PORT)
    rank, size, local_rank = (_number(env, f"SLURM_{name}") for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID"))
    return Placement(rank, size, local_rank, f"tcp://{host}:{port}", bound=True)


def leads(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first of its run, by whatever a launcher has set; before any flag is read."""
    open_mpi = ("OMPI_COMM_WORLD_RANK",) if "MASTER_ADDR" in env else ()  # else its processes are runs of their own
    ranks = (env.get(name, "") for name in ("RANK", *open_mpi, "SLURM_PROCID"))
    return next((not rank.lstrip("0") for rank in ranks if rank.isdecimal()), True)


def first_slurm_host(node_list: str) -> str:
    """Returns the first machine of a SLURM list such as ``gpu[03-07,11],login1``."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", node_list)
    if match is None:
        raise InputError(f"SLURM_STEP_NODELIST={node_list!r} names no machine; set MASTER_ADDR")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + (suffix or "")


def may_follow_another(env: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or SLURM may have restarted this run, so that its old lock may be released a little later."""
    counts = (env.get(name, "") for name in ("TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT"))
    return any(count.lstrip("0").isdecimal() for count in counts)


def name_local_rank(local_rank: int) -> None:
    """Sets LOCAL_RANK where no launcher has, for libraries that read it."""
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
