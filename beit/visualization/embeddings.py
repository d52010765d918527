"""Projections of image features to 2D."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from beit.errors import InputError

MIN_IMAGES = 4
PERPLEXITY = 30  # scikit-learn's default; it must be below the number of points
MAX_CLASSES = 20  # in a readable legend

Embedding = tuple[Tensor, tuple[str, str]]  # points, float64 (N, 2), and the labels of the axes


def embed(features: Tensor, method: str, seed: int = 0) -> Embedding:
    """Projects features ``(N, D)`` to 2D by one of :data:`METHODS`; raises as :func:`check_embedding` does."""
    check_embedding(len(features), method)
    return METHODS[method](features.cpu().double(), seed)


def check_embedding(images: int, method: str) -> None:
    """Raises InputError for too few images or a library that is not installed; call it before a long computation."""
    if images < MIN_IMAGES:
        raise InputError(f"{images} images make no picture of features: give {MIN_IMAGES} or more")
    if METHODS[method] is tsne:
        try:
            import sklearn.manifold  # noqa: F401
        except ImportError as error:
            raise InputError(
                "t-SNE needs scikit-learn: pip install scikit-learn, or choose --method pca, which needs nothing"
            ) from error


def pca(features: Tensor, _seed: int = 0) -> Embedding:
    """Projects features ``(N, D)`` on their first two principal components.

    A component's sign is arbitrary; here its largest entry is positive, so that the picture is reproducible.
    """
    centred = features - features.mean(dim=0)
    _, lengths, directions = torch.linalg.svd(centred, full_matrices=False)  # directions: (min(N, D), D)
    signs = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    points = centred @ (directions * signs)[:2].T
    variances = lengths.square()
    shares = variances[:2] / variances.sum().clamp_min(torch.finfo(variances.dtype).tiny)
    first, second = (f"component {i + 1}: {share:.0%} of the variance" for i, share in enumerate(shares.tolist()))
    return points, (first, second)


def tsne(features: Tensor, seed: int = 0) -> Embedding:
    """Projects features ``(N, D)`` by t-SNE, which keeps neighbours together; distances between groups mean little."""
    from sklearn.manifold import TSNE

    # 50 principal components keep what distances depend on, at a fraction of the time of 768.
    left, lengths, _ = torch.linalg.svd(features - features.mean(dim=0), full_matrices=False)
    reduced = (left * lengths)[:, :50].numpy()
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    return torch.from_numpy(np.asarray(points, dtype=np.float64)), ("t-SNE 1", "t-SNE 2")


METHODS: dict[str, Callable[[Tensor, int], Embedding]] = {"pca": pca, "tsne": tsne}


def group_by_class(labels: Tensor, names: Sequence[str], most: int = MAX_CLASSES) -> list[tuple[str, Tensor]]:
    """Groups images by class for a legend; if there are too many classes, only the ``most`` frequent ones are named.

    Returns names and the positions, int64, of their images in ``labels``, int64 ``(N,)``; last, under an empty name,
    the images of all other classes.
    """
    counts = torch.bincount(labels, minlength=len(names))
    present = int((counts > 0).sum())
    frequent = counts.argsort(descending=True, stable=True)[: min(most, present)].sort().values
    groups = [(names[number], (labels == number).nonzero().flatten()) for number in frequent.tolist()]
    rest = (~torch.isin(labels, frequent)).nonzero().flatten()
    return [*groups, ("", rest)] if len(rest) else groups
