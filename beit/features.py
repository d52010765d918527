"""Features of a frozen backbone: what linear probes and nearest neighbours work on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from beit.data.loaders import Batch, EpochLoader
from beit.data.transforms import normalize
from beit.errors import InputError
from beit.inference import block_number, known_pool, pool_tokens
from beit.modeling import Backbone
from beit.training import distributed
from beit.training.precision import Precision

CHUNK = 2048  # queries, and candidates, per block of similarities: 16 MB


@dataclass(frozen=True)
class Feature:
    """One vector per image."""

    name: str  # layer<number>_<pool>
    layer: int  # the block, from 0
    pool: str  # as in :func:`beit.inference.extract_feat`
    size: int  # its length


class FrozenFeatures:
    """Computes features of many blocks in one pass, without gradients; freezes the backbone.

    Args:
        model: The backbone, on its device.
        layers: Its blocks, from 0 on or, if negative, from the end; empty for all.
        pools: Poolings of each block: ``cls``, ``mean`` or ``cls_mean``.
        mean: Mean of the backbone's input, per channel.
        std: Standard deviation of the backbone's input, per channel.
        precision: Number format of the pass.

    Raises:
        InputError: There is no such block or pool.
    """

    def __init__(
        self,
        model: Backbone,
        *,
        layers: Sequence[int] = (),
        pools: Sequence[str] = ("mean",),
        mean: tuple[float, ...],
        std: tuple[float, ...],
        precision: Precision,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.precision = precision
        self._mean, self._std = mean, std
        self.layers = sorted({block_number(model, layer) for layer in layers or range(model.get_num_layers())})
        for pool in pools:
            if known_pool(pool) == "map":
                raise InputError("pool map gives no vector of an image: choose cls, mean or cls_mean")
        self.features = tuple(
            Feature(f"layer{layer}_{pool}", layer, pool, model.embed_dim * (2 if pool == "cls_mean" else 1))
            for layer in self.layers
            for pool in dict.fromkeys(pools)
        )

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self.precision.device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the features of uint8 images ``(B, 3, H, W)`` by name, each float32 ``(B, size)``."""
        with self.precision.autocast():
            inputs = normalize(images.to(self.device, non_blocking=True), self._mean, self._std)
            outputs = self.model.get_intermediate_layers(inputs, n=self.layers)
        tokens = dict(zip(self.layers, outputs, strict=True))
        grid = self.model.patch_embed.grid_size
        # Pooled in float32: a mean over many patches loses digits in a shorter format.
        return {f.name: pool_tokens(tokens[f.layer].float(), f.pool, grid) for f in self.features}

    def of(self, loader: EpochLoader) -> "Share":
        """Computes the features of this process's part of a data set; see :func:`share_of`."""
        return share_of(loader, {f.name: f.size for f in self.features}, lambda batch: self(batch["image"]))


@dataclass(frozen=True)
class Share:
    """This process's part of a data set's features."""

    features: dict[str, Tensor]  # by name, float32 (n, D), in host memory
    labels: Tensor  # int64 (n,); -1 for unreadable images
    positions: Tensor  # of the images in the data set, int64 (n,)
    images: int  # in the whole data set


def share_of(loader: EpochLoader, sizes: Mapping[str, int], compute: Callable[[Batch], Mapping[str, Tensor]]) -> Share:
    """Computes features of this process's part of a labelled data set, which ``loader`` reads in order and in full.

    ``sizes`` are their lengths by name; ``compute`` returns those of a batch on the host, ``(B, size)`` each.
    """
    found: dict[str, list[Tensor]] = {name: [torch.empty(0, size)] for name, size in sizes.items()}
    labels, positions = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.long)]
    for indices, batch in loader.once():
        for name, output in compute(batch).items():
            found[name].append(output.cpu())
        labels.append(batch["label"])
        positions.append(torch.from_numpy(indices))
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return Share(joined, torch.cat(labels), torch.cat(positions), len(loader.dataset))


def whole(share: Share, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Joins all processes' parts on the device, in order: features ``(images, D)`` and labels ``(images,)``."""
    own, positions = share.features[name], share.positions.to(device)
    rows = torch.zeros(share.images, own.shape[1], device=device)
    labels = torch.zeros(share.images, dtype=torch.long, device=device)
    rows[positions], labels[positions] = own.to(device), share.labels.to(device)
    return distributed.sum_over_ranks(rows), distributed.sum_over_ranks(labels)


def nearest(queries: Tensor, candidates: Tensor, k: int, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Finds the most similar candidates of each query, exactly, keeping one block of similarities in memory.

    Args:
        queries: ``(M, D)``.
        candidates: ``(N, D)``.
        k: Number of candidates to find, at most ``N``.
        chunk: Queries, and candidates, per block.

    Returns cosine similarities in descending order, and indices of candidates, both ``(M, k)``.
    """
    found = []
    for part in F.normalize(queries, dim=-1).split(chunk):
        best, where = part.new_empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.long, device=part.device)
        for start in range(0, len(candidates), chunk):
            similarities = part @ F.normalize(candidates[start : start + chunk], dim=-1).T  # (m, n)
            numbers = torch.arange(start, start + similarities.shape[1], device=part.device).expand_as(similarities)
            best, where = torch.cat([best, similarities], dim=1), torch.cat([where, numbers], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            where = where.gather(1, order)
        found.append((best, where))
    return torch.cat([best for best, _ in found]), torch.cat([where for _, where in found])


def vote(similarities: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Returns the votes ``(M, num_classes)`` of neighbours with these similarities and labels, both ``(M, k)``."""
    # Relative to the nearest, whose vote is 1: exp(1 / temperature) would overflow float32 below 0.0113.
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    return weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels, weights)
