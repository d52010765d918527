"""Checkpoints in pieces: a folder into which each process writes its part of the tensors, for any number to read.

The format is that of ``torch.distributed.checkpoint``: ``.metadata`` says which part of which tensor is where in
``__<process>_<n>.distcp``. It holds tensors only, called ``model.<name>``, ``model_ema.<name>`` and
``optimizer.<index>.<key>``; everything else a checkpoint has is in ``state.pth``.

``.metadata`` is a pickle: it is opened only after all that it would build is found in a list.
"""

import contextlib
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from beit.errors import InputError
from beit.storage import load_checkpoint, save_checkpoint, sync_folder

INDEX_FILE = ".metadata"
STATE_FILE = "state.pth"
WEIGHTS = ("model", "model_ema")
OPTIMIZER = "optimizer"
# What the index may build when it is opened, besides number formats: descriptions of tensors and of files. Not that of
# something else than a tensor (BytesStorageMetadata): in a piece that is a pickle, which torch opens without looking.
_DCP = "torch.distributed.checkpoint"
ALLOWED_GLOBALS = {
    "torch.Size",
    "torch.serialization._get_layout",
    f"{_DCP}.filesystem._StorageInfo",
    *(f"{_DCP}.metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *(f"{_DCP}.metadata.{name}" for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
}

Room = Callable[[str, torch.Size, torch.dtype], Tensor]  # for a tensor of that name, size and format


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes what a checkpoint holds besides tensors; one process does, before :func:`write_pieces`.

    Raises:
        InputError: The folder cannot be written.
    """
    save_checkpoint(folder / STATE_FILE, dict(state))


def write_pieces(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a checkpoint; all processes call it, each with its parts, and it is complete when all have returned.

    Args:
        folder: Seen by all processes.
        tensors: By name; a ``DTensor`` is written by the processes that hold its parts, another tensor once.

    Raises:
        InputError: The folder cannot be written.
    """
    with _in_one_line("written", folder):
        dcp.save(dict(tensors), storage_writer=_Writer(folder))
    sync_folder(folder)


def read_pieces(folder: Path, room: Room | None = None, prefix: str = "") -> dict[str, Tensor]:
    """Reads tensors of a checkpoint; with several processes all of them call it.

    Args:
        folder: The checkpoint's.
        room: Makes what a tensor is read into: a ``DTensor`` to get this process's part of it. By default a plain
            tensor on the CPU, for the whole.
        prefix: Read only names that begin so.

    Raises:
        InputError: There is no such checkpoint, a piece is missing or damaged, or its index would run code.
    """
    reader = _Reader(folder)
    described = reader.read_metadata().state_dict_metadata
    wanted = {
        name: entry
        for name, entry in described.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    try:
        tensors = {
            name: (room or _plain_room)(name, entry.size, entry.properties.dtype) for name, entry in wanted.items()
        }
    except (RuntimeError, TypeError, ValueError, AttributeError, MemoryError) as error:
        raise InputError(f"{folder} describes tensors that cannot be ({error}): choose another checkpoint") from error
    with _in_one_line("read", folder):
        dcp.load(tensors, storage_reader=reader)
    return tensors


def read_whole(folder: Path, optimizer: bool = True) -> dict[str, Any]:
    """Reads a checkpoint in pieces as if it had been written in one: all keys of a run's plain checkpoint.

    Args:
        folder: The checkpoint's.
        optimizer: Whether to read its state too, which is mostly larger than the weights.

    Raises:
        InputError: As of :func:`read_pieces`.
    """
    state, tensors = load_checkpoint(folder / STATE_FILE), read_pieces(folder, prefix="" if optimizer else WEIGHTS[0])
    for key in WEIGHTS:
        names = [name for name in tensors if name.startswith(f"{key}.")]
        if names:
            state[key] = {name.removeprefix(f"{key}."): tensors[name] for name in names}
    if optimizer:
        return {**state, OPTIMIZER: join_optimizer(tensors, state[OPTIMIZER])}
    return {key: value for key, value in state.items() if key != OPTIMIZER}


def read_optimizer(folder: Path, room: Room | None = None) -> dict[str, Any]:
    """Reads the ``state_dict`` of a checkpoint's optimizer; the arguments are those of :func:`read_pieces`."""
    rest = load_checkpoint(folder / STATE_FILE)[OPTIMIZER]
    return join_optimizer(read_pieces(folder, room, f"{OPTIMIZER}."), rest)


def split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of an optimizer's ``state_dict`` by name, and what is left of it without them."""
    tensors: dict[str, Tensor] = {}
    rest: dict[int, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        rest[index] = {key: value for key, value in entry.items() if not isinstance(value, Tensor)}
        tensors |= {f"{OPTIMIZER}.{index}.{key}": value for key, value in entry.items() if isinstance(value, Tensor)}
    return tensors, {"state": rest, "param_groups": state["param_groups"]}


def join_optimizer(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """Puts together what :func:`split_optimizer` took apart; tensors of other names are passed over."""
    joined = {index: dict(entry) for index, entry in rest["state"].items()}
    for name, tensor in tensors.items():
        if match := re.fullmatch(rf"{OPTIMIZER}\.(\d+)\.(.+)", name):
            joined.setdefault(int(match[1]), {})[match[2]] = tensor
    return {"state": joined, "param_groups": rest["param_groups"]}


def _plain_room(_name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype)


@contextlib.contextmanager
def _in_one_line(done: str, folder: Path) -> Iterator[None]:
    """Words what went wrong on any process, which torch reports to all with a stack of each."""
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
    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """Reads the index as torch does, and calls nothing in it that is not in the list."""
        file = Path(self.path) / INDEX_FILE
        try:
            with open(file, "rb") as stream:
                index = _IndexUnpickler(stream).load()
        except FileNotFoundError as error:
            raise InputError(f"{file.parent} holds no checkpoint in pieces: {INDEX_FILE} is missing") from error
        except InputError as error:
            raise InputError(f"{file} was not opened: {error}") from error
        except Exception as error:  # whatever the bytes of a damaged pickle lead to
            raise InputError(f"{file} is damaged ({type(error).__name__}): choose another checkpoint") from error
        if not _is_index(index):
            raise InputError(f"{file} is no index of a checkpoint in pieces: choose another checkpoint")
        if index.storage_meta is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in ALLOWED_GLOBALS or (module == "torch" and _is_number_format(name)):
            return super().find_class(module, name)
        raise InputError(f"it asks to call {module}.{name}, and code inside checkpoints is never run")


def _is_index(found: Any) -> bool:
    return (
        isinstance(found, Metadata)
        and isinstance(found.state_dict_metadata, dict)
        and all(isinstance(name, str) for name in found.state_dict_metadata)
        and isinstance(found.storage_data, dict)
        and isinstance(found.storage_meta, StorageMeta | None)
    )


def _is_number_format(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)
