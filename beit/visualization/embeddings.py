"""Features of many images in the plane, each image a point."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit.errors import InputError

FEWEST_POINTS = 4
PERPLEXITY = 30  # scikit-learn's default; it must be below the number of points
MOST_CLASSES = 20  # in a legend that can still be read


@dataclass(frozen=True)
class Embedding:
    """Points in the plane.

    Attributes:
        points: float64 ``(N, 2)``.
        axes: What the two axes are.
    """

    points: Tensor
    axes: tuple[str, str]


def embed(features: Tensor, method: str, seed: int = 0) -> Embedding:
    """Lays features ``(N, D)`` out in the plane by one of :data:`METHODS`.

    Raises:
        InputError: There are too few of them, or the method's library is not installed.
    """
    check_embedding(len(features), method)
    return METHODS[method](features.double().cpu(), seed)


def check_embedding(images: int, method: str) -> None:
    """Checks what :func:`embed` needs; ask before a long computation.

    Raises:
        InputError: There are too few images, or the method's library is not installed.
    """
    if images < FEWEST_POINTS:
        raise InputError(f"{images} images make no picture of features: give {FEWEST_POINTS} or more")
    if METHODS[method] is tsne:
        _check_scikit_learn()


def pca(features: Tensor, _seed: int = 0) -> Embedding:
    """Projects features ``(N, D)`` on the two directions in which they vary most.

    A direction's sign is free; here its largest component is positive, so that the same features give the same picture.
    """
    centred = _at_least_two(features - features.mean(dim=0))
    _, lengths, directions = torch.linalg.svd(centred, full_matrices=False)  # directions: (min(N, D), D)
    signs = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    points = centred @ (directions * signs)[:2].T
    variances = lengths.square()
    shares = variances[:2] / variances.sum().clamp_min(torch.finfo(variances.dtype).tiny)
    first, second = (f"component {i + 1}: {share:.0%} of the variance" for i, share in enumerate(shares.tolist()))
    return Embedding(points, (first, second))


def tsne(features: Tensor, seed: int = 0) -> Embedding:
    """Lays features ``(N, D)`` out so that neighbours stay neighbours; distances between groups mean little.

    Raises:
        InputError: scikit-learn is not installed.
    """
    _check_scikit_learn()
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    # 50 directions hold what distances depend on, and take a fraction of the time of 768.
    reduced = _principal(features, 50).numpy()
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    return Embedding(torch.from_numpy(np.asarray(points, dtype=np.float64)), ("t-SNE 1", "t-SNE 2"))


def _check_scikit_learn() -> None:
    try:
        import sklearn.manifold  # noqa: F401
    except ImportError as error:
        raise InputError(
            "t-SNE needs scikit-learn: pip install 'beit[demo]', or choose --method pca, which needs nothing"
        ) from error


def _principal(features: Tensor, directions: int) -> Tensor:
    """Returns features ``(N, D)`` along their first principal directions, at most so many."""
    left, lengths, _ = torch.linalg.svd(_at_least_two(features - features.mean(dim=0)), full_matrices=False)
    return (left * lengths)[:, :directions]


def _at_least_two(features: Tensor) -> Tensor:
    """Returns features ``(N, D)``, or ``(N, 2)`` with a constant where there is one alone: a plane has two axes."""
    return F.pad(features, (0, max(0, 2 - features.shape[1])))


METHODS: dict[str, Callable[[Tensor, int], Embedding]] = {"pca": pca, "tsne": tsne}


def group_by_class(labels: Tensor, names: Sequence[str], most: int = MOST_CLASSES) -> list[tuple[str, Tensor]]:
    """Sorts images by class for a legend; of too many classes the most frequent ones keep their names.

    Args:
        labels: int64 ``(N,)``.
        names: Of the classes.
        most: Classes that are told apart.

    Returns:
        Names with the positions of their images, int64; those of other classes, if any, last and under an empty name.
    """
    counts = torch.bincount(labels, minlength=len(names))
    present = int((counts > 0).sum())
    frequent = counts.argsort(descending=True, stable=True)[: min(most, present)].sort().values
    groups = [(names[number], (labels == number).nonzero().flatten()) for number in frequent.tolist()]
    rest = (~torch.isin(labels, frequent)).nonzero().flatten()
    return [*groups, ("", rest)] if len(rest) else groups
