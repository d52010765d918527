"""How a representation forms: scores of the features of a model in training on a small labelled set of images.

Nothing is trained and no random number is drawn, so a run that is watched takes the same steps as one that is not.

Source: k-NN as DINO (arXiv 2104.14294) measures it; RankMe is arXiv 2210.02885.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.data.classification import check_classes, find_images
from beit.data.datasets import ImageDataset, Transform
from beit.data.loaders import Batch, EpochDataset, EpochLoader
from beit.data.transforms import normalize
from beit.errors import InputError
from beit.features import nearest, share_of, vote, whole
from beit.inference import pool_tokens
from beit.modeling import Backbone
from beit.targets import entropy
from beit.training.checkpoint import RunFolder
from beit.training.compilation import uncompiled
from beit.training.precision import Precision
from beit.visualization.curves import read_log

logger = logging.getLogger(__name__)

NEIGHBOURS, TEMPERATURE = 20, 0.07
PENALTY = 0.1  # of the ridge regression, per image, for features of variance 1
# The lowest value that a score can have, and the lowest without an alarm. Once RISE above what it can have, it is
# expected to keep a fourth of that rise.
LEAST = {"rankme": (1.0, 1.001), "codebook_perplexity": (1.0, 4.0), "token_entropy": (0.0, 0.0)}
RISE, FALL = 2.0, 4

Labelled = tuple[Tensor, Tensor]  # features (n, D), each of length 1, and classes (n,)


class RepresentationProbe:
    """Scores the mean patch token of every block; see :meth:`__call__` and :meth:`watch`.

    ``path`` has the folders ``train`` and ``val``, or those of classes, every other image of which is held out; samples
    have ``image``, the model's view. Raises :class:`InputError` if there are no images with classes, or too few.
    """

    def __init__(
        self,
        path: str,
        transform: Transform,
        loader_of: Callable[[EpochDataset], EpochLoader],
        mean: Sequence[float],
        std: Sequence[float],
        precision: Precision,
    ) -> None:
        folders = ("train", "val") if os.path.isdir(os.path.join(path, "train")) else ("",)
        places = [os.path.join(path, folder) if folder else path for folder in folders]
        images = [find_images("image_folder", place, train=True) for place in places]
        if len(check_classes(images)) < 2 or min(map(len, images)) < 4:
            raise InputError(f"--probe_data_path {path}: needs 2 classes, and some images of each")
        self.loaders = [loader_of(ImageDataset(found, transform, 0, labels=True)) for found in images]
        self.mean, self.std, self.precision = mean, std, precision
        self._highest: dict[str, float] = {}  # of each score so far

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Returns the scores of the block with the best ``knn_acc1`` (percent), whose number is ``layer``, from 0.

        ``linear_acc1`` (percent) is a ridge regression's to the classes. ``rankme`` is the effective rank of what the
        last block makes of the held-out images, from 1, all alike, to their number or the width.
        """
        assert isinstance(model, Backbone)
        model.eval()
        blocks = [str(number) for number in range(model.get_num_layers())]
        sizes = dict.fromkeys(blocks, model.embed_dim)
        shares = [share_of(loader, sizes, lambda batch: self._features(model, batch)) for loader in self.loaders]
        scores: dict[str, float] = {}
        parts: dict[str, tuple[Labelled, Labelled]] = {}
        for name in blocks:
            found = [whole(share, name, self.precision.device) for share in shares]
            if len(found) == 1:
                found = [(found[0][0][first::2], found[0][1][first::2]) for first in (0, 1)]
            parts[name] = bank, held_out = found[0], found[1]
            scores[name] = neighbours(bank, held_out)
        best = max(blocks, key=lambda name: scores[name])  # the first of equals
        rank = effective_rank(parts[blocks[-1]][1][0])
        return {"knn_acc1": scores[best], "linear_acc1": ridge(*parts[best]), "rankme": rank, "layer": float(best)}

    def _features(self, model: Backbone, batch: Batch) -> dict[str, Tensor]:
        images = normalize(batch["image"].to(self.precision.device), self.mean, self.std)
        with self.precision.autocast(), uncompiled():
            outputs = model.get_intermediate_layers(images)
        grid = model.patch_embed.grid_size
        return {str(number): pool_tokens(tokens.float(), "mean", grid) for number, tokens in enumerate(outputs)}

    def watch(self, scores: Mapping[str, float], folder: RunFolder | None = None) -> dict[str, float]:
        """Warns where scores show a collapse; returns them with ``probe_`` before their names.

        The log in ``folder``, if there is one, has the scores from before the run was resumed.
        """
        earlier: list[dict[str, Any]] = []
        with contextlib.suppress(InputError):  # of a log without an epoch yet
            earlier = read_log(folder.path) if folder else []
        for name, score in scores.items():
            if bounds := LEAST.get(name.rstrip("_12")):  # the predictions of BEiT v2 are numbered
                lowest, least = bounds
                before = [entry.get(f"test_probe_{name}") or lowest for entry in earlier]
                highest = self._highest[name] = max(score, self._highest.get(name, lowest), *before)
                if score < least or (highest - lowest >= RISE and FALL * (score - lowest) < highest - lowest):
                    logger.warning(
                        "%s %.3g, at its highest %.3g: the representation collapses, images look all the same to it; "
                        "lower --lr, set --clip_grad, and check the images and the tokenizer",
                        *(name, score, highest),
                    )
        return {f"probe_{name}": value for name, value in scores.items()}


def neighbours(bank: Labelled, queries: Labelled) -> float:
    """Returns the accuracy, in percent, of a weighted vote of the nearest neighbours."""
    features, labels = bank
    similarities, indices = nearest(queries[0], features, min(NEIGHBOURS, len(features)))
    votes = vote(similarities, labels[indices], TEMPERATURE, int(labels.max()) + 1)
    return 100 * (votes.argmax(dim=1) == queries[1]).sum().item() / len(votes)


def ridge(bank: Labelled, queries: Labelled) -> float:
    """Returns the accuracy, in percent, of a ridge regression to the classes, solved exactly."""
    features, labels = bank
    inputs, others = features.cpu().double(), queries[0].cpu().double()  # not every device has doubles
    mean, deviation = inputs.mean(dim=0), inputs.std(dim=0) + 1e-12
    inputs, others = (inputs - mean) / deviation, (others - mean) / deviation
    targets = F.one_hot(labels.cpu()).double()
    penalty = PENALTY * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ (targets - targets.mean(dim=0)))
    predictions = others @ weights + targets.mean(dim=0)
    return 100 * (predictions.argmax(dim=1) == queries[1].cpu()).sum().item() / len(predictions)


def effective_rank(features: Tensor) -> float:
    """Returns RankMe of features ``(n, D)``, from 1 to min(n, D): exp of the entropy of their singular values."""
    return entropy(torch.linalg.svdvals(features.cpu().double())).exp().item()
