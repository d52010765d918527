"""What pre-training predicts of a patch: its visual token, its pixels, or whatever else one small class says.

A target reads a batch as the loader gives it, on the device: ``image``, the model's view, uint8 ``(B, 3, H, W)``;
``mask``, bool ``(B, h, w)``; and, where ``second_view`` asks for it, ``token_image``, the same regions at another size,
uint8 ``(B, 3, H2, W2)``. Patches are counted through the batch, image by image and row by row, so "patch ``i``" is
place ``i`` of the flattened ``(B, h, w)``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from beit.data.transforms import normalize, to_unit_range
from beit.tokenizers.base import VisualTokenizer

Batch = Mapping[str, Tensor]

VISUAL_TOKENS = "visual tokens"  # what a checkpoint that records no target was trained to predict


class PredictionTarget(ABC):
    """What the model has to say of a patch, and how far off an answer is.

    A subclass gives ``name``, ``output_size``, :meth:`of` and :meth:`loss`; the other methods have defaults.

    Attributes:
        second_view: Whether :meth:`of` reads ``token_image``; without it that view is not made.
        name: Says what is predicted. It is recorded in checkpoints, and a run goes on only with the same target, so
            it names every option that changes what the model's outputs mean.
        output_size: Numbers that the model gives for each patch.
    """

    second_view: ClassVar[bool] = False
    name: str
    output_size: int

    @abstractmethod
    def of(self, batch: Batch, index: Tensor) -> Tensor:
        """Computes what is to be predicted, ``(M, …)``, of the patches ``index``, int64 ``(M,)``."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Compares the model's outputs ``(M, output_size)`` with what :meth:`of` returned.

        Args:
            outputs: In the number format of the step, which may be half precision.
            targets: ``(M, …)``.
            reduction: ``mean`` or ``sum`` over the patches.
        """

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Returns more numbers about a batch, for the log; the outputs carry no gradient."""
        return {}

    def tally(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Returns sums over the patches of a batch; those of all batches and processes are added up for :meth:`scores`.

        By default each metric times the number of patches.
        """
        return {name: value * len(outputs) for name, value in self.metrics(outputs, targets).items()}

    def scores(self, tally: Mapping[str, Tensor], patches: int) -> dict[str, float]:
        """Returns the metrics of a whole evaluation, of so many patches; by default the means of :meth:`metrics`."""
        return {name: total.item() / patches for name, total in tally.items()}

    def check(self, patch_grid: tuple[int, int], second_size: tuple[int, int]) -> None:  # noqa: B027
        """Makes sure that the target fits the model's grid ``(h, w)`` and the second view's size ``(H2, W2)``.

        Raises:
            InputError: It does not.
        """

    def pictures(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Returns what predictions look like, if they look like anything: title → images ``(B, 3, H', W')`` in [0, 1].

        Args:
            outputs: Of all patches, float32 ``(B, h · w, output_size)``.
            batch: The views and masks.
        """
        return {}


class TokenTarget(PredictionTarget):
    """The visual token of a patch, among those of a frozen tokenizer; the loss is the cross-entropy.

    Args:
        tokenizer: Gives the tokens.

    Source: section 2.3 of arXiv 2106.08254.
    """

    second_view = True
    name = VISUAL_TOKENS

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        self.tokenizer = tokenizer
        self.output_size = tokenizer.vocab_size

    def of(self, batch: Batch, index: Tensor) -> Tensor:
        """Returns the tokens of patches, int64 ``(M,)``."""
        return self.tokenizer.encode(to_unit_range(batch["token_image"]), index)

    def loss(self, outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Returns the cross-entropy of logits ``(M, vocab)`` and tokens ``(M,)``."""
        return F.cross_entropy(outputs.float(), targets, reduction=reduction)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Returns the share of tokens predicted right, ``mlm_acc``."""
        return {"mlm_acc": (outputs.argmax(dim=-1) == targets).float().mean()}

    def tally(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Returns how many were right, and how often each token occurred, int64 ``(vocab,)``."""
        frequencies = torch.bincount(targets, minlength=self.output_size)
        return {"right": (outputs.argmax(dim=-1) == targets).sum(), "frequencies": frequencies}

    def scores(self, tally: Mapping[str, Tensor], patches: int) -> dict[str, float]:
        """Returns ``mlm_acc``, and ``most_frequent_acc``: what always answering the most frequent token would score."""
        most = tally["frequencies"].max().item()
        return {"mlm_acc": tally["right"].item() / patches, "most_frequent_acc": most / patches}

    def check(self, patch_grid: tuple[int, int], second_size: tuple[int, int]) -> None:
        """Makes sure that there is one token for each patch."""
        self.tokenizer.check_grid(second_size, patch_grid)

    def pictures(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Returns the true tokens decoded, and the predicted ones among the true ones of visible patches."""
        tokens = self.tokenizer.encode(to_unit_range(batch["token_image"]))  # (B, h, w)
        filled = torch.where(batch["mask"], outputs.argmax(dim=-1).view_as(tokens), tokens)
        return {
            "dVAE reconstruction": self.tokenizer.decode(tokens),
            "predicted tokens decoded": self.tokenizer.decode(filled),
        }


class PixelTarget(PredictionTarget):
    """The pixels of a patch as the model reads them, ``(p1 p2 c)``: row by row, the colours of a pixel together.

    Args:
        patch_size: Height and width of a patch, in pixels.
        mean: Mean of the model's input, per channel.
        std: Standard deviation of the model's input, per channel.
        normalised: Take from each patch its mean and divide by its standard deviation, over all its numbers.

    Source: "recover masked pixels", section 3.3 of arXiv 2106.08254, with raw pixels; the normalisation is that of
    masked autoencoders, section 4.1 of arXiv 2111.06377.
    """

    EPS = 1e-6  # added to the variance, so that a patch of one colour becomes zeros

    def __init__(
        self, patch_size: tuple[int, int], mean: Sequence[float], std: Sequence[float], normalised: bool = True
    ) -> None:
        self.patch_size, self.normalised = patch_size, normalised
        self._mean, self._std = tuple(mean), tuple(std)
        self.output_size = patch_size[0] * patch_size[1] * len(self._mean)
        self.name = "pixels normalised per patch" if normalised else "raw pixels"

    def of(self, batch: Batch, index: Tensor) -> Tensor:
        """Returns the pixels of patches, float32 ``(M, p1 · p2 · 3)``."""
        pixels = self._patches(batch).flatten(0, 1).index_select(0, index)
        if self.normalised:
            mean, deviation = self._statistics(pixels)
            pixels = (pixels - mean) / deviation
        return pixels

    def loss(self, outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Returns the squared error, a mean over the numbers of a patch."""
        of_patches = F.mse_loss(outputs.float(), targets, reduction="none").mean(dim=-1)  # (M,)
        return of_patches.mean() if reduction == "mean" else of_patches.sum()

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Returns ``r2``, the share of the variance that is explained: 1 is perfect, always answering the mean 0."""
        return {"r2": _explained(self.tally(outputs, targets))}

    def tally(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Returns the sums that :meth:`scores` makes ``r2`` of."""
        return {
            "error": (outputs.float() - targets).square().sum(),
            "sum": targets.sum(),
            "squares": targets.square().sum(),
            "numbers": targets.new_full((), targets.numel()),
        }

    def scores(self, tally: Mapping[str, Tensor], patches: int) -> dict[str, float]:  # noqa: ARG002
        """Returns ``r2`` over all patches."""
        return {"r2": _explained(tally).item()}

    def pictures(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Returns the images with the masked patches as predicted.

        A normalised patch is shown with the mean and deviation of the true one, which the model cannot know.
        """
        truth = self._patches(batch)  # (B, N, p1 p2 c)
        if self.normalised:
            mean, deviation = self._statistics(truth)
            outputs = outputs * deviation + mean
        filled = torch.where(batch["mask"].flatten(1).unsqueeze(-1), outputs, truth)
        (p1, p2), (h, w) = self.patch_size, batch["mask"].shape[1:]
        images = rearrange(filled, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=h, w=w, p1=p1, p2=p2)
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self._mean, self._std))
        return {"predicted pixels": (images * std + mean).clamp(0, 1)}

    def _patches(self, batch: Batch) -> Tensor:
        """Returns all patches of a batch, float32 ``(B, N, p1 · p2 · 3)``."""
        images = normalize(batch["image"], self._mean, self._std)
        p1, p2 = self.patch_size
        return rearrange(images, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=p1, p2=p2)

    def _statistics(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of each patch, ``(…, 1)``; the variance is the unbiased one."""
        return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + self.EPS).sqrt()


def _explained(tally: Mapping[str, Tensor]) -> Tensor:
    """Returns 1 - error / (squared deviations from the mean); 0 where there is nothing to explain."""
    variation = tally["squares"] - tally["sum"].square() / tally["numbers"]
    return torch.where(variation > 0, 1 - tally["error"] / variation, torch.zeros_like(variation))
