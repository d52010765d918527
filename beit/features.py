"""Features of a frozen backbone: what linear probes and nearest neighbours work on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from beit.data.transforms import normalize
from beit.errors import InputError
from beit.inference import block_number, known_pool, pool_tokens
from beit.modeling import Backbone
from beit.training.precision import Precision


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
            outputs = self.model.get_intermediate_layers(normalize(images, self._mean, self._std), n=self.layers)
        tokens = dict(zip(self.layers, outputs, strict=True))
        grid = self.model.patch_embed.grid_size
        # Pooled in float32: a mean over many patches loses digits in a shorter format.
        return {f.name: pool_tokens(tokens[f.layer].float(), f.pool, grid) for f in self.features}
