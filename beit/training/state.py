"""What a run consists of and how it goes on: the state in a checkpoint, in both directions."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from beit.errors import InputError
from beit.storage import Checkpoint, position_of, settings_in
from beit.training import distributed
from beit.training.checkpoint import PIECES, RunFolder, folder_beside, load_exactly, to_cpu
from beit.training.logging import Averages
from beit.training.meaning import SCORES, compare, plain
from beit.training.optim import load_optimizer
from beit.training.precision import Precision
from beit.training.trackers import Tracker, Trackers

logger = logging.getLogger(__name__)

Average = ModelEmaV3
Batch = Mapping[str, Tensor]
WITHOUT_EFFECT = {  # settings that do not change the training, or are compared by what they lead to
    *("output_dir", "log_dir", "device", "num_workers", "pin_mem", "resume", "auto_resume", "start_epoch", "log_every"),
    *("local_rank", "dist_url", "dist_on_itp", "dist_timeout", "world_size", "keep_checkpoints", "save_ckpt_steps"),
    *("batch_size", "update_freq", "total_batch_size", "data_path", "eval_data_path", "discrete_vae_weight_path"),
    *("report_to", "log_images"),
}
# (model, batch, optimizer step) -> (loss, metrics): scalars on the device, means over the batch.
StepFunction = Callable[[nn.Module, Batch, int], tuple[Tensor, dict[str, Tensor]]]


class Loader(Protocol):
    """What the loop needs of a data loader: epochs of batches that can be entered anywhere."""

    batch_size: int

    @property
    def batches_per_epoch(self) -> int:
        """Batches this process gets in a whole epoch."""

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Returns this process's batches of an epoch, from batch ``first_batch`` on."""


@dataclass(frozen=True)
class Period:
    """The stretch of a run, ``steps`` optimizer steps long, by which log lines and checkpoints are numbered.

    ``epoch`` counts from 0, and each starts the data anew; ``step`` counts optimizer steps, with no gap in the data.
    """

    name: str = "epoch"
    steps: int = 1


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long and how to train; every duration is in optimizer steps."""

    total_steps: int
    period: Period = Period()  # what log lines and checkpoints are numbered by; those of several steps each get a line
    update_freq: int = 1  # batches whose gradients are accumulated for one optimizer step
    clip_grad: float | None = None  # largest gradient norm; None to measure it only
    log_every: int = 10  # most steps between two reads of the metrics from the device
    save_every: int = 20  # steps between two numbered checkpoints
    save_last_every: int = 0  # steps between two rolling checkpoints; 0 for none
    evaluate_every: int = 1
    evaluate_average: bool = False  # the moving average too
    save: bool = True  # without checkpoints only log.txt is written
    best_metric: str | None = None  # of the evaluation, higher is better: its best checkpoint is kept
    seed: int = 0  # of everything random in a step (dropout, stochastic depth, mixup)


@dataclass(kw_only=True)
class TrainingState:
    """Everything that a run trains with, and its position; :class:`beit.training.loop.Trainer` advances it.

    ``evaluate`` is ``(model, period) -> metrics``, logged as ``test_*``, of the average as ``test_ema_*``; names that
    begin with ``train_`` stay. Periods are counted from 0. ``on_epoch_end`` is called on the main process after one is
    saved, if the run writes anything.
    """

    model: nn.Module  # on its device
    step: StepFunction
    loader: Loader
    optimizer: torch.optim.Optimizer  # over groups as beit.training.optim.parameter_groups makes them
    precision: Precision
    settings: LoopSettings
    lr: Callable[[int], float]  # at an optimizer step
    weight_decay: Callable[[int], float] | None = None  # at an optimizer step; None leaves the groups' own
    prepare: Callable[[Batch], Batch] | None = None  # applied to a batch on the host, before it goes to the device
    folder: RunFolder | None = None  # for checkpoints and log.txt; None on all but the main process
    log_dir: str | None = None  # for TensorBoard
    report_to: Sequence[type[Tracker]] = ()  # besides
    config: Mapping[str, object] = field(default_factory=dict)  # plain values, in checkpoints under args
    extras: Mapping[str, object] = field(default_factory=dict)  # in checkpoints; see beit.training.meaning.FACTS
    ema: Average | None = None  # a moving average of the weights
    evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None
    on_epoch_end: Callable[[int, Trackers], None] | None = None

    def __post_init__(self) -> None:
        self.images_per_step = self.loader.batch_size * self.settings.update_freq * distributed.world_size()
        self.records: dict[str, bytes] = {}  # files that say how the run computes, besides the session's
        self.first_step = 0  # optimizer steps done
        self._period_open = False  # the last of these ended a period that is not evaluated and logged yet
        self._fresh = True
        self._averages = Averages()
        self._skipped_steps = 0
        self._best: dict[str, float] = {}  # the best value so far of the metrics that decide what is kept

    def resume(self, checkpoint: Checkpoint, source: str) -> None:
        """Restores weights, optimizer and position; :class:`InputError` if the checkpoint does not fit or lacks any."""
        changed = compare(checkpoint, self.extras, source)
        self._take_over(checkpoint, source)
        if self.ema is not None:  # a run without an average begins one with its weights
            average = checkpoint.get("model_ema") or checkpoint["model"]
            self._load_weights(self.ema.module, average, f"{source} (model_ema)")
        try:
            self._averages = Averages(checkpoint.get("averages"))
            self._skipped_steps = int(checkpoint.get("skipped_steps", 0))
            self._best = {} if SCORES in changed else dict(checkpoint.get("best", {}))
            self._set_position(checkpoint)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source} does not record the state of a run as this library does: {error!r}") from error
        if SCORES in changed and self.folder is not None and not self.is_done:
            self.folder.set_aside_best()
        self._fresh = False
        self._name_changes(checkpoint)
        logger.info("resuming %s at %s", source, self._place(self.first_step))

    @property
    def is_done(self) -> bool:
        """Whether no step is left to take, and nothing to evaluate and log."""
        return self.first_step >= self.settings.total_steps and not self._period_open

    def _name_changes(self, checkpoint: Checkpoint) -> None:
        """Says which settings differ from the checkpoint's, its length among them."""
        then, now = settings_in(checkpoint), self.config
        both = [key for key in now if key in then and key not in WITHOUT_EFFECT]
        if different := [key for key in both if plain(then[key]) != plain(now[key])]:
            changes = ", ".join(f"{key} {then[key]} -> {now[key]}" for key in different)
            logger.warning("settings changed since the checkpoint: %s", changes)

    def _take_over(self, checkpoint: Checkpoint, source: str) -> None:
        if "model" not in checkpoint or not {"optimizer", PIECES} & checkpoint.keys():
            remedy = (
                "it was written by DeepSpeed, so add --enable_deepspeed"
                if "deepspeed" in checkpoint
                else "to start from its weights give it as --init_from"
            )
            raise InputError(f"{source} holds no training state to resume; {remedy}")
        self._load_weights(self.model, checkpoint["model"], source)
        optimizer = self._optimizer_state(checkpoint, source)
        load_optimizer(self.optimizer, optimizer, checkpoint.get("optimizer_class"), source)
        self.precision.load_state_dict(checkpoint.get("scaler") or {})

    def _load_weights(self, module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
        load_exactly(module, weights, source)

    def _optimizer_state(self, checkpoint: Checkpoint, source: str) -> Checkpoint:
        """Returns the optimizer's state, which a run with ``--shard fsdp`` leaves in pieces."""
        if PIECES in checkpoint:
            from beit.checkpoints.pieces import read_optimizer  # seldom needed, and what it imports takes a second

            return read_optimizer(folder_beside(source, checkpoint[PIECES]))
        return checkpoint["optimizer"]

    def _set_position(self, checkpoint: Checkpoint) -> None:
        """Takes over the position; an epoch whose length has changed is entered at the same share."""
        period, step = position_of(checkpoint)
        then, now = checkpoint.get("progress", {}), self._surroundings()
        changed = [name for name in now if then.get(name, now[name]) != now[name]]
        by_step = self.settings.period.name == "step"
        if by_step:
            is_open = int(step > 0 and step == then.get("steps_per_epoch", 1))  # version 0.1 counted rounds of steps
            period, step = then.get("global_step", period) - is_open, is_open
        if changed:
            share = "the same share of " if step else ""
            logger.warning(
                "%s since the checkpoint: continuing at %s, with other samples",
                ", ".join(f"{name} went from {then[name]} to {now[name]}" for name in changed),
                f"step {period + step}" if by_step else f"{share}epoch {period}",
            )
        if changed and step and not by_step:
            step = round(step * self.settings.period.steps / then.get("steps_per_epoch", self.settings.period.steps))
        self.first_step = period * self.settings.period.steps + step
        self._period_open = step == self.settings.period.steps

    def _surroundings(self) -> dict[str, int]:
        """Returns what decides which samples a step sees."""
        surroundings = {"images_per_step": self.images_per_step, "seed": self.settings.seed}
        if self.settings.period.name == "epoch":
            surroundings["steps_per_epoch"] = self.settings.period.steps
        return surroundings

    def _state(self, step: int, period_open: bool = False) -> Checkpoint:
        """Returns the checkpoint after ``step`` steps; with ``period_open`` the evaluation and log line are to come."""
        period, within = divmod(step, self.settings.period.steps)
        if period_open:
            period, within = period - 1, self.settings.period.steps
        state = {
            "model": self._weights(self.model),
            "epoch": period - 1,  # the last whole epoch, as in official files
            **self._training_state(),
            "args": dict(self.config),
            "progress": {"epoch": period, "step": within, "global_step": step, **self._surroundings()},
            "averages": self._averages.state_dict(),
            "skipped_steps": self._skipped_steps,
            "best": dict(self._best),
            **self.extras,
        }
        if self.ema is not None:
            state["model_ema"] = self._weights(self.ema.module)
        return to_cpu(state)

    def _weights(self, module: nn.Module) -> dict[str, Tensor]:
        return module.state_dict()

    def _training_state(self) -> dict[str, object]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "optimizer_class": type(self.optimizer).__name__,
            "scaler": self.precision.state_dict(),
        }

    def _place(self, step: int) -> str:
        if self.settings.period.name == "step":
            return f"step {step}"
        return "epoch {}, step {}".format(*divmod(step, self.settings.period.steps))

    def checkpoint_number(self, step: int) -> int:
        """Returns the number in the name of the checkpoint after ``step`` optimizer steps."""
        return step if self.settings.period.name == "step" else step // self.settings.period.steps - 1
