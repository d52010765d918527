"""Top-1 and top-5 accuracy over a data set that processes share."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from beit.errors import InputError

TOP_K = 5


def zero_counts(device: torch.device, *heads: int) -> Tensor:
    """Returns room for the sums of :func:`count_correct`, ``(*heads, 4)``."""
    return torch.zeros(*heads, 4, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy, top-1 and top-5 hits and images of a batch, summed, ``(4,)``.

    Logits are ``(B, K)``; with fewer than five classes all are top-5. Negative labels, of int64 ``(B,)``, are skipped.
    """
    readable = labels >= 0
    logits, labels = logits[readable].float(), labels[readable]
    hits = logits.topk(min(TOP_K, logits.shape[1])).indices == labels[:, None]  # (B, 5)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=loss.device)])


def rates(counts: Tensor) -> Mapping[str, float]:
    """Returns ``loss`` (mean cross-entropy), ``acc1`` and ``acc5`` (percent) of sums over all processes, ``(4,)``.

    Raises :class:`InputError` if no image was counted.
    """
    loss, first, among_first, images = counts.tolist()
    if not images:
        raise InputError("none of the validation images can be read")
    return {"loss": loss / images, "acc1": 100 * first / images, "acc5": 100 * among_first / images}
