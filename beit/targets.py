"""What pre-training predicts for a patch: its visual token, its pixels, a teacher's features, or what a subclass says.

A target reads a batch on the device: ``image``, the model's view, uint8 ``(B, 3, H, W)``; ``mask``, bool
``(B, h, w)``; and, if ``second_view``, ``token_image``, the same regions at another size, uint8 ``(B, 3, H2, W2)``,
unless its pixels would be those of ``image``. Patch ``i`` is element ``i`` of the flattened ``(B, h, w)``. A line in
:data:`beit.registry.TARGETS` adds a choice.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from beit.data.loaders import Batch
from beit.data.transforms import normalize, to_unit_range
from beit.errors import InputError
from beit.teachers import Teacher
from beit.tokenizers.base import VisualTokenizer

VISUAL_TOKENS = "visual tokens"  # what a checkpoint that records no target was trained to predict

ResultT = TypeVar("ResultT")

logger = logging.getLogger(__name__)


class PredictionTarget(ABC):
    """What the model predicts for a patch, and the loss.

    A subclass defines ``name``, ``output_size``, :meth:`compute` and :meth:`loss`; the other methods have defaults.

    Attributes:
        second_view: Whether :meth:`compute` reads ``token_image``; if not, that view is not made.
        name: What is predicted, with every option that changes it; a run resumes only checkpoints of the same name.
        output_size: Size of the model's output for each patch.
    """

    second_view: ClassVar[bool] = False
    name: str
    output_size: int

    @classmethod
    def build(
        cls,
        *,
        tokenizer: Callable[[], VisualTokenizer],  # noqa: ARG003
        teacher: Callable[[], Teacher],  # noqa: ARG003
        patch_size: tuple[int, int],  # noqa: ARG003
        mean: Sequence[float],  # noqa: ARG003
        std: Sequence[float],  # noqa: ARG003
        pixel_norm: bool,  # noqa: ARG003
    ) -> "PredictionTarget":
        """Creates the target for a run. An override names the keywords it uses and takes the others as ``**_``.

        Args:
            tokenizer: Loads the run's tokenizer; called only by a target that needs one.
            teacher: Opens the run's teacher; called only by a target that needs one.
            patch_size: Height and width of the model's patches, in pixels.
            mean: Mean of the model's input, per channel.
            std: Standard deviation of the model's input, per channel.
            pixel_norm: Whether pixels are to be normalised per patch.

        Raises:
            InputError: Something it needs is missing, such as the tokenizer.
        """
        return cls()

    @abstractmethod
    def compute(self, batch: Batch, index: Tensor) -> Tensor:
        """Computes the targets ``(M, …)`` of the patches ``index``, int64 ``(M,)``."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Returns the loss of ``(M, output_size)`` outputs, perhaps in half precision, and ``(M, …)`` targets.

        ``reduction`` is ``mean`` or ``sum``, over the patches.
        """

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Returns further metrics of a batch for the log; the outputs carry no gradient."""
        return {}

    def tally(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Returns sums over a batch's patches, to be totalled for :meth:`scores`; by default metrics times patches."""
        return {name: value * len(outputs) for name, value in self.metrics(outputs, targets).items()}

    def scores(self, tally: Mapping[str, Tensor], patches: int) -> dict[str, float]:
        """Returns the metrics of an evaluation over ``patches`` patches; by default the means of :meth:`metrics`."""
        return {name: total.item() / patches for name, total in tally.items()}

    def check(self, patch_grid: tuple[int, int], second_size: tuple[int, int]) -> None:  # noqa: B027
        """Raises :class:`InputError` if patch grid ``(h, w)`` and second view's size ``(H2, W2)`` do not fit."""

    def confidence(self, outputs: Tensor) -> Tensor:  # noqa: ARG002
        """Returns how sure the model is of each patch, ``(B, N)``, higher is surer, from ``(B, N, output_size)``."""
        raise InputError(f"predictions of {self.name} have no confidence: fill in the patches in one step")

    def pictures(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Returns title → pictures ``(B, 3, H', W')`` in [0, 1] of float32 outputs ``(B, h · w, output_size)``."""
        return {}


class TokenTarget(PredictionTarget):
    """The visual token of a patch, from a frozen tokenizer; the loss is the cross-entropy.

    Source: section 2.3 of arXiv 2106.08254.
    """

    second_view = True
    name = VISUAL_TOKENS

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        self.tokenizer = tokenizer
        self.output_size = tokenizer.vocab_size
        self._batches_to_check = 4  # few, as the host waits for each

    @classmethod
    def build(cls, *, tokenizer: Callable[[], VisualTokenizer], **_: object) -> "TokenTarget":
        return cls(tokenizer())

    def compute(self, batch: Batch, index: Tensor) -> Tensor:
        """Returns the tokens of patches, int64 ``(M,)``; warns if those of a first batch are nearly all the same."""
        tokens = self.tokenizer.encode(self._view(batch), index=index)
        if self._batches_to_check and len(tokens):
            most = int(torch.bincount(tokens).max())
            self._batches_to_check = 0 if most > 0.9 * len(tokens) else self._batches_to_check - 1
            if most > 0.9 * len(tokens):
                logger.warning("%d of %d tokens of a batch are the same: check tokenizer and images", most, len(tokens))
        return tokens

    def loss(self, outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Returns the cross-entropy of logits ``(M, vocab)`` and tokens ``(M,)``."""
        return F.cross_entropy(outputs.float(), targets, reduction=reduction)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Returns ``mlm_acc``, the token accuracy."""
        return {"mlm_acc": (outputs.argmax(dim=-1) == targets).float().mean()}

    def tally(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Returns the number of right predictions, and how often each token occurs and is predicted, ``(vocab,)``."""
        predicted = outputs.argmax(dim=-1)
        counts = {"frequencies": targets, "predicted": predicted}
        counts = {name: torch.bincount(tokens, minlength=self.output_size) for name, tokens in counts.items()}
        return {"right": (predicted == targets).sum(), **counts}

    def scores(self, tally: Mapping[str, Tensor], patches: int) -> dict[str, float]:
        """Returns the token accuracy ``mlm_acc``, what guessing without looking gives, and how varied tokens are.

        ``most_frequent_acc`` is the accuracy of always predicting the most frequent token, ``unigram_entropy`` the loss
        of predicting the tokens' frequencies (nats), ``token_entropy`` the entropy of those that are predicted.
        """
        shares, predicted = (tally[name].cpu().double() / patches for name in ("frequencies", "predicted"))
        return {
            "mlm_acc": tally["right"].item() / patches,
            "most_frequent_acc": shares.max().item(),
            "unigram_entropy": entropy(shares).item(),
            "codebook_perplexity": entropy(shares).exp().item(),
            "token_entropy": entropy(predicted).item(),
        }

    def confidence(self, outputs: Tensor) -> Tensor:
        """Returns the logarithm of the predicted token's probability."""
        return outputs.log_softmax(dim=-1).amax(dim=-1)

    def check(self, patch_grid: tuple[int, int], second_size: tuple[int, int]) -> None:
        self.tokenizer.check_grid(second_size, patch_grid)

    def pictures(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Returns the decoded true tokens, and the same with predicted tokens at masked patches."""
        tokens = self.tokenizer.encode(self._view(batch))  # (B, h, w)
        filled = torch.where(batch["mask"], outputs.argmax(dim=-1).view_as(tokens), tokens)
        return {
            "tokens decoded": self.tokenizer.decode(tokens),
            "predicted tokens decoded": self.tokenizer.decode(filled),
        }

    @staticmethod
    def _view(batch: Batch) -> Tensor:
        return to_unit_range(batch.get("token_image", batch["image"]))


class RegressionTarget(PredictionTarget):
    """Numbers of a patch, ``(M, output_size)``; a subclass defines what they are, and may choose another ``error``."""

    error: Callable[..., Tensor] = staticmethod(F.mse_loss)

    def loss(self, outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Returns the mean error over the numbers of a patch."""
        per_patch = self.error(outputs.float(), targets, reduction="none").mean(dim=-1)  # (M,)
        return per_patch.mean() if reduction == "mean" else per_patch.sum()

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Returns ``r2``, the explained share of the variance: 1 if perfect, 0 for always predicting the mean."""
        return {"r2": _explained(self.tally(outputs, targets))}

    def tally(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Returns the sums from which :meth:`scores` computes ``r2``."""
        return {
            "error": (outputs.float() - targets).square().sum(),
            "sum": targets.sum(),
            "squares": targets.square().sum(),
            "numbers": targets.new_full((), targets.numel()),
        }

    def scores(self, tally: Mapping[str, Tensor], patches: int) -> dict[str, float]:  # noqa: ARG002
        """Returns ``r2`` over all patches."""
        return {"r2": _explained(tally).item()}


class PixelTarget(RegressionTarget):
    """The normalised pixels of a patch in the order ``(p1 p2 c)``: row by row, with the channels of a pixel together.

    With ``normalised`` each patch's mean is subtracted, and it is divided by its standard deviation, over all values.

    Source: section 3.3 of arXiv 2106.08254 (raw pixels); section 4.1 of arXiv 2111.06377 (normalised per patch).
    """

    EPS = 1e-6  # added to the variance; a patch of one colour becomes zeros

    def __init__(
        self, patch_size: tuple[int, int], mean: Sequence[float], std: Sequence[float], normalised: bool = True
    ) -> None:
        self.patch_size, self.normalised = patch_size, normalised
        self._mean, self._std = tuple(mean), tuple(std)
        self.output_size = patch_size[0] * patch_size[1] * len(self._mean)
        self.name = "pixels normalised per patch" if normalised else "raw pixels"

    @classmethod
    def build(
        cls, *, patch_size: tuple[int, int], mean: Sequence[float], std: Sequence[float], pixel_norm: bool, **_: object
    ) -> "PixelTarget":
        return cls(patch_size, mean, std, pixel_norm)

    def compute(self, batch: Batch, index: Tensor) -> Tensor:
        """Returns the pixels of patches, float32 ``(M, p1 · p2 · 3)``."""
        pixels = self._patches(batch).flatten(0, 1).index_select(0, index)
        if self.normalised:
            mean, deviation = self._statistics(pixels)
            pixels = (pixels - mean) / deviation
        return pixels

    def pictures(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Returns the images with masked patches as predicted, scaled back by the true patches' mean and deviation."""
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
        images = normalize(batch["image"], self._mean, self._std)
        p1, p2 = self.patch_size
        return rearrange(images, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=p1, p2=p2)

    def _statistics(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of each patch, ``(…, 1)``; the variance is the unbiased one."""
        return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + self.EPS).sqrt()


class HogTarget(RegressionTarget):
    """Histograms of oriented gradients: 9 directions in cells of 8 x 8 pixels, each colour's of length 1.

    A patch whose side is no multiple of 8 pixels is one cell along it.

    Source: MaskFeat, arXiv 2112.09133, section 3.
    """

    CELL, DIRECTIONS = 8, 9
    name = "HOG of 9 directions in cells of 8 x 8 pixels"

    def __init__(self, patch_size: tuple[int, int], in_chans: int = 3) -> None:
        self.cells = tuple(side // self.CELL if side % self.CELL == 0 else 1 for side in patch_size)
        self.output_size = in_chans * self.DIRECTIONS * self.cells[0] * self.cells[1]

    @classmethod
    def build(cls, *, patch_size: tuple[int, int], mean: Sequence[float], **_: object) -> "HogTarget":
        return cls(patch_size, len(mean))

    def compute(self, batch: Batch, index: Tensor) -> Tensor:
        """Returns the histograms of patches, float32 ``(M, output_size)``, in the order ``(c1 c2 colour bin)``."""
        images, (h, w), (c1, c2) = batch["image"].float(), batch["mask"].shape[1:], self.cells
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        columns = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]  # Sobel's filters
        rows = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
        dx, dy = columns[..., :-2] - columns[..., 2:], rows[..., :-2, :] - rows[..., 2:, :]
        direction = (torch.atan2(dx, dy) / torch.pi * self.DIRECTIONS).floor() % self.DIRECTIONS
        length, pattern = torch.hypot(dx, dy), "b c (h c1 p1) (w c2 p2) -> (b h w) c1 c2 c"
        cells = [
            reduce(length * (direction == number), pattern, "sum", h=h, w=w, c1=c1, c2=c2)
            for number in range(self.DIRECTIONS)
        ]
        return F.normalize(torch.stack(cells, dim=-1), dim=-1).flatten(1).index_select(0, index)


class FeatureTarget(RegressionTarget):
    """The features that a frozen teacher has of a patch when it sees all of the image, each normalised over channels.

    They are interpolated if the teacher's grid is another than the model's.

    Source: MaskDistill, arXiv 2210.10615, as reproduced in arXiv 2603.29009: the loss is the smooth L1 with beta 1.
    """

    name = "features of a teacher"
    error = staticmethod(F.smooth_l1_loss)

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.output_size = teacher, teacher.dim

    @classmethod
    def build(cls, *, teacher: Callable[[], Teacher], **_: object) -> "FeatureTarget":
        return cls(teacher())

    def compute(self, batch: Batch, index: Tensor) -> Tensor:
        """Returns the normalised features of patches, float32 ``(M, D)``."""
        h, w = batch["mask"].shape[1:]
        features = self.teacher(to_unit_range(batch["image"]), grid=(h, w)).flatten(0, 2)  # (B · h · w, D)
        return F.layer_norm(features.index_select(0, index), (self.output_size,))


def entropy(frequencies: Tensor) -> Tensor:
    """Returns the entropy, in nats, of frequencies or other numbers that are not negative, ``(n,)``."""
    return torch.special.entr(frequencies / frequencies.sum()).sum()


def _explained(tally: Mapping[str, Tensor]) -> Tensor:
    """Returns 1 - error / (squared deviations from the mean), or 0 without variation."""
    variation = tally["squares"] - tally["sum"].square() / tally["numbers"]
    return torch.where(variation > 0, 1 - tally["error"] / variation, torch.zeros_like(variation))


def with_patch_index(batch: Batch, predict: str = "masked", room: int = 0) -> dict[str, Tensor]:
    """Adds the positions of the patches to predict, computed on the host so that the GPU need not wait.

    They are ``patch_index``, int64 ``(M,)``, in the ``B * h * w`` patches: of those in ``mask``, bool ``(B, h, w)``, or
    of all. With ``room``, the most masked patches that a batch can have, there is ``padded_index``, int64 ``(room,)``,
    too, padded with the first patch: it gives a compiled model the same shapes every time.
    """
    mask = batch["mask"].flatten()
    if predict != "masked":
        return {**batch, "patch_index": torch.arange(len(mask))}
    index = mask.nonzero().flatten()
    padded = {"padded_index": F.pad(index, (0, max(0, room - len(index))))} if room else {}
    return {**batch, "patch_index": index, **padded}


class MaskedPrediction:
    """The objective: the target's loss on masked images, normalised with ``mean`` and ``std`` per channel.

    The losses of a model that predicts the target several times are added up; theirs and their metrics are numbered.
    """

    def __init__(self, target: PredictionTarget, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.target = target
        self._mean, self._std = mean, std

    def predict(self, model: nn.Module, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Returns each prediction's outputs ``(M, output_size)``, and targets ``(M, …)``, of the chosen patches."""
        index = batch["patch_index"]
        targets = self.target.compute(batch, index)
        images = normalize(batch["image"], self._mean, self._std)
        outputs = _listed(model(images, batch["mask"], masked_index=batch.get("padded_index", index)))
        return [each[: len(index)] for each in outputs], targets  # without the predictions for padding

    def outputs_of_all(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the first prediction's outputs of all patches, ``(B, N, output_size)``, masked or not."""
        images = normalize(batch["image"], self._mean, self._std)
        return _listed(model(images, batch["mask"], return_all_tokens=True))[0]

    def __call__(self, model: nn.Module, batch: Batch, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        outputs, targets = self.predict(model, batch)
        with torch.no_grad():
            metrics = [self.target.metrics(each.detach(), targets) for each in outputs]
        losses = [self.target.loss(each, targets) for each in outputs]
        if len(losses) == 1:
            return losses[0], metrics[0]
        parts = [{"loss": loss.detach(), **more} for loss, more in zip(losses, metrics, strict=True)]
        return torch.stack(losses).sum(), numbered(parts)


def numbered(results: Sequence[Mapping[str, ResultT]]) -> dict[str, ResultT]:
    """Returns the results of several predictions as one mapping, numbered from 1: ``loss_1``; of one as they are."""
    if len(results) == 1:
        return dict(results[0])
    return {f"{name}_{number}": value for number, one in enumerate(results, 1) for name, value in one.items()}


def _listed(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else outputs
