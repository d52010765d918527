"""Batches of an epoch: the same images in the same order, whatever the number of ranks, workers and restarts."""

import atexit
import contextlib
import gc
import logging
import multiprocessing.connection
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import KW_ONLY, dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from beit.data.datasets import UNREADABLE, Key, random_stream
from beit.errors import InputError, counted

logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]
Unreadable = Sequence[tuple[int, str]]  # (index, reason) of each image that could not be read
AnswerT = TypeVar("AnswerT")
Loaded = tuple[Batch, Unreadable | InputError]  # an error is returned: raised, it would reach us as a traceback's text

LOOK_EVERY, TELL_EVERY = 5, 60  # seconds of waiting for data


class EpochDataset(Protocol, Sized):
    """What a loader reads: samples addressed by ``(epoch, index)``, as in an ``ImageDataset``."""

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Returns one sample: tensors and, under ``UNREADABLE``, the images that had to be replaced, if any."""

    def name(self, index: int) -> str:
        """Returns what to call item ``index`` in a message; for files, the path."""


class EvenlySpread:
    """``count`` samples of a data set (at most all) at even distances, so that every class folder has its share."""

    def __init__(self, dataset: EpochDataset, count: int) -> None:
        self.dataset = dataset
        self.indices = [position * len(dataset) // count for position in range(count)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, position = key
        return self.dataset[epoch, self.indices[position]]

    def name(self, index: int) -> str:
        """Returns what the data set calls its item ``index``, as its samples say which of them could not be read."""
        return self.dataset.name(index)


@dataclass(eq=False)
class EpochLoader:
    """Iterates over the host batches of one rank, epoch by epoch, from any batch on.

    The order of an epoch depends on ``(seed, epoch)`` alone. Global batch ``k`` is the ``k``-th slice of
    ``batch_size * world_size`` images, and rank ``r`` reads the ``r``-th part of it. A sample depends on
    ``(seed, epoch, index)`` (see ``ImageDataset``), so neither ranks, workers nor a restart change what is seen.

    Unreadable files are replaced by the data set; the loader logs each once, and stops the run if there are too many.

    With ``drop_last`` the incomplete global batch at the end is dropped; without, every image is seen exactly once, and
    ranks may get different numbers of batches.

    Raises:
        InputError: The batch size is not positive, or (with ``drop_last``) exceeds the data set.
    """

    dataset: EpochDataset
    batch_size: int  # images per rank and batch
    seed: int = 0  # of the order
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0  # processes that load ahead, kept from epoch to epoch; 0 loads in this process
    pin_memory: bool = False  # page-locked memory, for asynchronous copies to a GPU
    shuffle: bool = True  # a new order every epoch, not the data set's
    drop_last: bool = True
    _: KW_ONLY
    max_unreadable: int | None = None  # files tolerated; None is 1 % of the data set, at least 10
    while_waiting: Callable[[], None] | None = None  # called every few seconds without a batch; may raise
    multiprocessing_context: str | None = None  # fork, forkserver or spawn; None for the platform's default

    def __post_init__(self) -> None:
        size, ranks = len(self.dataset), self.world_size
        if self.batch_size < 1 or self.num_workers < 0:
            raise InputError(
                f"batch_size must be at least 1 and num_workers at least 0, got {self.batch_size}, {self.num_workers}"
            )
        if self.drop_last and size < self.batch_size * ranks:
            advice = f"lower --batch_size to at most {size // ranks}" if size >= ranks else "use fewer processes"
            batch = f"batch size {self.batch_size} on {counted(ranks, 'process')}"
            raise InputError(f"{batch} exceeds the data set of {counted(size, 'image')}: {advice}")
        if self.max_unreadable is None:
            self.max_unreadable = max(10, size // 100)
        self.unreadable: dict[int, str] = {}  # index -> reason, every bad file once
        self._sampler = _Sampler()
        self._loader: DataLoader[Any] | None = None
        self._iterator: Iterator[Loaded] = iter(())  # of the loader; held here only, as its workers end with it
        self._workers: list[BaseProcess] = []
        self._stalled = False  # the workers have not answered for a while
        self._turn = 0  # number of calls of epoch(): only the epoch asked for last goes on

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches of this rank in a whole epoch."""
        whole, rest = divmod(len(self.dataset), self.batch_size * self.world_size)
        return whole + int(not self.drop_last and rest > self.rank * self.batch_size)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Returns the image indices of an epoch, over all ranks, int64 ``(len(dataset),)``."""
        if not self.shuffle:
            return np.arange(len(self.dataset))
        return random_stream(self.seed, epoch, purpose="order").permutation(len(self.dataset))

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Iterates over this rank's batches of an epoch (from 0), dicts of stacked tensors ``(B, ...)``.

        Batches before ``first_batch`` are neither loaded nor decoded. Calling ``epoch`` again ends the iterator and
        drops what the workers have prepared for it.

        Raises:
            InputError: Too many files cannot be read, or a worker process died.
        """
        if not 0 <= first_batch <= self.batches_per_epoch:
            raise ValueError(f"batch {first_batch} is not in an epoch of {self.batches_per_epoch} batches")
        self._turn += 1
        return self._batches(epoch, first_batch, self._turn)

    def once(self) -> Iterator[tuple[NDArray[np.int64], Batch]]:
        """Iterates over this rank's batches of one epoch, each with the indices of its images, and ends the workers."""
        order, size = self.order(0), self.batch_size
        starts = range(self.rank * size, len(order), self.world_size * size)
        try:
            for start, batch in zip(starts, self.epoch(0), strict=False):
                yield order[start : start + size], batch
        finally:
            self.close()

    def close(self) -> None:
        """Ends the worker processes; a later epoch starts new ones."""
        self._turn += 1
        iterator: Any = self._iterator
        workers, self._workers = self._workers, []
        self._loader, self._iterator = None, iter(())
        if self._stalled or any(worker.exitcode is not None for worker in workers):
            # One that was killed may have held the lock of the event that ends the others, so that setting it would
            # wait forever, and one that hangs does not end: kill them, and give the iterator another event to set.
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.join()
            iterator._workers_done_event = threading.Event()
        if workers:
            # As deleting the iterator does, but the traceback of an error may still hold it.
            iterator._shutdown_workers()
            for worker in workers:
                worker.kill()  # one that was stopped has not ended

    def _batches(self, epoch: int, first_batch: int, turn: int) -> Iterator[Batch]:
        self._require_turn(turn)
        # Local names, not self: a reference cycle would leave the workers to the garbage collector.
        order, size, stride = self.order(epoch), self.batch_size, self.batch_size * self.world_size
        starts = range(first_batch * stride + self.rank * size, self.batches_per_epoch * stride, stride)
        self._sampler.batches = ([(epoch, i) for i in order[start : start + size].tolist()] for start in starts)
        for batch, unreadable in self._loaded():
            self._account(unreadable)
            yield batch
            self._require_turn(turn)

    def _loaded(self) -> Iterator[Loaded]:
        try:
            self._begin()
            while (loaded := self._answer(lambda: next(self._iterator, None))) is not None:
                yield loaded
        except (RuntimeError, OSError, EOFError) as error:
            # A dead worker shows up as one of these, but so does an exception in a live one, which needs no comment.
            codes = _exit_codes(self._workers)
            if not codes and "shared memory" in str(error):
                codes = ["no shared memory left"]
            if not codes:
                raise
            self.close()
            raise InputError(
                f"a data loading process died ({', '.join(codes)}), most often because memory ran out: lower "
                f"--num_workers (now {self.num_workers}) or the batch size, or give the machine more (shared) memory "
                "(docker run --shm-size)"
            ) from error

    def _answer(self, ask: Callable[[], AnswerT]) -> AnswerT:
        """Returns what the data loader answers, which its workers may be long in giving; see :meth:`_look`."""
        self._asked, self._told = time.monotonic(), TELL_EVERY
        self._stalled = True  # until they answer, also if a signal ends the wait
        answer = ask()
        self._stalled = False
        return answer

    def _look(self) -> None:
        """Says now and then that no data come; called every few seconds of waiting."""
        if (waited := time.monotonic() - self._asked) >= self._told:
            logger.warning("no data for %.0f s: the data loading processes hang, or the storage does", waited)
            self._told += TELL_EVERY
        if self.while_waiting is not None:
            self.while_waiting()

    def _begin(self) -> None:
        """Starts the iterator of an epoch and, the first time, the workers."""
        if self._loader is None:
            self._loader = self._data_loader()
        if self._workers:
            self._iterator = self._answer(partial(iter, self._loader))  # once those that stay have been reset
            return
        before = set(multiprocessing.active_children())
        with _signals_undisturbed():
            self._iterator = iter(self._loader)
        self._workers = list(set(multiprocessing.active_children()) - before)
        if self._workers:
            _look_while_waiting(self._iterator, weakref.WeakMethod(self._look))

    def _require_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise RuntimeError("this epoch has ended: another one was started, or the loader was closed")

    def _data_loader(self) -> "DataLoader[Any]":
        workers = self.num_workers > 0
        if workers:
            # A loader that has become garbage must end here: collected in a forked worker, it would disturb that one.
            gc.collect()
            _open.add(self)
        return DataLoader(
            _Batches(self.dataset),
            batch_sampler=self._sampler,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=workers,
            multiprocessing_context=self.multiprocessing_context if workers else None,
            worker_init_fn=_start_worker,
            # Its own generator: otherwise each epoch would draw from the global one, and stopping in the middle of an
            # epoch would change dropout afterwards.
            generator=torch.Generator(),
        )

    def _account(self, unreadable: Unreadable | InputError) -> None:
        if isinstance(unreadable, InputError):
            raise unreadable
        for index, reason in unreadable:
            if index not in self.unreadable:
                self.unreadable[index] = reason
                logger.error("unreadable image %s (%s)", self.dataset.name(index), reason)
        if self.max_unreadable is not None and len(self.unreadable) > self.max_unreadable:
            index, reason = next(iter(self.unreadable.items()))
            raise InputError(
                f"{len(self.unreadable)} of {len(self.dataset)} images cannot be read, more than the "
                f"{self.max_unreadable} tolerated; the first: {self.dataset.name(index)} ({reason}). "
                "Repair or remove them, or raise --max_unreadable"
            )


class _Sampler:
    """A batch sampler that gets its batches before each epoch, so that the data loader and its workers can stay."""

    batches: Iterator[list[Key]]

    def __iter__(self) -> Iterator[list[Key]]:
        return self.batches


class _Batches(Dataset[Any]):
    """Stacks samples into batches in the worker, and lists beside them what was unreadable."""

    def __init__(self, dataset: EpochDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: list[Key]) -> Loaded:
        """Returns the stacked samples of ``keys``, and what could not be read."""
        several = getattr(self.dataset, "__getitems__", None)  # PyTorch's name for it; not every data set has it
        try:
            with _one_thread():
                samples = [self.dataset[key] for key in keys] if several is None else several(keys)
        except InputError as error:
            return {}, error
        unreadable = [entry for sample in samples for entry in sample.pop(UNREADABLE, ())]
        # A worker stacks straight into memory that the main process sees.
        return {name: default_collate([sample[name] for sample in samples]) for name in samples[0]}, unreadable


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Computes as workers do: without AVX2, torch's resizing rounds otherwise where threads share an image."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _as_is(loaded: Any) -> Any:
    return loaded


def _start_worker(_worker: int) -> None:
    # Several workers with several threads each would compete for the cores.
    torch.set_num_threads(1)
    # A terminal or a scheduler signals all processes at once. The main process decides when to stop and may need a few
    # more batches to end well; the workers end with it. (A second SIGTERM is obeyed: a main process that crashes sends
    # it to workers that it could not tell to stop.)
    for name in {"SIGINT", "SIGHUP", "SIGUSR1"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_once)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())


def _ignore_once(_signal: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _look_while_waiting(iterator: Any, look: "weakref.WeakMethod[Callable[[], None]]") -> None:
    """Lets a data loader's iterator call ``look`` at intervals while it waits; its own timeout would lose what came."""
    own, get = weakref.proxy(iterator), type(iterator)._try_get_data  # a cycle would leave the workers to the collector

    def try_get_data(_timeout: float = 0) -> tuple[bool, Any]:
        found: tuple[bool, Any] = get(own, LOOK_EVERY)
        if not found[0] and (alive := look()) is not None:
            alive()
        return found

    iterator._try_get_data = try_get_data


_open: "weakref.WeakSet[EpochLoader]" = weakref.WeakSet()  # loaders with workers


@atexit.register
def close_loaders() -> None:
    """Ends the worker processes of all loaders.

    Left to the garbage collector, a loader's queues may be collected before it: its workers never hear of the end, and
    each is waited for.
    """
    for loader in tuple(_open):
        loader.close()


@contextlib.contextmanager
def _signals_undisturbed() -> Iterator[None]:
    """Lets a data loader start its workers without changing how this process handles signals.

    PyTorch's SIGCHLD handler raises wherever the main process happens to be, such as in an optimizer step or a save;
    without it the loader notices a dead worker within 5 seconds. Signals to stop wait until workers can handle them.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler, mask = signal.getsignal(signal.SIGCHLD), signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)


def _exit_codes(workers: Sequence[BaseProcess]) -> list[str]:
    """Returns how workers ended, for those that did: signal names or exit statuses."""
    # What a dying worker breaks is noticed before its end is: wait for that, and then for its exit status.
    ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1) if workers else []
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(timeout=5)
    codes = sorted({worker.exitcode for worker in workers if worker.exitcode is not None})
    return [signal.Signals(-code).name if code < 0 else f"exit status {code}" for code in codes]
