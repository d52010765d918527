"""What is to be predicted of a batch, found one batch ahead, on a CUDA stream beside that of the training step."""

from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext

import torch

from beit.targets import PredictionTarget
from beit.training.loop import Batch, Loader, to_device
from beit.training.precision import Precision

COMPUTED = "targets"  # of the chosen patches of a batch


class TargetsAhead:
    """A loader whose batches lie on the device and hold their ``targets``.

    Those of a batch are asked for before the batch before is trained on. On a GPU both then run at the same time, as
    far as there is room; elsewhere one after the other, to the same numbers.

    Args:
        loader: Gives batches on the host.
        target: What is to be predicted.
        prepare: Applied to a batch on the host; adds its ``patch_index``.
        precision: Number format of the training step.
    """

    def __init__(
        self, loader: Loader, target: PredictionTarget, prepare: Callable[[Batch], Batch], precision: Precision
    ) -> None:
        self.loader, self.target, self.prepare, self.precision = loader, target, prepare, precision
        self.batch_size = loader.batch_size
        self._stream = torch.cuda.Stream(precision.device) if precision.device.type == "cuda" else None

    @property
    def batches_per_epoch(self) -> int:
        """Batches this process gets in a whole epoch."""
        return self.loader.batches_per_epoch

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Returns this process's batches of an epoch, from batch ``first_batch`` on."""
        if self._stream is not None:  # what the target is made of may still be on its way to the device
            self._stream.wait_stream(torch.cuda.current_stream(self.precision.device))
        with closing(self.loader.epoch(epoch, first_batch)) as batches:  # type: ignore[type-var]
            ready = self._begin(batches)
            while ready is not None:
                following = self._begin(batches)
                yield self._hand_over(*ready)
                ready = following

    def _begin(self, batches: Iterator[Batch]) -> tuple[Batch, torch.cuda.Event | None] | None:
        """Begins to bring the next batch to the device and to find its targets; None where there is no next.

        Returns:
            The batch, and what its stream comes by when all that is done.
        """
        host_batch = next(batches, None)
        if host_batch is None:
            return None
        aside = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with aside, self.precision.autocast():
            device = self.precision.device
            batch = {name: to_device(tensor, device) for name, tensor in self.prepare(host_batch).items()}
            batch[COMPUTED] = self.target.compute(batch, batch["patch_index"])
        return batch, None if self._stream is None else self._stream.record_event()

    def _hand_over(self, batch: Batch, done: torch.cuda.Event | None) -> Batch:
        """Makes the stream of the training step wait for the batch, whose memory is kept until that has read it."""
        if done is not None:
            step = torch.cuda.current_stream(self.precision.device)
            step.wait_event(done)
            for tensor in batch.values():
                tensor.record_stream(step)
        return batch
