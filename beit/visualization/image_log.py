"""Reconstructions of a few fixed images, drawn again after each epoch of pre-training, for TensorBoard."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid

from beit.data.loaders import Batch, EpochDataset
from beit.data.transforms import to_unit_range
from beit.targets import PredictionTarget
from beit.visualization.reconstructions import hide_patches

GAP = 2  # pixels between two images, white
MOST_IMAGES, COLUMNS = 16, 8  # of images beside their reconstructions


@torch.no_grad()
def reconstruction_picture(
    model: nn.Module,
    outputs: Callable[[nn.Module, Batch], Tensor],
    target: PredictionTarget,
    batch: Batch,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Tensor:
    """Draws what a model makes of some images: a row each, with the image, what the model sees, and its predictions.

    It draws no random number and leaves the model in the mode it was in, so a run with it is the run without it.

    Args:
        model: The model in training.
        outputs: Gives a model's outputs for all patches of a batch, ``(B, N, output_size)``.
        target: Knows what they look like.
        batch: The views and masks of the images, on the model's device.
        autocast: Makes the context of the forward pass.

    Returns:
        The rows as one picture ``(3, H', W')`` in [0, 1], on the CPU.

    Raises:
        InputError: The predictions cannot be drawn.
    """
    was_training = model.training
    model.eval()
    try:
        with autocast():
            predicted = outputs(model, batch)
    finally:
        model.train(was_training)
    images = to_unit_range(batch["image"])
    panels = {"image": images, "masked": hide_patches(images, batch["mask"])}
    return montage({**panels, **target.pictures(predicted.float(), batch)})


def montage(panels: Mapping[str, Tensor]) -> Tensor:
    """Arranges versions of some images as one picture: a column each, a row for each image.

    Args:
        panels: Title → images ``(B, 3, H, W)`` in [0, 1]; those of other sizes are brought to the size of the first.

    Returns:
        ``(3, H', W')`` in [0, 1], on the CPU.
    """
    size = next(iter(panels.values())).shape[-2:]
    columns = [
        images if images.shape[-2:] == size else F.interpolate(images, size, mode="bilinear", antialias=True)
        for images in (images.float().cpu() for images in panels.values())
    ]
    rows = torch.stack(columns, dim=1).flatten(0, 1)  # (B · columns, 3, H, W)
    return make_grid(rows.clamp(0, 1), nrow=len(columns), padding=GAP, pad_value=1.0)


def spread_samples(dataset: EpochDataset, count: int) -> dict[str, Tensor]:
    """Returns ``count`` evenly spaced samples of a data set as a batch: always the same, with the same masks."""
    count = min(count, len(dataset))
    samples: list[dict[str, Any]] = [dataset[0, position * len(dataset) // count] for position in range(count)]
    names = [name for name, value in samples[0].items() if isinstance(value, Tensor)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}


def side_by_side(images: Tensor, reconstructed: Tensor) -> Tensor:
    """Arranges images in [0, 1], ``(B, 3, H, W)``, in rows, each row above that of its reconstructions.

    Returns:
        One picture ``(3, H', W')`` on the CPU.
    """
    rows: list[Tensor] = []
    columns = min(COLUMNS, len(images))
    for start in range(0, min(MOST_IMAGES, len(images)) - columns + 1, columns):
        rows += [images[start : start + columns], reconstructed[start : start + columns]]
    return make_grid(torch.cat(rows).float().cpu(), nrow=columns, padding=2, pad_value=1.0)
