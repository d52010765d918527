"""Learned codebooks: the nearest code, k-means, and vectors gathered so that every process has the same codebook."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

DISTANCES_AT_ONCE = 1 << 26  # vectors × codes compared at a time: 256 MiB of float32


def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """Returns the nearest code by Euclidean distance: ``(M, D)`` and ``(K, D)`` → int64 ``(M,)``.

    Between vectors of length 1 it is the code of largest cosine. Computed in the vectors' format, without autocast: the
    same under any precision of the run.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        half_squares = codes.square().sum(dim=1) / 2
        rows = max(1, DISTANCES_AT_ONCE // len(codes))
        # |v − e|² / 2 = |v|² / 2 − v·e + |e|² / 2, and the first term is the same for all codes
        return torch.cat([(half_squares - part @ codes.T).argmin(dim=1) for part in vectors.split(rows)])


def sums_by_code(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Adds up the vectors ``(M, D)`` of each code over all processes: sums ``(K, D)`` and counts ``(K,)``."""
    sums = vectors.new_zeros(num_codes, vectors.shape[1] + 1)
    sums.index_add_(0, ids, F.pad(vectors, (0, 1), value=1.0))
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums[:, :-1], sums[:, -1]


def gather(vectors: Tensor) -> Tensor:
    """Returns the vectors ``(M, D)`` of all processes, in the order of their ranks; each must give equally many."""
    if not dist.is_initialized():
        return vectors
    parts = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, vectors.contiguous())
    return torch.cat(parts)


def draw(vectors: Tensor, number: int) -> Tensor:
    """Returns ``number`` of the vectors ``(M, D)`` at random, each once if there are enough: the same on all processes.

    Called with the vectors of all processes (see :func:`gather`). The first process draws.
    """
    total = len(vectors)
    rows = torch.randperm(total)[:number] if number <= total else torch.randint(total, (number,))
    rows = rows.to(vectors.device)
    if dist.is_initialized():
        dist.broadcast(rows, src=0)
    return vectors[rows]


def kmeans(vectors: Tensor, means: Tensor, iterations: int = 10, *, cosine: bool = False) -> tuple[Tensor, Tensor]:
    """Moves means to the centres of the vectors nearest to them (Lloyd's algorithm).

    Args:
        vectors: This process's ``(M, D)``; their sums are taken over all processes. Of length 1 with ``cosine``.
        means: Where to start, ``(K, D)``, equal on all processes; see :func:`draw`.
        iterations: How often to assign and move.
        cosine: Keep the means at length 1.

    Returns:
        The means, and how many vectors each had in the last assignment, ``(K,)``. A mean without any stays.
    """
    counts = means.new_zeros(len(means))
    for _ in range(iterations):
        sums, counts = sums_by_code(vectors, nearest(vectors, means), len(means))
        moved = F.normalize(sums, dim=1) if cosine else sums / counts.clamp(min=1).unsqueeze(1)
        means = torch.where(counts.unsqueeze(1) > 0, moved, means)
    return means, counts
