"""The training loop: any module, on any loader, from any optimizer step on.

A job supplies the step, a function from a batch to a loss; the rest, from accumulation to signals, is done here.
"""

import contextlib
import logging
import math
import random
import signal
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from beit.errors import InputError
from beit.storage import Checkpoint
from beit.training import distributed
from beit.training.checkpoint import BEST, BEST_EMA, LAST, numbered_file
from beit.training.environment import describe_environment
from beit.training.logging import Averages, EpochLog, Progress, Throughput, memory_in_use
from beit.training.optim import apply_schedules
from beit.training.state import Batch, TrainingState
from beit.training.trackers import Trackers

logger = logging.getLogger(__name__)

LONGEST_WINDOW = 5.0  # seconds between two looks at the device's numbers, if steps are not longer
SOON = 10  # steps
MOST_OVERFLOWS = 50  # in a row; the loss scale falls from 65536 to 1 in 16
STOP_SIGNALS = [signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
PATIENCE_WITH_DATA = 5.0  # seconds
REMEDY = "Lower --lr, set --clip_grad, or use --amp_dtype fp32"


class NonFiniteLossError(RuntimeError):
    """The loss or the gradients became NaN or infinite; the last checkpoint is from before that."""


class Stopped(Exception):
    """The run was asked to end by a signal and has saved where it was, if it saves. ``signal`` is its number."""

    def __init__(self, message: str, number: int = signal.SIGTERM, *, saved: bool = True) -> None:
        kept = "the same command resumes from there" if saved else "nothing is kept of a run without --output_dir"
        super().__init__(f"{message}; {kept}")
        self.signal = number


@dataclass(kw_only=True)
class Trainer(TrainingState):
    """Trains a module and can be stopped and resumed at any optimizer step. The fields are :class:`TrainingState`'s."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._device = self.precision.device
        self._names: list[str] = []  # of the metrics in the window's rows
        self._window: list[Tensor] = []  # one row of metrics per step, on the device
        self._window_limit = 1  # steps until the next look at them; grows once their pace is known
        self._overflows = 0  # in a row
        self.stop_wish = StopWish()  # data loaders look at it while data do not come

    def fit(self) -> list[dict[str, Any]]:
        """Trains from the current position to the last step; returns the run's log, as it is in ``log.txt``.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite on some process; all of them raise.
            Stopped: SIGTERM, SIGINT, SIGHUP or SIGUSR1 came; the position has been saved.
        """
        model, total, period = self._distribute(), self.settings.total_steps, self.settings.period
        name = period.name
        periods_done = (self.first_step - self._period_open) // period.steps
        self.stop_wish.saves = distributed.on_main(lambda: self._makes_checkpoints)
        log = EpochLog(self.folder.path / "log.txt" if self.folder else None, name, periods_done, self._fresh)
        scalars = self._open_trackers()
        step, is_open = self.first_step, self._period_open
        with scalars, self.stop_wish:
            if self.is_done:
                logger.info("all %d %ss are done: nothing left to train", total // period.steps, name)
            with contextlib.closing(self._batches(step * self.settings.update_freq)) as batches:
                while step < total or is_open:
                    end = step if is_open else self._next_end(step)
                    self._train(model, batches, step, end, scalars)
                    saved = is_open
                    if not is_open and self.settings.save_last_every and self._evaluates_at(end):
                        self._save(LAST, end, period_open=True)  # the evaluation may take long
                        saved = True
                    with self.stop_wish.at_once(self._place(end)) if saved else contextlib.nullcontext():
                        entry = self._log_entry(end, scalars)
                    self._averages = Averages()
                    self._finish_period(end, entry, log, scalars)
                    step, is_open = end, False
                    wish = torch.tensor([float(self.stop_wish.is_set)], device=self._device)
                    if step < total and distributed.sum_over_ranks(wish).item():
                        self._stop(step)
        return log.entries

    def _open_trackers(self) -> Trackers:
        config = {**self.config, "environment": describe_environment(self._device, distributed.world_size())}
        run = {"folder": self.folder, "log_dir": self.log_dir, "fresh": self._fresh, "config": config}
        return Trackers(() if self.is_done else self.report_to, first_step=self.first_step, **run)

    def _next_end(self, step: int) -> int:
        """Returns the next step after which a line goes into the log."""
        settings = self.settings
        lengths = [settings.save_every, *([settings.evaluate_every] if self.evaluate else [])]
        if settings.period.name == "epoch":
            lengths = [settings.period.steps]
        return min(settings.total_steps, *((step // length + 1) * length for length in lengths))

    def _batches(self, first: int) -> Generator[Batch, None, None]:
        """Yields this process's batches from number ``first`` on, epoch after epoch."""
        per_epoch = self.loader.batches_per_epoch
        if self.settings.period.name == "epoch":  # batches too few for one more step are left out
            per_epoch = self.settings.period.steps * self.settings.update_freq
        while True:
            epoch, position = divmod(first, per_epoch)
            batches = self.loader.epoch(epoch, position)
            try:
                yield from islice(batches, per_epoch - position)
            finally:
                getattr(batches, "close", lambda: None)()
            first += per_epoch - position

    def _distribute(self) -> nn.Module:
        if distributed.world_size() == 1:
            return self.model
        devices = [self._device.index] if self._device.type == "cuda" else None
        # Buffers are indices, and statistics that are computed over all processes. Newer torch renamed the option.
        newer = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
        synchronise: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
        return DistributedDataParallel(self.model, device_ids=devices, gradient_as_bucket_view=True, **synchronise)

    def _train(self, model: nn.Module, batches: Iterator[Batch], first: int, end: int, scalars: Trackers) -> None:
        model.train()
        self._throughput = Throughput(self.images_per_step)
        progress = self._progress(first, end)
        alone = distributed.world_size() == 1
        try:
            for done in range(first + 1, end + 1):
                try:
                    self._window.append(self._optimizer_step(model, batches, done - 1))
                except (InputError, Stopped):  # the data have failed; what was trained is kept
                    if alone and done - 1 > self.first_step:
                        if self._window:
                            self._close_window(done - 1, scalars, progress)
                        self._save(LAST, done - 1)
                    raise
                save = self._saves_last_at(done) and done != end
                if done == end or save or len(self._window) >= self._window_limit or (alone and self.stop_wish.is_set):
                    if self._close_window(done, scalars, progress):
                        self._stop(done, period_open=done == end)
                    if save:
                        self._save(LAST, done)
        finally:
            progress.close()

    def _progress(self, first: int, end: int) -> Progress:
        period, total = self.settings.period, self.settings.total_steps
        if period.name == "step":
            return Progress("Training", total, first)
        number = (end - 1) // period.steps
        head = f"Epoch [{number + 1}/{total // period.steps}]"
        return Progress(head, period.steps, first, before=-number * period.steps)

    def _stop(self, step: int, period_open: bool = False) -> NoReturn:
        self._save(LAST, step, period_open)
        distributed.barrier()  # a launcher ends the others when one is gone: not before the checkpoint is written
        raise Stopped(f"stopped at {self._place(step)}", self.stop_wish.signal, saved=self.stop_wish.saves)

    def _saves_last_at(self, step: int) -> bool:
        return self.settings.save_last_every > 0 and step % self.settings.save_last_every == 0

    def _optimizer_step(self, model: nn.Module, batches: Iterator[Batch], global_step: int) -> Tensor:
        """Takes one optimizer step; returns its metrics as one row on the device, without waiting for it."""
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
        """Adds a batch's gradients; between processes they are exchanged once per step, with the last batch's."""
        alone = contextlib.nullcontext if last or not isinstance(model, DistributedDataParallel) else model.no_sync
        with alone():
            with self.precision.autocast():
                loss, metrics = self.step(model, batch, global_step)
            self.precision.backward(loss / self.settings.update_freq)
        return loss, metrics

    def _update(self) -> Tensor:
        """Updates the weights with the accumulated gradients and returns the gradients' norm."""
        return self.precision.step(self.optimizer, self.model.parameters(), self.settings.clip_grad)

    def _loss_scale(self) -> float:
        return self.precision.loss_scale

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        start = self.stop_wish.waiting_since = time.perf_counter()
        try:
            batch = next(batches)
        finally:  # what was trained may be saved now, which no signal may cut off
            self.stop_wish.waiting_since = math.inf
        batch = batch if self.prepare is None else self.prepare(batch)
        self._throughput.waited(time.perf_counter() - start)
        return to_device(batch, self._device)

    def _close_window(self, done: int, scalars: Trackers, progress: Progress) -> bool:
        """Fetches the window's metrics, the only wait for the device; returns whether any process was asked to stop."""
        rows = torch.stack(self._window)
        self._window = []
        if rows.is_cuda:  # the host is ahead of the device, and a window lasts until its steps are done
            torch.cuda.current_stream(rows.device).synchronize()
        wish = torch.tensor([float(self.stop_wish.is_set), self._throughput.window_seconds()])
        sums = torch.cat([rows.flatten(), wish.to(self._device)])
        together = distributed.sum_over_ranks(sums).cpu().double() / distributed.world_size()
        table, (stop, seconds) = together[:-2].reshape(rows.shape), together[-2:].tolist()
        # A wish to stop must not wait for many slow steps: launchers kill what has not ended after 30 seconds.
        limit = int(LONGEST_WINDOW * len(rows) / max(seconds, 1e-9))
        self._window_limit = min(max(limit, 1), self.settings.log_every)
        loss_scale = self._loss_scale()
        for global_step, row in enumerate(table.tolist(), start=done - len(rows)):
            values = dict(zip([*self._names, "grad_norm"], row, strict=True))
            self._record_step(global_step, values, loss_scale, scalars)
        speed = self._throughput.close_window(len(rows))
        scalars.write("perf", speed, done - 1)
        progress.update(done, self._console_text(done, speed))
        return stop > 0

    def _record_step(self, global_step: int, values: dict[str, float], loss_scale: float, scalars: Trackers) -> None:
        if not math.isfinite(values["loss"]):
            self._give_up(global_step, f"the loss is {values['loss']}")
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
        """Counts a step that float16 could not take; in any other format it has spoilt the weights."""
        if math.isfinite(norm):
            self._overflows = 0
            return
        self._skipped_steps += 1
        self._overflows += 1
        if self.precision.dtype != torch.float16:
            self._give_up(global_step, "the gradients are not finite")
        if self._overflows == MOST_OVERFLOWS:
            self._give_up(global_step, f"the gradients overflowed {MOST_OVERFLOWS} times in a row, the last time")

    def _give_up(self, global_step: int, reason: str) -> NoReturn:
        remedy = "the last checkpoint is from before it"
        if not self._fresh and global_step - self.first_step < SOON:
            remedy = "the checkpoint that was resumed leads there: choose an older one with --resume"
        raise NonFiniteLossError(f"{reason} at step {global_step} (counted from 0); {remedy}. {REMEDY}")

    def _console_text(self, done: int, speed: Mapping[str, float]) -> str:
        means = self._averages.means()
        metrics = "  ".join(f"{name} {means[name]:.4g}" for name in self._names if name in means)
        return (
            f"{metrics}  lr {self.lr(done - 1):.2e}  "
            f"{speed['images_per_second']:.0f} images/s  waiting for data {speed['data_wait']:.0%}  "
            f"memory {memory_in_use(self._device)}  left {self._throughput.remaining(self.settings.total_steps - done)}"
        )

    def _log_entry(self, step: int, scalars: Trackers) -> dict[str, float]:
        """Returns a line of the log, with the evaluation where one is due."""
        number = (step - 1) // self.settings.period.steps
        entry = {f"train_{name}": value for name, value in self._averages.means().items()}
        results: dict[str, float] = {}
        if self._evaluates_at(step):
            results = self._evaluate(self.model, number)
            if self.ema is not None and self.settings.evaluate_average:
                average = self._evaluate(self.ema.module, number)
                results = {**results, **{f"ema_{name}": value for name, value in average.items()}}
            results = {name if name.startswith("train_") else f"test_{name}": value for name, value in results.items()}
        entry |= results
        entry |= {"epoch": number, "n_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad)}
        if self.settings.period.name == "step":
            entry["step"] = step
        entry |= {**self._throughput.totals(), "skipped_steps": self._skipped_steps}
        scalars.write_period(results, entry, number, step)
        return entry

    def _evaluate(self, module: nn.Module, number: int) -> dict[str, float]:
        assert self.evaluate is not None
        return self.evaluate(module, number)

    def _evaluates_at(self, step: int) -> bool:
        due = step % self.settings.evaluate_every == 0 or step == self.settings.total_steps
        return due and self.evaluate is not None

    def _finish_period(self, step: int, entry: dict[str, float], log: EpochLog, scalars: Trackers) -> None:
        """Logs, then saves: a kill between the two leaves a line that the resumed run writes again, never a gap."""
        where = f"step {step}" if self.settings.period.name == "step" else f"epoch {entry['epoch']}"
        logger.info(
            "%s: %s", where, "  ".join(f"{k} {f'{v:.5g}' if isinstance(v, float) else v}" for k, v in entry.items())
        )
        if self.folder is not None:
            self.folder.ensure()
        log.write(entry)
        if self.settings.best_metric is not None:
            self._keep_best(self.settings.best_metric, step, entry)
        if step % self.settings.save_every == 0 or step == self.settings.total_steps:
            self._save(numbered_file(self.checkpoint_number(step)), step)
        elif self._saves_last_at(step):
            self._save(LAST, step)
        if self.folder is not None and self.on_epoch_end is not None:
            self.on_epoch_end(int(entry["epoch"]), scalars)

    def _keep_best(self, metric: str, step: int, entry: Mapping[str, float]) -> None:
        """Writes what is the best so far, before the numbered checkpoint, so that a killed run does it again."""
        of_average = f"ema_{metric}"
        scores = {name: entry[f"test_{name}"] for name in (metric, of_average) if f"test_{name}" in entry}
        better = {name: score for name, score in scores.items() if score > self._best.get(name, -math.inf)}
        self._best.update(better)
        for name, score in scores.items():
            logger.info("%s %.3f, best so far %.3f", name, score, self._best.get(name, math.nan))
        if better and self._makes_checkpoints:
            state = self._state(step)
            if metric in better:
                self._write(BEST, state)
            if of_average in better:
                # Under the key that everyone reads; the training state belongs to other weights and stays out.
                training = ("optimizer", "scaler", "averages", "progress", "model_ema")
                kept = {key: value for key, value in state.items() if key not in training}
                self._write(BEST_EMA, {**kept, "model": state["model_ema"]})

    def _save(self, name: str, step: int, period_open: bool = False) -> None:
        if self._makes_checkpoints:
            self._write(name, self._state(step, period_open))
        self._throughput.restart_window()

    @property
    def _makes_checkpoints(self) -> bool:
        """Whether this process has a part in what a checkpoint holds."""
        return self.folder is not None and self.settings.save

    def _write(self, name: str, state: Checkpoint) -> None:
        if self.folder is not None:
            self.folder.save(name, state)


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Moves a batch to a device without waiting for the copies."""

    def moved(tensor: Tensor) -> Tensor:
        if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
            tensor = tensor.pin_memory()  # a copy from pageable memory may make the host wait
        return tensor.to(device, non_blocking=True)

    return {name: moved(tensor) for name, tensor in batch.items()}


def seed_step(seed: int, global_step: int, rank: int) -> None:
    """Seeds Python, NumPy and torch for one step, so that a resumed run draws the same dropout, drop path and mixup."""
    words = np.random.SeedSequence((seed, global_step, rank)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002  (timm's mixup draws from NumPy's global generator)
    torch.manual_seed(int(words[2]))


class StopWish:
    """Whether a signal has asked the run to end: SIGTERM, SIGHUP, SIGUSR1 and the first SIGINT, while it is entered.

    A signal that is ignored when the run starts, as SIGHUP is under nohup, stays ignored; a second SIGINT ends at once.
    """

    is_set = False
    saves = True  # whether the run writes checkpoints
    signal = int(signal.SIGTERM)
    waiting_since = math.inf  # seconds of the performance counter; for data
    _place: str | None = None  # where an evaluation may be left at once

    def __enter__(self) -> None:
        self._previous: dict[signal.Signals, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return  # someone else's process, someone else's signals
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.is_set and number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_set, self.signal = True, number
        self.obey()

    @contextlib.contextmanager
    def at_once(self, place: str) -> Iterator[None]:
        """Raises :class:`Stopped` as soon as the wish is there: ``place`` has been saved."""
        self._place = place
        try:
            self.obey()
            yield
        finally:
            self._place = None

    def obey(self) -> None:
        """Raises :class:`Stopped` if the wish is there and nothing is lost, or no data have come for some seconds."""
        if not self.is_set:
            return
        if (place := self._place) is not None:
            self._place = None  # once
            raise Stopped(f"stopped at {place}, in the evaluation", self.signal, saved=self.saves)
        waited = time.perf_counter() - self.waiting_since
        # Other processes train on, and it takes a step of all to save.
        if waited > (PATIENCE_WITH_DATA if distributed.world_size() == 1 else 4 * PATIENCE_WITH_DATA):
            raise Stopped(f"stopped after waiting {waited:.0f} s for data", self.signal, saved=self.saves)
