"""Sharded checkpoints: a folder to which every process writes its part of the tensors, read by any number of them.

The format is that of ``torch.distributed.checkpoint``: ``.metadata`` maps parts of tensors to files
``__<process>_<n>.distcp``. Tensors are named ``model.<name>``, ``model_ema.<name>`` and ``optimizer.<index>.<key>``;
everything else in a checkpoint is in ``state.pth``. ``.metadata`` is a pickle, opened with an allow-list.
"""

import contextlib
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from beit.errors import InputError
from beit.storage import Checkpoint, load_checkpoint, sync_folder

INDEX_FILE = ".metadata"
STATE_FILE = "state.pth"
WEIGHTS = ("model", "model_ema")
OPTIMIZER = "optimizer"
# What the index may contain besides dtypes: descriptions of tensors and files. BytesStorageMetadata, which describes
# other objects, is left out: they are pickles, which torch opens without any check.
_DCP = "torch.distributed.checkpoint"
ALLOWED_GLOBALS = {
    "torch.Size",
    "torch.serialization._get_layout",
    f"{_DCP}.filesystem._StorageInfo",
    *(f"{_DCP}.metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *(f"{_DCP}.metadata.{name}" for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
}

Room = Callable[[str, torch.Size, torch.dtype], Tensor]  # allocates a tensor, given its name, size and dtype


def write_pieces(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors to a folder that all processes see; all call it, and it is complete when all have returned.

    Every process writes its parts of a ``DTensor``, one writes a plain tensor. Raises :class:`InputError` if it cannot.
    """
    with _in_one_line("written", folder):
        dcp.save(dict(tensors), storage_writer=_Writer(folder))
    sync_folder(folder)


def read_pieces(folder: Path, room: Room | None = None, prefix: str = "") -> dict[str, Tensor]:
    """Reads tensors; if there are several processes, all of them call it.

    Args:
        folder: The checkpoint's folder.
        room: Allocates what a tensor is read into, such as a ``DTensor``; by default tensors are read whole to the CPU.
        prefix: Read only names that begin with this prefix.

    Raises:
        InputError: There is no such checkpoint, a file is missing or damaged, or the index would run code.
    """
    reader = _Reader(folder)
    described = reader.read_metadata().state_dict_metadata
    allocate = room or (lambda _name, size, dtype: torch.empty(size, dtype=dtype))
    try:
        tensors = {
            name: allocate(name, entry.size, entry.properties.dtype)
            for name, entry in described.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
    except (RuntimeError, TypeError, ValueError, AttributeError, MemoryError) as error:
        raise InputError(f"{folder} describes tensors that cannot be ({error}): choose another checkpoint") from error
    with _in_one_line("read", folder):
        dcp.load(tensors, storage_reader=reader)
    return tensors


def read_whole(folder: Path, optimizer: bool = True) -> Checkpoint:
    """Reads a sharded checkpoint as if it were a plain one, with the same keys; raises as :func:`read_pieces` does.

    Without ``optimizer`` its state, which is usually larger than the weights, is not read.
    """
    state, tensors = load_checkpoint(folder / STATE_FILE), read_pieces(folder, prefix="" if optimizer else WEIGHTS[0])
    for key in WEIGHTS:
        names = [name for name in tensors if name.startswith(f"{key}.")]
        if names:
            state[key] = {name.removeprefix(f"{key}."): tensors[name] for name in names}
    if optimizer:
        return {**state, OPTIMIZER: join_optimizer(tensors, state[OPTIMIZER])}
    return {key: value for key, value in state.items() if key != OPTIMIZER}


def read_optimizer(folder: Path, room: Room | None = None) -> Checkpoint:
    """Reads the optimizer's ``state_dict``; arguments as of :func:`read_pieces`."""
    rest = load_checkpoint(folder / STATE_FILE)[OPTIMIZER]
    return join_optimizer(read_pieces(folder, room, f"{OPTIMIZER}."), rest)


def split_optimizer(state: Checkpoint) -> tuple[dict[str, Tensor], Checkpoint]:
    """Splits an optimizer's ``state_dict`` into tensors by name and everything else."""
    tensors: dict[str, Tensor] = {}
    rest: dict[int, dict[str, object]] = {}
    for index, entry in state["state"].items():
        rest[index] = {key: value for key, value in entry.items() if not isinstance(value, Tensor)}
        tensors |= {f"{OPTIMIZER}.{index}.{key}": value for key, value in entry.items() if isinstance(value, Tensor)}
    return tensors, {"state": rest, "param_groups": state["param_groups"]}


def join_optimizer(tensors: Mapping[str, Tensor], rest: Checkpoint) -> Checkpoint:
    """Inverts :func:`split_optimizer`; tensors of other names are ignored."""
    joined = {index: dict(entry) for index, entry in rest["state"].items()}
    for name, tensor in tensors.items():
        if match := re.fullmatch(rf"{OPTIMIZER}\.(\d+)\.(.+)", name):
            joined.setdefault(int(match[1]), {})[match[2]] = tensor
    return {"state": joined, "param_groups": rest["param_groups"]}


@contextlib.contextmanager
def _in_one_line(done: str, folder: Path) -> Iterator[None]:
    """Turns an error on any process, which torch reports with a stack trace per process, into one line."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs no process group
            yield
    except CheckpointException as error:
        if any(isinstance(cause, KeyboardInterrupt) for cause, _ in error.failures.values()):
            raise KeyboardInterrupt from error
        rank, (cause, _) = next(iter(error.failures.items()))
        message = " ".join(str(cause).split())
        raise InputError(f"{folder} cannot be {done}: {message} (process {rank})") from error


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        # torch records the path itself, as an object that another version of Python may not know.
        return StorageMeta(checkpoint_id=Path(self.checkpoint_id).name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *_args: object, **_kwargs: object) -> Metadata:
        """Reads the index as torch does, restricted to the allow-list."""
        file = Path(self.path) / INDEX_FILE
        try:
            with open(file, "rb") as stream:
                index = _IndexUnpickler(stream).load()
        except FileNotFoundError as error:
            raise InputError(f"{file.parent} holds no checkpoint in pieces: {INDEX_FILE} is missing") from error
        except InputError as error:
            raise InputError(f"{file} was not opened: {error}") from error
        except Exception as error:  # a damaged pickle can raise anything
            raise InputError(f"{file} is damaged ({type(error).__name__}): choose another checkpoint") from error
        if not (
            isinstance(index, Metadata)
            and isinstance(index.state_dict_metadata, dict)
            and all(isinstance(name, str) for name in index.state_dict_metadata)
            and isinstance(index.storage_data, dict)
            and isinstance(index.storage_meta, StorageMeta | None)
        ):
            raise InputError(f"{file} is no index of a checkpoint in pieces: choose another checkpoint")
        if index.storage_meta is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or f"{module}.{name}" in ALLOWED_GLOBALS:
            return super().find_class(module, name)
        raise InputError(f"it asks to call {module}.{name}, and code inside checkpoints is never run")
