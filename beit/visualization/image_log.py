"""Reconstructions of a few fixed images, drawn again after each epoch of pre-training, for TensorBoard."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid

from beit.data.loaders import Batch, EpochDataset
from beit.targets import PredictionTarget
from beit.visualization.reconstructions import in_colours, reconstruct

GAP = 2  # pixels between two images, white
MOST_IMAGES, COLUMNS = 16, 8  # of images beside their reconstructions


def reconstruction_picture(
    model: nn.Module, outputs_of_all: Callable[[nn.Module, Batch], Tensor], target: PredictionTarget, batch: Batch
) -> Tensor:
    """Draws a model's reconstructions, a row per image, as one picture ``(3, H', W')`` in [0, 1] on the CPU.

    Arguments and errors are those of :func:`reconstruct`. It draws no random number and leaves the
    model in the mode it was in, so a run with it is the run without it.
    """
    was_training = model.training
    try:
        panels, _ = reconstruct(model, outputs_of_all, target, batch)
    finally:
        model.train(was_training)
    size = panels["image"].shape[-2:]
    columns = [F.interpolate(images, size, mode="bilinear", antialias=True) for images in panels.values()]
    rows = torch.stack(columns, dim=1).flatten(0, 1)  # (B · columns, 3, H, W)
    return make_grid(rows.clamp(0, 1), nrow=len(columns), padding=GAP, pad_value=1.0)


def spread_samples(dataset: EpochDataset, count: int) -> dict[str, Tensor]:
    """Returns ``count`` evenly spaced samples of a data set as a batch: always the same, with the same masks."""
    count = min(count, len(dataset))
    samples: list[dict[str, Any]] = [dataset[0, position * len(dataset) // count] for position in range(count)]
    names = [name for name, value in samples[0].items() if isinstance(value, Tensor)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}


def side_by_side(images: Tensor, reconstructed: Tensor) -> Tensor:
    """Returns images, ``(B, 3, H, W)`` in [0, 1], in rows above their reconstructions, ``(3, H', W')`` on the CPU."""
    columns = min(COLUMNS, len(images))
    starts = range(0, min(MOST_IMAGES, len(images)) - columns + 1, columns)
    rows = [each[start : start + columns] for start in starts for each in (images, reconstructed)]
    return make_grid(in_colours(torch.cat(rows).float().cpu()), nrow=columns, padding=GAP, pad_value=1.0)
