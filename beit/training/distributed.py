"""One process or many: who am I, how do we meet, and the few collectives that the library needs.

Only this module reads the environment of launchers (torchrun, ``torch.distributed.launch``, SLURM, Open MPI).
"""

import datetime
import importlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from beit.errors import InputError

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 30.0  # minutes that processes wait for one another, if nothing else is said


@dataclass(frozen=True)
class Placement:
    """Where a process stands among the processes of a run.

    Args:
        rank: Number of the process among all.
        world_size: How many processes there are.
        local_rank: Number of the process on its machine, which is also the GPU it uses.
        init_method: Where the processes meet: ``env://`` or ``tcp://host:port``.
        bound: Whether a scheduler started it, which may show each process its own GPU alone.
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
    """Reads from the environment who this process is.

    torchrun and ``torch.distributed.launch`` set RANK, ``srun`` sets SLURM_PROCID, ``mpirun`` (asked for with
    ``--dist_on_itp``) OMPI_COMM_WORLD_RANK. Without any of these the run has one process.

    Args:
        environment: The environment variables; the process's own by default.
        local_rank: The ``--local_rank`` that old launchers pass; LOCAL_RANK wins.
        init_method: The ``--dist_url``.
        use_open_mpi: Whether to read Open MPI's variables.

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
    meeting_point = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    return Placement(
        int(env["OMPI_COMM_WORLD_RANK"]),
        int(env["OMPI_COMM_WORLD_SIZE"]),
        int(env["OMPI_COMM_WORLD_LOCAL_RANK"]),
        meeting_point,
        bound=True,
    )


def _slurm_placement(env: Mapping[str, str]) -> Placement:
    host = env.get("MASTER_ADDR") or first_slurm_host(env["SLURM_STEP_NODELIST"])
    job = env.get("SLURM_JOB_ID", "0")
    port = env.get("MASTER_PORT") or str(20000 + int(job) % 20000)  # the same on all ranks, another for another job
    return Placement(
        int(env["SLURM_PROCID"]),
        int(env["SLURM_STEP_NUM_TASKS"]),
        int(env["SLURM_LOCALID"]),
        f"tcp://{host}:{port}",
        bound=True,
    )


def first_slurm_host(node_list: str) -> str:
    """Returns the first machine of a SLURM list such as ``gpu[03-07,11],login1``."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", node_list)
    if match is None:
        raise InputError(f"SLURM_STEP_NODELIST={node_list!r} names no machine; set MASTER_ADDR")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + (suffix or "")


def select_device(name: str, local_rank: int, bound: bool = False) -> torch.device:
    """Returns the device a process computes on; a missing accelerator is said in one line and the CPU used.

    Args:
        name: ``cuda``, ``cpu`` or ``mps``.
        local_rank: Number of the process on its machine.
        bound: Whether a scheduler may show each process only the GPU that is meant for it.

    Raises:
        InputError: More processes than GPUs on this machine.
    """
    if name.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("--device %s: no CUDA device here, computing on the CPU", name)
        return torch.device("cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        logger.warning("--device mps: not available here, computing on the CPU")
        return torch.device("cpu")
    if name != "cuda":
        try:
            chosen = torch.device(name)
        except RuntimeError as error:
            raise InputError(f"--device {name}: use cuda, cpu or mps") from error
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)  # what asks for the current device is to find this one
        return chosen
    if bound and torch.cuda.device_count() == 1:
        local_rank = 0  # the scheduler shows each process its own GPU
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} found; "
            "lower --nproc_per_node"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def may_follow_another(environment: Mapping[str, str] | None = None) -> bool:
    """Whether a launcher may have started this run again: torchrun with ``--max-restarts``, SLURM after a requeue.

    What the run before it held, such as the lock of its folder, may then be let go a little later.
    """
    env = os.environ if environment is None else environment
    return any(int(env.get(name) or 0) > 0 for name in ("TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT"))


def connect(placement: Placement, device: torch.device, patience: float = PATIENCE) -> None:
    """Joins the process group: NCCL between GPUs, gloo between CPUs; nothing for a single process.

    Args:
        placement: Where this process stands.
        device: Where it computes.
        patience: Minutes that it waits for the others, here and in every collective, before it gives up.
    """
    if placement.world_size == 1:
        return
    _join(
        device,
        init_method=placement.init_method,
        rank=placement.rank,
        world_size=placement.world_size,
        timeout=datetime.timedelta(minutes=patience),
        device_id=device if device.type == "cuda" else None,
    )


def connect_alone(device: torch.device) -> None:
    """Makes a process group of one where there is none, for libraries that cannot do without."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
        _join(device, store=dist.HashStore(), rank=0, world_size=1)


def _join(device: torch.device, **arguments: Any) -> None:
    # Imported now, not by DistributedDataParallel later: the default arguments of its functions are the process group
    # that there is at that moment. They would keep it after :func:`disconnect`, and a thread of gloo that outlives the
    # interpreter aborts the process.
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **arguments)


def is_loss_of_another(error: RuntimeError) -> bool:
    """Whether an error says that another process ended, or cannot be reached, or did not answer in time."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def barrier() -> None:
    """Waits until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def disconnect() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def threads_left() -> bool:
    """Whether threads of gloo are still there, as they are where something keeps a process group that was left."""
    if dist.is_initialized() or not os.path.isdir("/proc/self/task"):
        return False
    return any("gloo" in _text(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task"))


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:  # the thread has ended
        return ""


def rank() -> int:
    """Returns this process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes the files and the log."""
    return rank() == 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Adds up a tensor over all processes, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_equal(value: object) -> bool:
    """Whether every process has the same value of something."""
    if not dist.is_initialized():
        return True
    values: list[object] = [None] * world_size()
    dist.all_gather_object(values, value)
    return all(other == value for other in values)


def on_main(action: Callable[[], T]) -> T:
    """Runs an action on the main process and gives its result to all; its :class:`InputError` is raised on all.

    So a mistake that only the main process can see (a folder that is not writable) ends every process at once.
    """
    if not dist.is_initialized():
        return action()
    outcome: list[object] = [None, None]
    if is_main():
        try:
            outcome[0] = action()
        except InputError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise InputError(str(outcome[1]))
    return outcome[0]  # type: ignore[return-value]
