"""One process or many: how they meet, the device of each, and the few collectives that the library needs."""

import contextlib
import datetime
import importlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from beit.errors import InputError
from beit.training.placement import PATIENCE, Placement, name_local_rank

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The last CUDA with code for V100s, and the last PyTorch that is built for it.
CUDA_12_6 = "'torch<2.15' torchvision --index-url https://download.pytorch.org/whl/cu126"


def select_device(name: str, local_rank: int, bound: bool = False) -> torch.device:
    """Returns the device of this process; without the accelerator asked for, the CPU, with a warning.

    ``bound`` is whether a scheduler may show each process only its own GPU.

    Raises:
        InputError: More processes than GPUs on this machine, or PyTorch has no code for them.
    """
    missing = name.startswith("cuda") and not torch.cuda.is_available()
    if missing or (name == "mps" and not torch.backends.mps.is_available()):
        logger.warning("--device %s: no %s device here, computing on the CPU", name, name.partition(":")[0].upper())
        return torch.device("cpu")
    if name != "cuda":
        if not re.fullmatch(r"(cuda|cpu|mps)(:\d{1,3})?", name) or (
            name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count()
        ):
            raise InputError(f"--device {name}: use cuda, cpu or mps; there are {torch.cuda.device_count()} GPUs here")
        return _made_current(torch.device(name))
    if bound and torch.cuda.device_count() == 1:
        local_rank = 0  # the scheduler shows each process its own GPU
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} found; "
            "lower --nproc_per_node"
        )
    return _made_current(torch.device("cuda", local_rank))


def _made_current(device: torch.device) -> torch.device:
    """Makes a GPU the one that is found by what asks for the current device; other devices are left as they are."""
    if device.type == "cuda":
        check_kernels(device)
        torch.cuda.set_device(device)
    return device


def check_kernels(device: torch.device) -> None:
    """Raises :class:`InputError` if this PyTorch was built without code for a GPU, as CUDA 13's is for V100s.

    A GPU runs machine code (``sm_70``) for its generation up to its own number, and compiles any older PTX
    (``compute_70``).
    """
    major, minor = torch.cuda.get_device_capability(device)
    built = re.findall(r"\b(sm|compute)_(\d+)(\d)", " ".join(torch.cuda.get_arch_list()))  # nothing for AMD's GPUs
    for kind, *numbers in built:
        there = tuple(map(int, numbers))
        if there <= (major, minor) and (kind == "compute" or there[0] == major):
            return
    if built:
        older = (major, minor) < (7, 5)  # V100, P100
        remedy = f"pip install {CUDA_12_6}" if older else "install a newer one from https://pytorch.org"
        name = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
        raise InputError(f"PyTorch {torch.__version__} was built without code for this {name}: {remedy}")


def connect(placement: Placement, device: torch.device, patience: float = PATIENCE) -> None:
    """Joins the process group: NCCL between GPUs, gloo between CPUs; nothing for a single process.

    ``patience`` is how many minutes to wait for the others, here and in every collective, before giving up.
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
        name_local_rank(device.index or 0)
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
    for name in () if dist.is_initialized() else Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # the thread has ended
            if "gloo" in name.read_text(encoding="utf-8"):
                return True
    return False


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
    """Runs an action on the main process and returns its result on all; an :class:`InputError` is raised on all."""
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
