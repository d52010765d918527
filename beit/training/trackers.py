"""Where a run's numbers and pictures go besides ``log.txt``: TensorBoard, Weights & Biases, Trackio.

``--report_to`` knows a subclass of :class:`Tracker` by its name in :data:`beit.registry.TRACKERS`.
"""

import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from beit.errors import InputError
from beit.training import distributed
from beit.training.checkpoint import RunFolder


class Tracker(ABC):
    """One place where a run is shown; a subclass is made with the keywords of :class:`Trackers` that it names."""

    package: ClassVar[str]  # that it needs
    by_period: ClassVar[bool] = False  # whether evaluations and pictures are placed by epoch, not by step

    @abstractmethod
    def __init__(self, **run: Any) -> None: ...

    @abstractmethod
    def log(self, values: Mapping[str, float | Tensor], step: int) -> None:
        """Takes numbers, and pictures ``(3, H, W)`` in [0, 1]."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Sends what is buffered at the end of a run, or of an attempt that was stopped or has ``failed``."""


class TensorBoard(Tracker):
    """Event files in ``--log_dir``; points from the first step on, left by an earlier attempt, are hidden."""

    package, by_period = "tensorboard", True

    def __init__(self, *, log_dir: str | None, first_step: int, **_: object) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(log_dir, purge_step=first_step)
        except OSError as error:
            raise InputError(f"cannot write to --log_dir {log_dir}: {error.strerror}") from error

    def log(self, values: Mapping[str, float | Tensor], step: int) -> None:
        for tag, value in values.items():
            (self._writer.add_image if isinstance(value, Tensor) else self._writer.add_scalar)(tag, value, step)

    def close(self, failed: bool) -> None:  # noqa: ARG002
        self._writer.close()


class WandB(Tracker):
    """A run of Weights & Biases in the project ``beit``, or in the one that ``WANDB_PROJECT`` names.

    Its name, which ends in its id, is kept in the run folder, so that a resumed run goes on in it, after the steps that
    it has.
    """

    package = "wandb"

    def __init__(
        self, *, folder: RunFolder | None, fresh: bool, first_step: int, config: dict[str, object], **_: object
    ) -> None:
        project = os.environ.get(f"{self.package.upper()}_PROJECT") or "beit"
        try:
            self._module: Any = import_module(self.package)
            named = self.identity(self._name(folder, fresh))
            self._run = self._module.init(project=project, resume="allow", config=config, **named)
        except Exception as error:  # of the package, the network or the server
            raise InputError(f"--report_to {self.package}: {error}") from error
        self._told = self.steps_told(first_step)

    def _name(self, folder: RunFolder | None, fresh: bool) -> str:
        if folder is None:
            return secrets.token_hex(4)
        record = folder.path / f"{self.package}_run.txt"
        if fresh or not record.is_file():
            folder.record(record.name, f"{folder.path.resolve().name}-{secrets.token_hex(4)}\n".encode())
        return record.read_text(encoding="utf-8").strip()

    def identity(self, name: str) -> dict[str, str]:
        """Returns the arguments by which the package knows the run."""
        return {"name": name, "id": name.rpartition("-")[2]}

    def steps_told(self, first_step: int) -> int:  # noqa: ARG002
        """Returns the first step that the package has not been told of, by a run that goes on at ``first_step``."""
        return int(self._run.step)  # a server refuses those before

    def log(self, values: Mapping[str, float | Tensor], step: int) -> None:
        if step >= self._told:
            shown = {k: self._module.Image(to_pil_image(v)) if isinstance(v, Tensor) else v for k, v in values.items()}
            self._run.log(shown, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio(WandB):
    """The same of Trackio, which follows wandb's API; it knows a run by its name, and not how it ended."""

    package = "trackio"

    def identity(self, name: str) -> dict[str, str]:
        return {"name": name}

    def steps_told(self, first_step: int) -> int:
        told = int(getattr(self._run, "_next_step", 0))  # which it does not publish
        return told if told > first_step + 1 else first_step  # the line of log.txt before it has its number

    def close(self, failed: bool) -> None:  # noqa: ARG002
        self._run.finish()


class Trackers(AbstractContextManager):
    """All trackers of a run, TensorBoard wherever there is a ``log_dir``; none but on the main process.

    Args:
        kinds: Classes of trackers.
        first_step: Optimizer steps done.
        run: What trackers are told besides: ``folder``, the run's, ``log_dir``, ``fresh``, whether it starts over, and
            ``config``, its settings and environment.

    Raises :class:`InputError`, on all processes, for one that cannot be opened.
    """

    def __init__(self, kinds: Sequence[type[Tracker]], *, first_step: int, **run: Any) -> None:
        kinds = list(dict.fromkeys([*([TensorBoard] if run["log_dir"] else []), *kinds]))
        self._opened: list[Tracker] = []
        self._done = first_step
        distributed.on_main(lambda: self._opened.extend(kind(first_step=first_step, **run) for kind in kinds))

    def write(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Writes ``<group>/<name>`` of an optimizer step, from 0, for each value."""
        for tracker in self._opened:
            tracker.log({f"{group}/{name}": value for name, value in values.items()}, step)

    def write_period(self, results: Mapping[str, float], entry: Mapping[str, float], number: int, done: int) -> None:
        """Writes a line of ``log.txt`` after ``done`` steps; TensorBoard only its evaluation, at the line's number."""
        self._done = done
        for tracker in self._opened:
            if tracker.by_period:
                tracker.log({f"perf/{name}": value for name, value in results.items()}, number)
            else:
                tracker.log({name: value for name, value in entry.items() if name != "step"}, done)  # it is the axis

    def write_image(self, tag: str, image: Tensor, number: int) -> None:
        """Writes a picture, ``(3, H, W)`` in [0, 1], drawn after the epoch of this number."""
        for tracker in self._opened:
            tracker.log({tag: image}, number if tracker.by_period else self._done)

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for tracker in self._opened:
            tracker.close(failed=error is not None)
