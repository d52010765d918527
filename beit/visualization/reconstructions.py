"""What a pre-trained model predicts for masked patches, as images ready to be drawn."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.data.loaders import Batch
from beit.data.transforms import to_unit_range
from beit.targets import PredictionTarget

MASK_GREY = 0.5


@torch.no_grad()
def reconstruct(
    model: nn.Module, outputs_of_all: Callable[[nn.Module, Batch], Tensor], target: PredictionTarget, batch: Batch
) -> tuple[dict[str, Tensor], list[str]]:
    """Lets a model, in evaluation mode from then on, fill in the masked patches of some images.

    Tokens are decoded jointly, so a predicted token also affects the borders of the patches around it.

    Args:
        model: A pre-trained model.
        outputs_of_all: Returns the model's outputs for all patches of a batch, ``(B, N, output_size)``.
        target: What the model was trained to predict.
        batch: Views and masks, as described in :mod:`beit.targets`, on the model's device.

    Returns:
        Versions of the images by title, each ``(B, 3, H', W')`` in [0, 1] on the CPU: the image, the image with masked
        patches in grey, and the predictions as drawn by the target (for visual tokens, decoded from the true tokens and
        from the predicted ones at masked patches); and a caption with the score of each image.

    Source: BEiT (arXiv 2106.08254), figure 1.
    """
    model.eval()
    outputs = outputs_of_all(model, batch).float()
    images, masks = to_unit_range(batch["image"]), batch["mask"]
    panels = {"image": images, "masked": hide_patches(images, masks), **target.pictures(outputs, batch)}
    index, counts = masks.flatten().nonzero().flatten(), masks.flatten(1).sum(dim=1).tolist()
    predicted, true = outputs.flatten(0, 1)[index].split(counts), target.compute(batch, index).split(counts)
    captions = []
    for count, ours, theirs in zip(counts, predicted, true, strict=True):
        scores = target.scores(target.tally(ours, theirs), count)
        if "mlm_acc" in scores:
            captions.append(f"{round(scores['mlm_acc'] * count)} of {count} tokens right")
        else:
            captions.append(", ".join(f"{name} {value:.2f}" for name, value in scores.items()))
    return {title: pictures.float().cpu() for title, pictures in panels.items()}, captions


def hide_patches(images: Tensor, masks: Tensor) -> Tensor:
    """Paints masked patches grey: ``(B, 3, H, W)`` in [0, 1] and bool ``(B, h, w)`` → ``(B, 3, H, W)``."""
    hidden = F.interpolate(masks[:, None].float(), size=images.shape[-2:], mode="nearest")
    return images * (1 - hidden) + MASK_GREY * hidden
