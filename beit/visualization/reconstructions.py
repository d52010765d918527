"""What a pre-trained model sees and what it predicts for masked patches, as tensors ready to be drawn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.data.loaders import Batch
from beit.data.transforms import to_unit_range
from beit.targets import PredictionTarget

MASK_GREY = 0.5


@dataclass(frozen=True)
class Reconstructions:
    """Several versions of a few images, each ``(B, 3, H', W')`` in [0, 1], on the CPU.

    Attributes:
        images: The original images.
        masked: The same with masked patches in grey: what the model sees.
        predictions: The target's pictures by title. For visual tokens, images decoded from the true tokens, which is
            the best a model could do, and from predicted tokens at masked patches and true ones elsewhere.
        scores: The target's scores over the masked patches of each image.
        masked_patches: Number of masked patches of each image.
    """

    images: Tensor
    masked: Tensor
    predictions: dict[str, Tensor]
    scores: list[dict[str, float]]
    masked_patches: list[int]

    def panels(self) -> dict[str, Tensor]:
        """Returns the versions by column title."""
        return {"image": self.images, "masked": self.masked, **self.predictions}

    def captions(self) -> list[str]:
        """Returns the quality of the predictions for each image."""
        return [_caption(*pair) for pair in zip(self.scores, self.masked_patches, strict=True)]


def _caption(scores: Mapping[str, float], patches: int) -> str:
    if "mlm_acc" in scores:
        return f"{round(scores['mlm_acc'] * patches)} of {patches} tokens right"
    return ", ".join(f"{name} {value:.2f}" for name, value in scores.items())


@torch.no_grad()
def reconstruct(
    model: nn.Module, outputs_of_all: Callable[[nn.Module, Batch], Tensor], target: PredictionTarget, batch: Batch
) -> Reconstructions:
    """Fills in the masked patches of some images.

    All tokens of an image are decoded together, so a predicted token also affects the borders of neighbouring patches.

    Args:
        model: The pre-trained model.
        outputs_of_all: Computes the outputs at all patches of a batch, ``(B, N, output_size)``.
        target: What the model was trained to predict.
        batch: Views and masks as described in :mod:`beit.targets`, on the model's device.

    Source: BEiT (arXiv 2106.08254), figure 1.
    """
    model.eval()
    outputs = outputs_of_all(model, batch).float()
    images, masks = to_unit_range(batch["image"]), batch["mask"]
    return Reconstructions(
        images=images.cpu(),
        masked=hide_patches(images, masks).cpu(),
        predictions={title: pictures.cpu() for title, pictures in target.pictures(outputs, batch).items()},
        scores=[_scores(target, outputs, batch, number) for number in range(len(masks))],
        masked_patches=masks.sum(dim=(1, 2)).tolist(),
    )


def _scores(target: PredictionTarget, outputs: Tensor, batch: Batch, number: int) -> dict[str, float]:
    """Returns the target's scores over the masked patches of one image of a batch."""
    places = batch["mask"][number].flatten().nonzero().flatten()
    truth = target.compute(batch, places + number * outputs.shape[1])
    return target.scores(target.tally(outputs[number, places], truth), len(places))


def hide_patches(images: Tensor, masks: Tensor) -> Tensor:
    """Paints masked patches grey: ``(B, 3, H, W)`` in [0, 1] and bool ``(B, h, w)`` → ``(B, 3, H, W)``."""
    hidden = F.interpolate(masks[:, None].float(), size=images.shape[-2:], mode="nearest")
    return images * (1 - hidden) + MASK_GREY * hidden
