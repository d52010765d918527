"""The run folder: who may write into it, the checkpoints in it, and which one a run continues from."""

import contextlib
import errno
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from beit.errors import InputError, listed
from beit.storage import Checkpoint, atomic_write, differences, load_checkpoint, position_of, save_checkpoint

logger = logging.getLogger(__name__)

LAST = "checkpoint-last.pth"
BEST = "checkpoint-best.pth"
BEST_EMA = "checkpoint-best-ema.pth"  # the moving average of the weights, as its model
PIECES = "pieces"  # the key of a checkpoint that names the folder beside it, where its optimizer lies in pieces
DEEPSPEED = "deepspeed"  # the key that names the folder where DeepSpeed wrote it
TRAINING_STATE = {"optimizer", PIECES, DEEPSPEED}  # of these keys a checkpoint that can be resumed has one
_PIECES_INDEX = ".metadata"  # written last, see beit/checkpoints/pieces.py
_NUMBERED_FILE = re.compile(r"checkpoint-(\d+)\.pth")


def numbered_file(number: int) -> str:
    """Returns the name of a checkpoint that is kept: of an epoch, from 0, or after a number of optimizer steps."""
    return f"checkpoint-{number}.pth"


class RunFolder:
    """A folder that one run at a time writes its checkpoints and logs into. Files appear whole or not at all.

    ``checkpoint-<number>.pth`` counts epochs from 0 (or optimizer steps), of which the newest ``keep`` stay (0: all);
    ``checkpoint-last.pth`` is the rolling one. ``patience`` are seconds to wait for another run to leave the folder.

    Raises:
        InputError: The folder is not writable, or another run is writing into it.
    """

    def __init__(self, path: str | Path, keep: int = 0, patience: float = 0.0) -> None:
        self.path = Path(path)
        self.keep = keep
        self._records: dict[str, bytes] = {}
        self._take_lock(patience)

    def _take_lock(self, patience: float) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+")  # noqa: SIM115  (held open for as long as the run lives)
        except OSError as error:
            raise InputError(f"cannot write to --output_dir {self.path}: {error.strerror}") from error
        last, told = time.monotonic() + patience, False
        while not self._try_lock():
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            if time.monotonic() >= last:
                self._lock.close()
                raise InputError(
                    f"--output_dir {self.path} is in use by {owner}; wait for that run to end or choose another folder"
                )
            if not told:
                logger.info("%s is in use by %s, which should end: waiting up to %.0f s", self.path, owner, patience)
                told = True
            time.sleep(0.2)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def _try_lock(self) -> bool:
        """Whether the folder is ours now, or its file system knows no locks."""
        # A POSIX record lock dies with this very process. flock() would live on in data-loading workers that
        # outlast a killed parent by seconds, and a restart would find its own folder locked.
        try:
            import fcntl

            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            return True
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            # Such as Lustre, mounted without flock.
            logger.warning("%s: no locks there (%s), so nothing keeps a second run out", self.path, error.strerror)
        return True

    def close(self) -> None:
        """Lets another run use the folder."""
        self._lock.close()

    def ensure(self) -> None:
        """Makes a folder that was deleted or moved away anew; :class:`InputError` if another run is in it by now."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / ".lock")):
                return
        logger.warning("%s was deleted or moved away: creating it again; its earlier files are not restored", self.path)
        self._lock.close()
        self._take_lock(0.0)
        for name, content in self._records.items():
            self.record(name, content)

    def record(self, name: str, content: bytes) -> None:
        """Writes what describes the run; an older version that says something else is kept under another name."""
        self._records[name] = content
        path = self.path / name
        if path.is_file() and path.read_bytes() != content:
            path.rename(path.with_stem(f"{path.stem}-until-{datetime.now():%Y%m%d-%H%M%S}"))
        with atomic_write(path) as file:
            file.write(content)

    def save(self, name: str, state: Checkpoint) -> None:
        """Writes a checkpoint; removes those beyond ``keep``, and folders of earlier rolling ones, but no others."""
        self.ensure()
        save_checkpoint(self.path / name, dict(state))
        if name == LAST:
            for folder in _folders_of(self.path / LAST):
                if folder.name not in (state.get(PIECES), state.get(DEEPSPEED)):
                    shutil.rmtree(folder, ignore_errors=True)
        if self.keep > 0:
            for _, old in _numbered_files(self.path)[: -self.keep]:
                if old.name != name:
                    _remove(old)

    def set_aside(self, first_number: int) -> None:
        """Moves what a run with this next number would overwrite, or be taken for, into ``previous-<time>/``."""
        later = [path for number, path in _numbered_files(self.path) if number >= first_number]
        paths = [*later, *(self.path / name for name in (LAST, BEST, BEST_EMA))]
        self._move_aside([*paths, *(folder for path in (*later, self.path / LAST) for folder in _folders_of(path))])

    def set_aside_best(self) -> None:
        """Moves the best checkpoints, whose scores do not compare with those to come, into ``previous-<time>/``."""
        self._move_aside([self.path / BEST, self.path / BEST_EMA])

    def _move_aside(self, paths: list[Path]) -> None:
        paths = [path for path in paths if path.exists()]
        if not paths:
            return
        aside = self.path / f"previous-{datetime.now():%Y%m%d-%H%M%S}"
        aside.mkdir()
        for path in paths:
            path.rename(aside / path.name)
        logger.warning("moved to %s: %s", aside, listed([path.name for path in paths]))


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns a folder's most advanced checkpoint that is whole, or None if it has none.

    Raises :class:`InputError` if there are some, and all are damaged.
    """
    numbered = [path for _, path in reversed(_numbered_files(folder))]
    candidates = [path for path in (folder / LAST, *numbered, folder / BEST) if path.exists()]
    positions = {path: position for path in candidates if (position := _position_in(path)) is not None}
    # The best one is written before the numbered one of its epoch, so that a killed run does both again: it comes last.
    for path in sorted(positions, key=lambda path: (path.name != BEST, positions[path]), reverse=True):
        try:
            load_checkpoint(path)  # in full, which finds what is damaged inside
            return path
        except InputError as error:
            logger.warning("%s: trying an older checkpoint", error)
    if any(path.name != BEST for path in candidates):
        raise InputError(f"no checkpoint in {folder} can be read; move them away, or start over with --no_auto_resume")
    return None


def _position_in(path: Path) -> tuple[int, int] | None:
    """Returns the position in a checkpoint, None with a warning if it cannot be resumed from."""
    try:
        checkpoint = load_checkpoint(path, mmap=True)
        if not isinstance(checkpoint, Mapping) or not TRAINING_STATE & checkpoint.keys():
            if path.name == BEST:
                return None  # of a run that keeps its training state elsewhere
            raise InputError("it holds no training state")
        _check_folder(checkpoint, path)
        return position_of(checkpoint)
    except InputError as error:
        logger.warning("%s is passed over: %s", path.name, error)
        return None


def _numbered_files(folder: Path) -> list[tuple[int, Path]]:
    paths = folder.iterdir() if folder.is_dir() else ()
    matches = ((_NUMBERED_FILE.fullmatch(path.name), path) for path in paths)
    return sorted((int(match[1]), path) for match, path in matches if match)


def _folders_of(path: Path) -> list[Path]:
    """Returns the folders beside a checkpoint that are called as its own may be: ``checkpoint-last-14-2``."""
    pattern = re.compile(rf"{re.escape(path.stem)}(-\d+){{0,2}}")
    return [folder for folder in path.parent.iterdir() if pattern.fullmatch(folder.name) and folder.is_dir()]


def _remove(path: Path) -> None:
    try:
        folder = _check_folder(load_checkpoint(path, mmap=True), path)
    except InputError:  # damaged, or the folder has gone already
        folder = None
    path.unlink()
    if folder in _folders_of(path):
        shutil.rmtree(folder, ignore_errors=True)


def _check_folder(checkpoint: Checkpoint, path: Path) -> Path | None:
    """Returns the folder that a checkpoint names, if any; :class:`InputError` if it is missing or incomplete."""
    name = checkpoint.get(PIECES) or checkpoint.get(DEEPSPEED)
    if not isinstance(name, str):
        return None
    folder = folder_beside(str(path), name)
    if PIECES in checkpoint and not (folder / _PIECES_INDEX).is_file():
        raise InputError(f"{path} needs the folder {folder}, which lacks {_PIECES_INDEX}; choose another checkpoint")
    return folder


def folder_beside(source: str, name: str) -> Path:
    """Returns the folder of pieces that a checkpoint names; :class:`InputError` if it is missing."""
    folder = Path(source).parent / Path(name).name
    if not folder.is_dir():
        raise InputError(f"{source} needs the folder {folder}, which is missing; keep both together")
    return folder


def load_exactly(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads weights whose names and shapes must match the module's; :class:`InputError` lists the differences."""
    own = module.state_dict()
    # The index, in official files, follows from the window.
    given = {name: tensor for name, tensor in weights.items() if not name.endswith("relative_position_index")}
    every = sorted(own.keys() | given.keys())
    if odd := [name for name in every if name not in own or name not in given or own[name].shape != given[name].shape]:
        raise InputError(
            f"{source} is a checkpoint of another model: {len(odd)} of {len(every)} tensors differ "
            f"({differences(odd, given, own)}); check --model and its options"
        )
    module.load_state_dict(given)


def to_cpu(state: Any) -> Any:
    """Copies the tensors of a nested state to host memory, so that a file opens on a machine without this device."""
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, Mapping):
        return {key: to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(to_cpu(value) for value in state)
    return state
