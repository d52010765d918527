"""What a pre-trained model sees, and what it makes of the patches it does not see: tensors, ready to be drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.data.transforms import normalize, to_unit_range
from beit.tokenizer import VisualTokenizer

MASK_GREY = 0.5


@dataclass(frozen=True)
class Reconstructions:
    """Some images in four versions, each ``(B, 3, H', W')`` in [0, 1], on the CPU.

    Attributes:
        images: What was given.
        masked: The same with the masked patches in grey: all that the model sees.
        tokenized: Decoded from the true tokens: the best that a model could do.
        predicted: Decoded from the predicted tokens at masked patches and the true ones elsewhere.
        correct: Rightly predicted tokens of each image, int64 ``(B,)``.
        masked_patches: Masked patches of each image, int64 ``(B,)``.
    """

    images: Tensor
    masked: Tensor
    tokenized: Tensor
    predicted: Tensor
    correct: Tensor
    masked_patches: Tensor

    def panels(self) -> dict[str, Tensor]:
        """Returns the four versions under the titles of their columns."""
        return {
            "image": self.images,
            "masked": self.masked,
            "dVAE reconstruction": self.tokenized,
            "predicted tokens decoded": self.predicted,
        }

    def captions(self) -> list[str]:
        """Returns how many tokens were predicted rightly, for each image."""
        pairs = zip(self.correct.tolist(), self.masked_patches.tolist(), strict=True)
        return [f"{right} of {masked} tokens right" for right, masked in pairs]


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    tokenizer: VisualTokenizer,
    images: Tensor,
    token_images: Tensor,
    masks: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> Reconstructions:
    """Lets a model fill in the masked patches of some images.

    The mixture is decoded as a whole, so a predicted token also colours the rims of the patches around it.

    Args:
        model: Pre-trained; ``model(images, masks)`` gives logits ``(M, vocab)`` at the masked patches.
        tokenizer: The tokenizer it was trained with.
        images: The model's view, uint8 ``(B, 3, H, W)``.
        token_images: The tokenizer's view of the same regions, uint8 ``(B, 3, H2, W2)``.
        masks: Bool ``(B, h, w)``, True where masked.
        mean: Mean of the model's input, per channel.
        std: Standard deviation of the model's input, per channel.

    Source: BEiT (arXiv 2106.08254), figure 1.
    """
    model.eval()
    tokens = tokenizer.encode(to_unit_range(token_images))
    guesses = model(normalize(images, mean, std), masks).argmax(dim=-1)
    filled = tokens.clone()
    filled[masks] = guesses  # logits and boolean indexing agree: row-major order of the masked patches
    return Reconstructions(
        images=to_unit_range(images).cpu(),
        masked=hide_patches(to_unit_range(images), masks).cpu(),
        tokenized=tokenizer.decode(tokens).cpu(),
        predicted=tokenizer.decode(filled).cpu(),
        correct=((filled == tokens) & masks).sum(dim=(1, 2)).cpu(),
        masked_patches=masks.sum(dim=(1, 2)).cpu(),
    )


def hide_patches(images: Tensor, masks: Tensor) -> Tensor:
    """Paints masked patches grey: ``(B, 3, H, W)`` in [0, 1] and bool ``(B, h, w)`` → ``(B, 3, H, W)``."""
    hidden = F.interpolate(masks[:, None].float(), size=images.shape[-2:], mode="nearest")
    return images * (1 - hidden) + MASK_GREY * hidden
