"""The training loop: any module, on any loader, from any step of any epoch.

What happens in a step is the job's business (a function from a batch to a loss); gradient accumulation, precision,
schedules, logs, checkpoints, resuming, signals and disagreement between processes are the loop's.
"""

import contextlib
import logging
import math
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from beit.errors import InputError
from beit.training import distributed
from beit.training.checkpoint import (
    BEST,
    BEST_EMA,
    LAST,
    PIECES,
    RunFolder,
    folder_beside,
    load_exactly,
    numbered_file,
    position_of,
    to_cpu,
)
from beit.training.logging import Averages, EpochLog, Progress, ScalarWriter, Throughput, memory_in_use
from beit.training.optim import apply_schedules, load_optimizer
from beit.training.precision import Precision

logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]
StepFunction = Callable[[nn.Module, Batch, int], tuple[Tensor, dict[str, Tensor]]]


class Loader(Protocol):
    """What the loop needs of a data loader: epochs of batches that can be entered anywhere."""

    batch_size: int

    @property
    def batches_per_epoch(self) -> int:
        """Batches this process gets in a whole epoch."""

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Returns this process's batches of an epoch, from batch ``first_batch`` on."""


LONGEST_WINDOW = 5.0  # seconds between two looks at the device's numbers, if steps are not longer
MOST_OVERFLOWS = 50  # in a row; the loss scale falls from 65536 to 1 in 16
REMEDY = "the last checkpoint is from before it. Lower --lr, set --clip_grad, or use --amp_dtype fp32"


class NonFiniteLossError(RuntimeError):
    """The loss or the gradients became NaN or infinite; the last checkpoint is from before that."""


class Stopped(Exception):
    """The run was asked to end (SIGTERM) and has saved where it was."""


@dataclass(frozen=True)
class LoopSettings:
    """How long and how to train.

    Args:
        epochs: Passes over the data in all.
        update_freq: Batches whose gradients are added up for one optimizer step.
        clip_grad: Largest gradient norm; None to measure it only.
        log_every: Optimizer steps between two looks at the device's numbers.
        save_epochs: Epochs between two epoch checkpoints.
        save_steps: Optimizer steps between two rolling checkpoints; 0 for none.
        evaluate_epochs: Epochs between two evaluations.
        evaluate_average: Whether the moving average is evaluated too.
        save: Whether to write checkpoints at all; without them ``log.txt`` alone is written.
        best_metric: Metric of the evaluation, the larger the better, whose best epoch is kept; None for none.
        count_steps: Whether log and checkpoints are numbered by the optimizer steps done, not by epochs.
        seed: Seed of everything random in a step (dropout, stochastic depth, mixup).
    """

    epochs: int
    update_freq: int = 1
    clip_grad: float | None = None
    log_every: int = 10
    save_epochs: int = 20
    save_steps: int = 0
    evaluate_epochs: int = 1
    evaluate_average: bool = False
    save: bool = True
    best_metric: str | None = None
    count_steps: bool = False
    seed: int = 0


@dataclass
class Trainer:
    """Trains a module and can be stopped and continued at any optimizer step.

    Args:
        model: The module, on its device.
        step: ``(model, batch, global_step) -> (loss, metrics)``; scalars on the device, means over the batch.
        loader: Gives each epoch's batches.
        optimizer: Over groups as :func:`beit.training.optim.parameter_groups` makes them.
        precision: Number format of the step.
        settings: Durations and frequencies.
        lr: Learning rate at an optimizer step.
        weight_decay: Weight decay at an optimizer step, or None to leave the groups' own.
        prepare: Applied to a batch on the host, before it goes to the device.
        folder: Where checkpoints and ``log.txt`` go; None to write nothing (and on all but the main process).
        log_dir: TensorBoard's folder.
        config: The run's settings as plain values, stored in checkpoints under ``args``.
        extras: More that checkpoints hold, such as the model's architecture.
        ema: A moving average of the weights, with ``update(model, step)`` and ``module`` (timm's ``ModelEmaV3``).
        evaluate: ``(model, epoch) -> metrics`` at the end of epochs, logged with the prefix ``test_``, and those of
            the moving average with ``test_ema_``.
        on_epoch_end: Called on the main process after an epoch is saved, if the run writes anything.
        accepts: ``(checkpoint, source)``, raises :class:`InputError` for a checkpoint that the run cannot go on from.
    """

    model: nn.Module
    step: StepFunction
    loader: Loader
    optimizer: torch.optim.Optimizer
    precision: Precision
    settings: LoopSettings
    lr: Callable[[int], float]
    weight_decay: Callable[[int], float] | None = None
    prepare: Callable[[Batch], Batch] | None = None
    folder: RunFolder | None = None
    log_dir: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    ema: Any = None
    evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None
    on_epoch_end: Callable[[int, ScalarWriter], None] | None = None
    accepts: Callable[[Mapping[str, Any], str], None] | None = None

    def __post_init__(self) -> None:
        self.steps_per_epoch = self.loader.batches_per_epoch // self.settings.update_freq
        if self.steps_per_epoch == 0:
            raise InputError(
                f"the data set has {self.loader.batches_per_epoch} batches, less than one optimizer step of "
                f"--update_freq {self.settings.update_freq}: lower --batch_size or --update_freq"
            )
        self.images_per_step = self.loader.batch_size * self.settings.update_freq * distributed.world_size()
        self.first_epoch = self.first_step = 0
        self._device = self.precision.device
        self._averages = Averages()
        self._skipped_steps = 0
        self._best: dict[str, float] = {}  # the best value so far of the metrics that decide what is kept
        self._names: list[str] = []  # of the metrics in the window's rows
        self._window: list[Tensor] = []  # one row of metrics a step, on the device
        self._window_limit = 1  # steps until the next look at them; grows once their pace is known
        self._overflows = 0  # in a row
        self._fresh = True

    # Resuming

    def resume(self, checkpoint: Mapping[str, Any], source: str) -> None:
        """Takes weights, optimizer, scaler, averages and position over from a checkpoint.

        Raises:
            InputError: The checkpoint is of another model, or lacks the optimizer's state.
        """
        if self.accepts is not None:
            self.accepts(checkpoint, source)
        self._take_over(checkpoint, source)
        self._restore_progress(checkpoint, source)

    def _take_over(self, checkpoint: Mapping[str, Any], source: str) -> None:
        """Takes over weights, optimizer and scaler."""
        if "model" not in checkpoint or not {"optimizer", PIECES} & checkpoint.keys():
            remedy = (
                "it was written by DeepSpeed, so add --enable_deepspeed"
                if "deepspeed" in checkpoint
                else "to start from its weights give it as --init_from, --finetune or, for segmentation, --load-from"
            )
            raise InputError(f"{source} holds no training state to resume; {remedy}")
        self._load_weights(self.model, checkpoint["model"], source)
        optimizer = self._optimizer_state(checkpoint, source)
        load_optimizer(self.optimizer, optimizer, checkpoint.get("optimizer_class"), source)
        self.precision.load_state_dict(checkpoint.get("scaler") or {})

    def _load_weights(self, module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
        load_exactly(module, weights, source)

    def _optimizer_state(self, checkpoint: Mapping[str, Any], source: str) -> Mapping[str, Any]:
        """Returns the optimizer's state, which a run of ``--shard fsdp`` has left in pieces."""
        if PIECES in checkpoint:
            from beit.checkpoints.pieces import (
                read_optimizer,  # seldom needed, and torch takes a second to import what it is of
            )

            return read_optimizer(folder_beside(source, checkpoint[PIECES]))
        return checkpoint["optimizer"]

    def _restore_progress(self, checkpoint: Mapping[str, Any], source: str) -> None:
        """Takes over what a checkpoint holds besides weights and optimizer."""
        if self.ema is not None:
            # Of a run without an average, it begins with the weights.
            average = checkpoint.get("model_ema") or checkpoint["model"]
            self._load_weights(self.ema.module, average, f"{source} (model_ema)")
        self._averages = Averages(checkpoint.get("averages"))
        self._skipped_steps = checkpoint.get("skipped_steps", 0)
        self._best = dict(checkpoint.get("best", {}))
        self.first_epoch, self.first_step = self._position(checkpoint)
        self._fresh = False
        logger.info("resuming %s at %s", source, self._place(self.first_epoch, self.first_step))

    def _position(self, checkpoint: Mapping[str, Any]) -> tuple[int, int]:
        epoch, step = position_of(checkpoint)
        then, now = checkpoint.get("progress", {}), self._surroundings()
        changed = [name for name in now if then.get(name, now[name]) != now[name]]
        if step and changed:
            logger.warning(
                "%s since the checkpoint: going on at the same share of epoch %d, with other samples",
                ", ".join(f"{name} went from {then[name]} to {now[name]}" for name in changed),
                epoch,
            )
            images = then.get("images_per_step", self.images_per_step)
            step = min(step * images // self.images_per_step, self.steps_per_epoch)
        return epoch, step

    def _surroundings(self) -> dict[str, int]:
        """Returns what decides which samples a step sees."""
        return {
            "images_per_step": self.images_per_step,
            "steps_per_epoch": self.steps_per_epoch,
            "seed": self.settings.seed,
        }

    def _state(self, epoch: int, step: int) -> dict[str, Any]:
        """Returns what a checkpoint holds when ``step`` steps of ``epoch`` are done.

        All steps done and step 0 of the next epoch differ by the evaluation and the line in the log.
        """
        global_step = epoch * self.steps_per_epoch + step
        state = {
            "model": self._weights(self.model),
            "epoch": epoch - 1,  # the last whole epoch, as in official files
            **self._training_state(),
            "args": dict(self.config),
            "progress": {"epoch": epoch, "step": step, "global_step": global_step, **self._surroundings()},
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

    def _training_state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "optimizer_class": type(self.optimizer).__name__,
            "scaler": self.precision.state_dict(),
        }

    # Training

    def fit(self) -> None:
        """Trains from the current position to the last epoch.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite on some process; all of them raise.
            Stopped: SIGTERM came; the position has been saved.
        """
        model = self._distribute()
        log = EpochLog(self.folder.path / "log.txt", self.first_epoch, self._fresh) if self.folder else None
        scalars = ScalarWriter(self.log_dir, self.first_epoch * self.steps_per_epoch + self.first_step)
        with contextlib.closing(scalars), _termination_flag() as terminated:
            if self.first_epoch >= self.settings.epochs:
                logger.info("all %d epochs are done: nothing is left to train", self.settings.epochs)
            for epoch in range(self.first_epoch, self.settings.epochs):
                self._train_epoch(model, epoch, scalars, terminated)
                if self.settings.count_steps and self.settings.save_steps and self._evaluates_at(epoch):
                    self._save(LAST, epoch, self.steps_per_epoch)  # a round is long, and so may the evaluation be
                entry = self._epoch_entry(epoch, scalars)
                self.first_step, self._averages = 0, Averages()
                self._finish_epoch(epoch, entry, log, scalars)
                if epoch + 1 < self.settings.epochs and self._agree(terminated.is_set):
                    self._stop(epoch + 1, 0)

    def _distribute(self) -> nn.Module:
        if distributed.world_size() == 1:
            return self.model
        devices = [self._device.index] if self._device.type == "cuda" else None
        # Buffers are indices, and statistics that are computed over all processes. Newer torch has another word for it.
        newer = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
        synchronise: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
        return DistributedDataParallel(self.model, device_ids=devices, gradient_as_bucket_view=True, **synchronise)

    def _train_epoch(self, model: nn.Module, epoch: int, scalars: ScalarWriter, terminated: "_Flag") -> None:
        model.train()
        progress = self._progress(epoch)
        self._throughput = Throughput(self.images_per_step)
        batches = self.loader.epoch(epoch, self.first_step * self.settings.update_freq)
        try:
            for done in range(self.first_step + 1, self.steps_per_epoch + 1):
                global_step = epoch * self.steps_per_epoch + done - 1
                self._window.append(self._optimizer_step(model, batches, global_step))
                last = done == self.steps_per_epoch
                save = self._saves_at(global_step + 1) and not last
                alone = distributed.world_size() == 1
                if last or save or len(self._window) >= self._window_limit or (alone and terminated.is_set):
                    stop = self._close_window(epoch, done, scalars, progress, terminated)
                    if stop:
                        self._stop(epoch, done)
                    if save:
                        self._save(LAST, epoch, done)
        finally:
            progress.close()
            close = getattr(batches, "close", None)
            if close:
                close()

    def _progress(self, epoch: int) -> Progress:
        if self.settings.count_steps:
            total = self.settings.epochs * self.steps_per_epoch
            return Progress("Training", total, self.first_step, before=epoch * self.steps_per_epoch)
        return Progress(f"Epoch [{epoch + 1}/{self.settings.epochs}]", self.steps_per_epoch, self.first_step)

    def _stop(self, epoch: int, done: int) -> NoReturn:
        self._save(LAST, epoch, done)
        distributed.barrier()  # a launcher ends the others when one is gone: not before the checkpoint is written
        raise Stopped(f"stopped at {self._place(epoch, done)}")

    def _place(self, epoch: int, done: int) -> str:
        """Says where a run is: ``done`` steps into an epoch."""
        if self.settings.count_steps:
            return f"step {epoch * self.steps_per_epoch + done}"
        return f"epoch {epoch}, step {done}"

    def checkpoint_number(self, epoch: int) -> int:
        """Returns the number in the name of the checkpoint that ends an epoch."""
        return (epoch + 1) * self.steps_per_epoch if self.settings.count_steps else epoch

    def _agree(self, wish: bool) -> bool:
        """Whether any process wishes something."""
        return bool(distributed.sum_over_ranks(torch.tensor([float(wish)], device=self._device)).item())

    def _saves_at(self, global_step: int) -> bool:
        return self.settings.save_steps > 0 and global_step % self.settings.save_steps == 0

    def _optimizer_step(self, model: nn.Module, batches: Iterator[Batch], global_step: int) -> Tensor:
        """Does one optimizer step; returns its metrics as one row on the device, without waiting for it."""
        seed_step(self.settings.seed, global_step, distributed.rank())
        apply_schedules(self.optimizer, global_step, self.lr, self.weight_decay)
        update_freq = self.settings.update_freq
        rows = []
        for micro_step in range(update_freq):
            batch = self._next_batch(batches)
            loss, metrics = self._backward(model, batch, global_step, last=micro_step == update_freq - 1)
            self._names = ["loss", *metrics]
            rows.append(torch.stack([loss.detach().float(), *(value.detach().float() for value in metrics.values())]))
        norm = self._update()
        if self.ema is not None:
            self.ema.update(self.model, step=global_step + 1)
        return torch.cat([torch.stack(rows).mean(dim=0), norm.detach().float().reshape(1)])

    def _backward(
        self, model: nn.Module, batch: Batch, global_step: int, last: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds a batch's gradients; between processes they are exchanged once a step, with the last batch's."""
        alone = contextlib.nullcontext if last or not isinstance(model, DistributedDataParallel) else model.no_sync
        with alone():
            with self.precision.autocast():
                loss, metrics = self.step(model, batch, global_step)
            self.precision.backward(loss / self.settings.update_freq)
        return loss, metrics

    def _update(self) -> Tensor:
        """Changes the weights by the gradients gathered, and returns the gradients' norm."""
        return self.precision.step(self.optimizer, self.model.parameters(), self.settings.clip_grad)

    def _loss_scale(self) -> float:
        return self.precision.loss_scale

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        start = time.perf_counter()
        batch = next(batches)
        batch = self.prepare(batch) if self.prepare else batch
        self._throughput.waited(time.perf_counter() - start)
        return {name: to_device(tensor, self._device) for name, tensor in batch.items()}

    # Looking at the device's numbers

    def _close_window(
        self, epoch: int, done: int, scalars: ScalarWriter, progress: Progress, terminated: "_Flag"
    ) -> bool:
        """Fetches the metrics of the last steps, the only place that waits for the device; returns whether to stop.

        All processes meet here, so they agree on a loss that is not finite and on a wish to stop.
        """
        rows = torch.stack(self._window)
        self._window = []
        if rows.is_cuda:  # the host is ahead of the device, and a window lasts until its steps are done
            torch.cuda.current_stream(rows.device).synchronize()
        wish = torch.tensor([float(terminated.is_set), self._throughput.window_seconds()])
        sums = torch.cat([rows.flatten(), wish.to(self._device)])
        together = distributed.sum_over_ranks(sums).cpu().double() / distributed.world_size()
        table, (stop, seconds) = together[:-2].reshape(rows.shape), together[-2:].tolist()
        # A wish to stop must not wait for many slow steps: launchers kill what has not ended after 30 seconds.
        limit = int(LONGEST_WINDOW * len(rows) / max(seconds, 1e-9))
        self._window_limit = min(max(limit, 1), self.settings.log_every)
        first_global_step = epoch * self.steps_per_epoch + done - len(rows)
        loss_scale = self._loss_scale()
        for offset, row in enumerate(table.tolist()):
            values = dict(zip([*self._names, "grad_norm"], row, strict=True))
            self._record_step(first_global_step + offset, values, loss_scale, scalars)
        speed = self._throughput.close_window(len(rows))
        scalars.write("perf", speed, first_global_step + len(rows) - 1)
        progress.update(done, self._console_text(epoch, done, speed))
        return stop > 0

    def _record_step(
        self, global_step: int, values: dict[str, float], loss_scale: float, scalars: ScalarWriter
    ) -> None:
        if not math.isfinite(values["loss"]):
            raise NonFiniteLossError(f"the loss is {values['loss']} at step {global_step} (counted from 0); {REMEDY}")
        rates = [self.lr(global_step) * group.get("lr_scale", 1.0) for group in self.optimizer.param_groups]
        decays = [group["weight_decay"] for group in self.optimizer.param_groups if group.get("decays")]
        settings = {
            "loss_scale": loss_scale,
            "lr": max(rates),
            "min_lr": min(rates),
            "weight_decay": self.weight_decay(global_step) if self.weight_decay else max(decays, default=0.0),
        }
        norm = {"grad_norm": values.pop("grad_norm")}
        self._count_overflow(global_step, norm["grad_norm"])
        for name, value in {**values, **settings, **norm}.items():
            self._averages.add(name, value)
        scalars.write("loss", values, global_step)
        scalars.write("opt", {**settings, **norm}, global_step)

    def _count_overflow(self, global_step: int, norm: float) -> None:
        """Counts an update that float16 could not make; in any other format it has spoilt the weights."""
        if math.isfinite(norm):
            self._overflows = 0
            return
        self._skipped_steps += 1
        self._overflows += 1
        if self.precision.dtype != torch.float16:
            raise NonFiniteLossError(f"the gradients are not finite at step {global_step} (counted from 0); {REMEDY}")
        if self._overflows == MOST_OVERFLOWS:
            raise NonFiniteLossError(
                f"the gradients overflowed {MOST_OVERFLOWS} times in a row, up to step {global_step}; {REMEDY}"
            )

    def _console_text(self, epoch: int, done: int, speed: Mapping[str, float]) -> str:
        means = self._averages.means()
        metrics = "  ".join(f"{name} {means[name]:.4g}" for name in self._names if name in means)
        remaining = (self.settings.epochs - epoch) * self.steps_per_epoch - done
        return (
            f"{metrics}  lr {self.lr(epoch * self.steps_per_epoch + done - 1):.2e}  "
            f"{speed['images_per_second']:.0f} images/s  waiting for data {speed['data_wait']:.0%}  "
            f"memory {memory_in_use(self._device)}  left {self._throughput.remaining(remaining)}"
        )

    # The end of an epoch

    def _epoch_entry(self, epoch: int, scalars: ScalarWriter) -> dict[str, Any]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        entry: dict[str, Any] = {f"train_{name}": value for name, value in self._averages.means().items()}
        if self.evaluate and self._evaluates_at(epoch):
            results = self._evaluate(self.model, epoch)
            if self.ema is not None and self.settings.evaluate_average:
                average = self._evaluate(self.ema.module, epoch)
                results = {**results, **{f"ema_{name}": value for name, value in average.items()}}
            scalars.write("perf", {f"test_{name}": value for name, value in results.items()}, epoch)
            entry |= {f"test_{name}": value for name, value in results.items()}
        entry |= {"epoch": epoch, "n_parameters": sum(p.numel() for p in parameters)}
        if self.settings.count_steps:
            entry["step"] = (epoch + 1) * self.steps_per_epoch
        return entry | {**self._throughput.totals(), "skipped_steps": self._skipped_steps}

    def _evaluate(self, module: nn.Module, epoch: int) -> dict[str, float]:
        assert self.evaluate is not None
        return self.evaluate(module, epoch)

    def _evaluates_at(self, epoch: int) -> bool:
        due = (epoch + 1) % self.settings.evaluate_epochs == 0 or epoch + 1 == self.settings.epochs
        return due and self.evaluate is not None

    def _finish_epoch(self, epoch: int, entry: dict[str, Any], log: EpochLog | None, scalars: ScalarWriter) -> None:
        """Logs, then saves: a kill between the two leaves a line that the resumed run writes again, never a gap."""
        where = self._place(epoch + 1, 0) if self.settings.count_steps else f"epoch {epoch}"
        logger.info("%s: %s", where, "  ".join(f"{key} {_short(value)}" for key, value in entry.items()))
        if log is not None:
            log.write(entry)
        if self.settings.best_metric is not None:
            self._keep_best(self.settings.best_metric, epoch, entry)
        if (epoch + 1) % self.settings.save_epochs == 0 or epoch + 1 == self.settings.epochs:
            self._save(numbered_file(self.checkpoint_number(epoch)), epoch + 1, 0)
        elif self._saves_at((epoch + 1) * self.steps_per_epoch):
            self._save(LAST, epoch + 1, 0)
        if self.folder is not None and self.on_epoch_end is not None:
            self.on_epoch_end(epoch, scalars)

    def _keep_best(self, metric: str, epoch: int, entry: Mapping[str, Any]) -> None:
        """Writes what is the best so far, before the epoch's checkpoint, so that a killed run does it again."""
        of_average = f"ema_{metric}"
        scores = {name: entry[f"test_{name}"] for name in (metric, of_average) if f"test_{name}" in entry}
        better = {name: score for name, score in scores.items() if score > self._best.get(name, -math.inf)}
        self._best.update(better)
        for name, score in scores.items():
            logger.info("%s %.3f, the best so far %.3f", name, score, self._best.get(name, math.nan))
        if not self._makes_checkpoints or not better:
            return
        state = self._state(epoch + 1, 0)
        if metric in better:
            self._write(BEST, state)
        if of_average in better:
            # Under the key that everyone reads; the training state belongs to other weights and stays out.
            training = ("optimizer", "scaler", "averages", "progress", "model_ema")
            kept = {key: value for key, value in state.items() if key not in training}
            self._write(BEST_EMA, {**kept, "model": state["model_ema"]})

    def _save(self, name: str, epoch: int, done: int) -> None:
        """Writes a checkpoint that the run can be continued from, if the run writes any."""
        if self._makes_checkpoints:
            self._write(name, self._state(epoch, done))
        self._throughput.restart_window()

    @property
    def _makes_checkpoints(self) -> bool:
        """Whether this process has a part in what a checkpoint holds."""
        return self.folder is not None and self.settings.save

    def _write(self, name: str, state: Mapping[str, Any]) -> None:
        if self.folder is not None:
            self.folder.save(name, state)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Brings a tensor to a device, without waiting for it; one that is there stays."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()  # a copy from pageable memory may make the host wait
    return tensor.to(device, non_blocking=True)


def seed_step(seed: int, global_step: int, rank: int) -> None:
    """Seeds Python, NumPy and torch for one optimizer step.

    Dropout, stochastic depth and mixup then depend on the step alone, not on what ran before it, so a run continued
    from a checkpoint draws the same numbers without storing any generator's state.
    """
    words = np.random.SeedSequence((seed, global_step, rank)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002  (timm's mixup draws from NumPy's global generator)
    torch.manual_seed(int(words[2]))


class _Flag:
    is_set = False


@contextlib.contextmanager
def _termination_flag() -> Iterator[_Flag]:
    """Turns SIGTERM into a flag while the loop runs."""
    flag = _Flag()

    def raise_flag(*_: Any) -> None:
        flag.is_set = True

    try:
        previous = signal.signal(signal.SIGTERM, raise_flag)
    except ValueError:  # not in the main thread: someone else's process, someone else's signals
        yield flag
        return
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, previous)


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
