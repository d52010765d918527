"""Where a run's numbers and pictures go besides ``log.txt``: TensorBoard, Weights & Biases, Trackio.

``--report_to`` knows a subclass of :class:`Tracker` by its name in :data:`beit.registry.TRACKERS`.
"""

import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from beit.errors import InputError
from beit.training import distributed
from beit.training.checkpoint import RunFolder


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told when a run starts or goes on."""

    folder: RunFolder | None
    log_dir: str | None  # TensorBoard's
    first_step: int  # optimizer steps done
    fresh: bool  # whether the run starts over rather than going on
    config: dict[str, object]  # settings, and the environment


class Tracker(ABC):
    """One place where a run is shown; ``by_period`` is whether evaluations and pictures are placed by their epoch."""

    by_period: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, run: TrackedRun) -> None: ...

    @classmethod
    @abstractmethod
    def check(cls, log_dir: str | None) -> None:
        """Raises :class:`InputError`, before anything is built, if something is missing that the tracker needs."""

    @abstractmethod
    def log(self, values: Mapping[str, float | Tensor], step: int) -> None:
        """Takes numbers, and pictures ``(3, H, W)`` in [0, 1]."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Sends what is buffered at the end of a run, or of an attempt that was stopped or has ``failed``."""


class TensorBoard(Tracker):
    """Event files in ``--log_dir``; points from the first step on, left by an earlier attempt, are hidden."""

    by_period = True

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(run.log_dir, purge_step=run.first_step)
        except OSError as error:
            raise InputError(f"cannot write to --log_dir {run.log_dir}: {error.strerror}") from error

    @classmethod
    def check(cls, log_dir: str | None) -> None:
        """Raises :class:`InputError` without a folder."""
        if not log_dir:
            raise InputError("--report_to tensorboard needs --log_dir, the folder for its files")

    def log(self, values: Mapping[str, float | Tensor], step: int) -> None:
        """Writes scalars and images."""
        for tag, value in values.items():
            (self._writer.add_image if isinstance(value, Tensor) else self._writer.add_scalar)(tag, value, step)

    def close(self, failed: bool) -> None:  # noqa: ARG002
        """Closes the file."""
        self._writer.close()


class HostedRun(Tracker):
    """A run of a ``package`` with wandb's API, in the project ``beit`` or what ``<PACKAGE>_PROJECT`` says.

    Its name is kept in the run folder, so that a resumed run goes on in it.
    """

    package: ClassVar[str]

    def __init__(self, run: TrackedRun) -> None:
        project = os.environ.get(f"{self.package.upper()}_PROJECT") or "beit"
        try:
            self._module: Any = import_module(self.package)
            named = self.identity(self._name_of(run))
            self._run = self._module.init(project=project, resume="allow", config=run.config, **named)
        except Exception as error:  # of the package, the network or the server
            raise InputError(f"--report_to {self.package}: {error}") from error
        self._told = int(getattr(self._run, "step", 0))  # by an attempt that was killed; a server refuses them twice

    @classmethod
    def check(cls, log_dir: str | None) -> None:  # noqa: ARG003
        """Raises :class:`InputError` without the package."""
        if find_spec(cls.package) is None:
            raise InputError(f"--report_to {cls.package} needs {cls.package}: pip install {cls.package}")

    def _name_of(self, run: TrackedRun) -> str:
        name = secrets.token_hex(4)
        if run.folder is not None:
            record = run.folder.path / f"{self.package}_run.txt"
            if not run.fresh and record.is_file():
                return record.read_text(encoding="utf-8").strip()
            name = f"{run.folder.path.resolve().name}-{name}"
            run.folder.record(record.name, f"{name}\n".encode())
        return name

    def identity(self, name: str) -> dict[str, str]:
        """Returns the arguments by which the package knows the run."""
        return {"name": name}

    def log(self, values: Mapping[str, float | Tensor], step: int) -> None:
        """Sends what has not been told yet."""
        if step >= self._told:
            shown = {k: self._module.Image(to_pil_image(v)) if isinstance(v, Tensor) else v for k, v in values.items()}
            self._run.log(shown, step=step)

    def close(self, failed: bool) -> None:  # noqa: ARG002
        """Waits until all is sent."""
        self._run.finish()


class WandB(HostedRun):
    """Weights & Biases, which knows a run by an id: the random end of its name."""

    package = "wandb"

    def identity(self, name: str) -> dict[str, str]:
        """Returns name and id."""
        return {"name": name, "id": name.rpartition("-")[2]}

    def close(self, failed: bool) -> None:
        """Says how it ended, too."""
        self._run.finish(exit_code=int(failed))


class Trackio(HostedRun):
    """Trackio, which knows a run by its name."""

    package = "trackio"


class Trackers:
    """All trackers of a run, TensorBoard wherever there is a ``log_dir``; none but on the main process.

    Raises :class:`InputError`, on all processes, for one that cannot be opened.
    """

    def __init__(self, kinds: Sequence[type[Tracker]], run: TrackedRun) -> None:
        kinds = list(dict.fromkeys([*([TensorBoard] if run.log_dir else []), *kinds]))
        self._opened: list[Tracker] = []
        self._done = run.first_step
        distributed.on_main(lambda: self._opened.extend(kind(run) for kind in kinds))

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

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for tracker in self._opened:
            tracker.close(failed=error is not None)
