"""The training loop where a process holds a part of the training state only, and writes only that part.

A checkpoint is a folder ``checkpoint-<epoch>/`` with a piece of each process. Beside it lies a plain
``checkpoint-<epoch>.pth`` with the whole model, for everything that reads checkpoints; it is written last, so that what
it names is complete.
"""

import re
import shutil
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from beit.training import distributed
from beit.training.checkpoint import LAST
from beit.training.loop import Trainer

_FOLDER = re.compile(r"checkpoint-(\d+|last-\d+)")
_ROLLING = "checkpoint-last-"


@dataclass
class ShardedTrainer(Trainer):
    """A :class:`Trainer` whose checkpoints are folders of pieces. What a piece is, a subclass says."""

    names_folder: ClassVar[str]  # the key of the plain file that names the folder

    def __post_init__(self) -> None:
        super().__post_init__()
        distributed.connect_alone(self._device)
        self._root = distributed.on_main(lambda: str(self.folder.path) if self.folder and self.settings.save else "")

    @abstractmethod
    def _write_pieces(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Writes this process's piece; all processes call it, the main one with the checkpoint's state."""

    def _save(self, name: str, epoch: int, done: int) -> None:
        if self._root:
            folder = Path(self._root, Path(name).stem)
            if name == LAST:  # each under its own name: the file that names it decides which one counts
                folder = Path(self._root, f"{_ROLLING}{epoch * self.steps_per_epoch + done}")
            state = self._state(epoch, done) if self._makes_checkpoints else {}
            distributed.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))  # of a run that was killed here
            self._write_pieces(folder, state)
            distributed.barrier()
            self._write(name, {**state, self.names_folder: folder.name})
            if self.folder is not None:
                _remove_unnamed(folder)
        self._throughput.restart_window()


def _remove_unnamed(newest: Path) -> None:
    """Removes the folders beside the newest whose checkpoint was removed or written anew since."""
    for path in newest.parent.iterdir():
        if path.is_dir() and _FOLDER.fullmatch(path.name) and path != newest:
            rolling = path.name.startswith(_ROLLING)
            old = rolling and newest.name.startswith(_ROLLING)
            if old or (not rolling and not path.with_name(f"{path.name}.pth").exists()):
                shutil.rmtree(path, ignore_errors=True)
