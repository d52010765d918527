"""What a model predicts for masked patches, as images ready to be drawn or, for TensorBoard, as one picture."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid

from beit.data.loaders import Batch, EpochDataset
from beit.data.transforms import to_unit_range
from beit.targets import PredictionTarget

MASK_GREY = 0.5
GAP = 2  # pixels between two images, white
MOST_IMAGES, COLUMNS = 16, 8  # of images beside their reconstructions


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    outputs_of_all: Callable[[nn.Module, Batch], Tensor],
    target: PredictionTarget,
    batch: Batch,
    steps: int = 1,
) -> tuple[dict[str, Tensor], list[str]]:
    """Lets a model, in evaluation mode from then on, fill in the masked patches of some images.

    ``outputs_of_all`` returns the model's outputs for all patches of a batch, ``(B, N, output_size)``; the views and
    masks of the batch, on the model's device, are described in :mod:`beit.targets`. Tokens are decoded jointly, so a
    predicted token also affects the borders of the patches around it. For ``steps`` see :func:`fill_in`, for what is
    returned :func:`versions`.

    Source: BEiT (arXiv 2106.08254), figure 1.
    """
    model.eval()
    return versions(fill_in(partial(outputs_of_all, model), target, batch, steps), target, batch)


def versions(outputs: Tensor, target: PredictionTarget, batch: Batch) -> tuple[dict[str, Tensor], list[str]]:
    """Draws what a model's outputs ``(B, N, output_size)`` for all patches make of the masked ones.

    Returns:
        Versions of the images by title, each ``(B, 3, H', W')`` in [0, 1] on the CPU: the image, the image with masked
        patches in grey, and the predictions as drawn by the target (for visual tokens, decoded from the true tokens and
        from the predicted ones at masked patches); and a caption with the score of each image.
    """
    images, masks = to_unit_range(batch["image"]), batch["mask"]
    panels = {"image": images, "masked": hide_patches(images, masks), **target.pictures(outputs, batch)}
    if len(panels) > 3:  # the target draws its codes' pictures, which differ from the image at the seen patches too
        panels["predictions in the image"] = paste(images, list(panels.values())[-1], masks)
    index, counts = masks.flatten().nonzero().flatten(), masks.flatten(1).sum(dim=1).tolist()
    predicted, true = outputs.flatten(0, 1)[index].split(counts), target.compute(batch, index).split(counts)
    captions = []
    for count, ours, theirs in zip(counts, predicted, true, strict=True):
        scores = target.scores(target.tally(ours, theirs), count)
        if "mlm_acc" in scores:
            captions.append(f"{round(scores['mlm_acc'] * count)} of {count} tokens right")
        else:
            captions.append(", ".join(f"{name} {value:.2f}" for name, value in scores.items()))
    return {title: in_colours(pictures.float().cpu()) for title, pictures in panels.items()}, captions


def fill_in(predict: Callable[[Batch], Tensor], target: PredictionTarget, batch: Batch, steps: int) -> Tensor:
    """Returns the outputs for all patches ``(B, N, output_size)``, in several passes in which the model sees more.

    After each pass the patches predicted with the highest confidence are kept, as drawn by the target, and the model
    sees them in the next one; the share that stays masked falls as a cosine to none.

    Source: arXiv 2202.04200 (MaskGIT), section 3.2, without its random noise.
    """
    outputs = predict(batch).float()
    masks, left, counts = batch["mask"], batch["mask"], batch["mask"].flatten(1).sum(dim=1)
    for step in range(1, steps):
        confidence = target.confidence(outputs).masked_fill(~left.flatten(1), math.inf)
        picture = list(target.pictures(outputs, batch).values())[-1]
        remaining = (counts * math.cos(math.pi / 2 * step / steps)).ceil().long()
        left = (confidence.argsort(dim=1).argsort(dim=1) < remaining.unsqueeze(1)).view_as(masks)
        seen = to_unit_range(batch["image"])
        pasted = (paste(seen, picture, masks) * 255).round().to(torch.uint8)
        fresh = predict({**batch, "image": pasted, "mask": left}).float()
        outputs = torch.where(left.flatten(1).unsqueeze(2), fresh, outputs)
    return outputs


def in_colours(images: Tensor) -> Tensor:
    """Returns images ``(B, C, H, W)`` as ``(B, 3, H, W)`` to be drawn: of other channels than 3 the mean, in greys."""
    return images if images.shape[1] == 3 else images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)


def hide_patches(images: Tensor, masks: Tensor) -> Tensor:
    """Paints masked patches grey: ``(B, 3, H, W)`` in [0, 1] and bool ``(B, h, w)`` → ``(B, 3, H, W)``."""
    return paste(images, torch.full_like(images, MASK_GREY), masks)


def paste(images: Tensor, predicted: Tensor, masks: Tensor) -> Tensor:
    """Puts the masked patches of other images ``(B, 3, H', W')``, scaled, into images ``(B, 3, H, W)``."""
    size = images.shape[-2:]
    hidden = F.interpolate(masks[:, None].float(), size=size, mode="nearest")
    if predicted.shape[-2:] != size:
        predicted = F.interpolate(predicted, size, mode="bicubic", antialias=True).clamp(0, 1)
    return images * (1 - hidden) + predicted.to(images) * hidden


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
