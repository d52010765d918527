"""Segmentation metrics over a data set: mIoU, mAcc and aAcc, and IoU and accuracy per class."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from beit.errors import InputError

IGNORED = 255  # label of pixels that no loss and no metric counts


class Confusion:
    """A confusion matrix over many images, ``K`` classes, kept on the device: on a GPU an update waits for nothing."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        # An extra bin takes the ignored pixels: to drop them, the host would have to wait for their number.
        self._counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=device)

    @property
    def matrix(self) -> Tensor:
        """Pixels by label and predicted class, int64 ``(K, K)``; a view, which processes may sum in place."""
        return self._counts[:-1].view(self.num_classes, self.num_classes)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Adds an image's pixels, integers ``(H, W)``: predicted classes in [0, K), and labels, ignored from K on.

        Data sets check their labels when they read them. Raises :class:`InputError` if the two differ in size.
        """
        if prediction.shape != label.shape:
            raise InputError(f"a prediction of {(*prediction.shape,)} pixels for a label map of {(*label.shape,)}")
        device = self._counts.device
        # Moved as they are: int64 made in host memory is not pinned, and copying it makes the host wait.
        right, found = (
            pixels.to(device, non_blocking=True).to(torch.int64).flatten() for pixels in (label, prediction)
        )
        unused = self.num_classes**2
        pairs = torch.where(right < self.num_classes, right * self.num_classes + found, unused)
        # Not `bincount`, which on a GPU waits for the largest value.
        self._counts.scatter_add_(0, pairs, torch.ones_like(pairs))


@dataclass(frozen=True)
class SegmentationScores:
    """Results over a data set, as fractions in [0, 1]."""

    mIoU: float  # mean of iou over the classes that have one
    mAcc: float  # mean of accuracy over the classes that have one
    aAcc: float  # pixel accuracy over all labelled pixels; nan without any
    iou: tuple[float, ...]  # per class; nan where one is neither labelled nor predicted anywhere
    accuracy: tuple[float, ...]  # recall per class; nan where one is not labelled anywhere

    def table(self, names: Sequence[str]) -> str:
        """Returns a text table: a line per class and one for the means, in percent."""
        width = max(map(len, [*names, "class"]))
        lines = [f"{'class':<{width}}  {'IoU':>6}  {'Acc':>6}"]
        for name, iou, accuracy in zip(names, self.iou, self.accuracy, strict=True):
            lines.append(f"{name:<{width}}  {100 * iou:6.2f}  {100 * accuracy:6.2f}")
        lines.append(f"{'mean':<{width}}  {100 * self.mIoU:6.2f}  {100 * self.mAcc:6.2f}")
        lines.append(f"{'all':<{width}}  {'':>6}  {100 * self.aAcc:6.2f}")
        return "\n".join(lines)

    def means(self) -> dict[str, float]:
        """Returns the three metrics by name."""
        return {"mIoU": self.mIoU, "mAcc": self.mAcc, "aAcc": self.aAcc}

    def summary(self) -> str:
        """Returns the three metrics in one line, in percent."""
        return " ".join(f"{name} {100 * value:.2f}" for name, value in self.means().items())


def scores(matrix: Tensor) -> SegmentationScores:
    """Computes the metrics from the counts of :class:`Confusion`, int64 ``(K, K)``, summed over all processes.

    A class that is neither labelled nor predicted anywhere counts in no mean. One that is predicted but never labelled
    has IoU 0 and counts in mIoU, but not in mAcc.

    Source: mmsegmentation 0.11, ``mmseg.core.evaluation.eval_metrics``.
    """
    counts = matrix.cpu().double()
    right, labelled, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    iou = right / (labelled + predicted - right)  # 0 / 0 is nan
    accuracy = right / labelled
    return SegmentationScores(
        mIoU=iou.nanmean().item(),
        mAcc=accuracy.nanmean().item(),
        aAcc=(right.sum() / labelled.sum()).item(),
        iou=tuple(iou.tolist()),
        accuracy=tuple(accuracy.tolist()),
    )
