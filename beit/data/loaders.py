"""Batches of an epoch: the same images, in the same order, whatever the number of ranks, workers and restarts."""

import atexit
import contextlib
import functools
import gc
import logging
import multiprocessing.connection
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from beit.data.datasets import UNREADABLE, Key, random_stream
from beit.errors import InputError

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]

BATCH_FLAG = "--batch_size (--samples_per_gpu in segmentation)"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class EpochDataset(Protocol, Sized):
    """What a loader reads: samples addressed by ``(epoch, index)``; an ``ImageDataset`` is one."""

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Returns one sample: tensors, and under ``UNREADABLE`` what was replaced on the way, if anything."""
        ...

    def name(self, index: int) -> str:
        """Returns what to call item ``index`` in a message, for files the path."""
        ...


class EpochLoader:
    """Iterates over the host batches of one rank, epoch by epoch, from any batch on.

    The order of an epoch follows from ``(seed, epoch)`` alone. Global batch ``k`` is the ``k``-th slice of
    ``batch_size * world_size`` images, and rank ``r`` reads the ``r``-th part of it. A sample follows from
    ``(seed, epoch, index)`` (see ``ImageDataset``), so neither ranks, workers nor a restart change what is seen.

    Files that cannot be read are replaced by the data set; the loader logs each once and ends the run when there are
    too many.

    Args:
        dataset: Samples by ``(epoch, index)``.
        batch_size: Images per rank and batch.
        seed: Decides the order.
        rank: This process.
        world_size: Number of processes.
        num_workers: Worker processes that load ahead, kept from epoch to epoch; 0 loads in this process.
        pin_memory: Put batches into page-locked memory, for asynchronous copies to a GPU.
        shuffle: A new order every epoch; False is the data set's order.
        drop_last: Leave out the incomplete global batch at the end. Without it every image is seen exactly once, and
            ranks may get different numbers of batches.
        max_unreadable: Unreadable files that are put up with; ``None`` is 1 % of the data set, at least 10.
        prefetch_factor: Batches each worker loads ahead.
        multiprocessing_context: How workers start: fork, forkserver, spawn, or ``None`` for the platform's way.

    Raises:
        InputError: The batch size is not positive, or (with ``drop_last``) more than the data set.
    """

    def __init__(
        self,
        dataset: EpochDataset,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        shuffle: bool = True,
        drop_last: bool = True,
        *,
        max_unreadable: int | None = None,
        prefetch_factor: int = 2,
        multiprocessing_context: str | None = None,
    ) -> None:
        if batch_size < 1 or num_workers < 0:
            raise InputError(
                f"batch_size must be at least 1 and num_workers at least 0, got {batch_size}, {num_workers}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} ranks")
        self.dataset = dataset
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.drop_last = shuffle, drop_last
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.max_unreadable = max(10, len(dataset) // 100) if max_unreadable is None else max_unreadable
        self.unreadable: dict[int, str] = {}  # index -> reason, every bad file once
        self._prefetch_factor, self._context = prefetch_factor, multiprocessing_context
        if drop_last and len(dataset) < batch_size * world_size:
            raise InputError(self._too_small())
        self._sampler = _KeySampler()
        self._loader: DataLoader[Any] | None = None
        self._turn = 0  # which call of epoch() the workers serve

    @property
    def batches_per_epoch(self) -> int:
        """Batches this rank gets in a whole epoch."""
        whole, rest = divmod(len(self.dataset), self.batch_size * self.world_size)
        return whole + int(not self.drop_last and rest > self.rank * self.batch_size)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Returns the image indices of an epoch, over all ranks, int64 ``(len(dataset),)``."""
        if not self.shuffle:
            return np.arange(len(self.dataset))
        return random_stream(self.seed, epoch, purpose="order").permutation(len(self.dataset))

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Iterates over this rank's batches of an epoch.

        Args:
            epoch: Counts from 0.
            first_batch: Where to begin; what comes before is neither loaded nor decoded.

        Returns:
            An iterator over dicts of stacked tensors ``(B, ...)``. Calling ``epoch`` again ends it: batches the
            workers have prepared for it are dropped.

        Raises:
            InputError: Too many files cannot be read, or a worker process died.
        """
        if not 0 <= first_batch <= self.batches_per_epoch:
            raise ValueError(f"batch {first_batch} is not in an epoch of {self.batches_per_epoch} batches")
        self._turn += 1
        return self._batches(epoch, first_batch, self._turn)

    def close(self) -> None:
        """Ends the worker processes; a later epoch starts them anew."""
        self._turn += 1
        loader, self._loader = self._loader, None
        _end_workers(getattr(loader, "_iterator", None))

    def _batches(self, epoch: int, first_batch: int, turn: int) -> Iterator[Batch]:
        self._require_turn(turn)
        numbers = range(first_batch, self.batches_per_epoch)
        # Bound without self: a circle of references would leave the workers to the garbage collector.
        self._sampler.batches = functools.partial(
            _rank_batches, epoch, self.order(epoch), numbers, self.batch_size, self.rank, self.world_size
        )
        for batch, unreadable in self._loaded():
            self._account(unreadable)
            yield batch
            self._require_turn(turn)

    def _loaded(self) -> Iterator[tuple[Batch, "Unreadable | _Failure"]]:
        try:
            yield from _begin(self._data_loader())
        except (RuntimeError, OSError, EOFError) as error:
            # A dead worker shows as one of these; but so do exceptions inside a live one, which speak for themselves.
            codes = _exit_codes(self._loader)
            if not codes:
                raise
            self.close()
            raise InputError(
                f"a data loading process died ({', '.join(codes)}), most often because memory ran out: lower "
                f"--num_workers (now {self.num_workers}) or the batch size, or give the machine more (shared) memory"
            ) from error

    def _require_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise RuntimeError("this epoch was left: another one has been started, or the loader was closed")

    def _data_loader(self) -> "DataLoader[Any]":
        if self._loader is None:
            workers = self.num_workers > 0
            if workers:
                # A loader that has become garbage must end here; collected in a forked worker it would disturb that.
                gc.collect()
                atexit.register(_close_at_exit, weakref.ref(self))
            self._loader = DataLoader(
                _Batches(self.dataset),
                batch_sampler=self._sampler,
                collate_fn=_as_is,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                persistent_workers=workers,
                prefetch_factor=self._prefetch_factor if workers else None,
                multiprocessing_context=self._context if workers else None,
                worker_init_fn=_start_worker,
                # A generator of its own: without one each epoch would take a number from the global generator, and
                # stopping in the middle of an epoch would change what dropout draws afterwards.
                generator=torch.Generator(),
            )
        return self._loader

    def _account(self, unreadable: "Unreadable | _Failure") -> None:
        if isinstance(unreadable, _Failure):
            raise InputError(unreadable.message)
        for index, reason in unreadable:
            if index not in self.unreadable:
                self.unreadable[index] = reason
                logger.error("unreadable image %s (%s): another takes its place", self.dataset.name(index), reason)
        if len(self.unreadable) > self.max_unreadable:
            index, reason = next(iter(self.unreadable.items()))
            raise InputError(
                f"{len(self.unreadable)} of {len(self.dataset)} images cannot be read, more than the "
                f"{self.max_unreadable} put up with; the first: {self.dataset.name(index)} ({reason}). "
                "Repair or remove them, or raise --max_unreadable"
            )

    def _too_small(self) -> str:
        size, ranks = len(self.dataset), self.world_size
        images = "1 image" if size == 1 else f"{size} images"
        if ranks == 1:
            return f"batch size {self.batch_size} is more than the data set of {images}: lower {BATCH_FLAG}"
        what = f"{ranks} processes x batch size {self.batch_size} is more than the data set of {images}"
        if size < ranks:
            return f"{what}: use fewer processes"
        return f"{what}: {size // ranks} is the most that works ({BATCH_FLAG})"


Unreadable = Sequence[tuple[int, str]]


class _KeySampler:
    """A batch sampler whose batches are set before each epoch; the data loader and its workers stay."""

    batches: Callable[[], Iterator[list[Key]]]

    def __iter__(self) -> Iterator[list[Key]]:
        return self.batches()


def _rank_batches(
    epoch: int, order: NDArray[np.int64], numbers: range, batch_size: int, rank: int, world_size: int
) -> Iterator[list[Key]]:
    """Yields the keys of one rank's share of the global batches ``numbers``."""
    for number in numbers:
        start = (number * world_size + rank) * batch_size
        yield [(epoch, index) for index in order[start : start + batch_size].tolist()]


class _Failure:
    """An ``InputError`` on its way from a worker: raised there, it would arrive wrapped in a traceback as text."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Batches(Dataset[Any]):
    """Makes whole batches where the samples are made, and keeps what was unreadable beside them."""

    def __init__(self, dataset: EpochDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: list[Key]) -> tuple[Batch, Unreadable | _Failure]:
        """Returns the stacked samples of ``keys`` and what could not be read on the way."""
        try:
            samples = _samples(self.dataset, keys)
        except InputError as error:
            return {}, _Failure(str(error))
        unreadable = [entry for sample in samples for entry in sample.pop(UNREADABLE, ())]
        # A worker stacks straight into memory that the main process sees.
        return {name: default_collate([sample[name] for sample in samples]) for name in samples[0]}, unreadable


def _samples(dataset: EpochDataset, keys: list[Key]) -> list[dict[str, Any]]:
    several = getattr(dataset, "__getitems__", None)  # PyTorch's name for it; not every data set has it
    return [dataset[key] for key in keys] if several is None else several(keys)


def _as_is(loaded: Any) -> Any:
    return loaded


def _start_worker(_worker: int) -> None:
    # Several workers with several threads each would fight for the cores.
    torch.set_num_threads(1)
    # A terminal and a scheduler signal all processes at once. When to stop is the main process's decision, which may
    # need a few more batches to end well; the workers end with it. (A second SIGTERM is obeyed: a main process that
    # ends in disorder sends it to workers it could not tell to stop.)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _forgive_once)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _forgive_once(_signal: int, _frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _close_at_exit(reference: "weakref.ref[EpochLoader]") -> None:
    loader = reference()
    if loader is not None:
        loader.close()


def _begin(loader: "DataLoader[Any]") -> Iterator[Any]:
    """Returns the loader's iterator, without the signal handler that the first one with workers installs.

    The handler raises an error for a dead worker wherever the main process happens to be: in the middle of an
    optimizer step, or of the clean-up after that error. Without it the loader notices within 5 seconds, where batches
    are asked for.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    with _stop_signals_held():
        batches = iter(loader)
    if before is not None and signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)
    return batches


@contextlib.contextmanager
def _stop_signals_held() -> Iterator[None]:
    """Holds back signals that ask to stop: a worker that starts meanwhile gets them once it knows what to do."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers(batches: Any) -> None:
    """Ends the workers of a loader's iterator, if it has any."""
    processes = getattr(batches, "_workers", ())
    if any(process.exitcode is not None for process in processes):
        # One that was killed may have held a lock they share, and the orderly way would wait for it for ever: end
        # the others the same way, and keep from the event that is behind the lock.
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        batches._workers_done_event = threading.Event()
    if processes:
        # As deleting the iterator does; but an epoch that someone still holds would keep it.
        batches._shutdown_workers()


def _exit_codes(loader: "DataLoader[Any] | None") -> list[str]:
    """Returns how the loader's workers ended, of those that did: signal names or exit statuses."""
    workers = getattr(getattr(loader, "_iterator", None), "_workers", ())
    # What a dying worker breaks is noticed before its end is: wait for it, and then for its exit status.
    sentinels = {worker.sentinel: worker for worker in workers}
    for sentinel in multiprocessing.connection.wait(list(sentinels), timeout=1) if sentinels else ():
        sentinels[sentinel].join(timeout=5)
    codes = sorted({worker.exitcode for worker in workers if worker.exitcode is not None})
    return [signal.Signals(-code).name if code < 0 else f"exit status {code}" for code in codes]
