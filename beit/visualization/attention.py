"""Attention maps of chosen patches, the mean attention distance of each head, and bias tables as images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from beit.errors import InputError
from beit.modeling import Backbone
from beit.relative_position import CLASS_TOKEN_ROWS

Query = tuple[int, int]  # row and column of a patch, from 0


def attention_by_block(model: Backbone, images: Tensor) -> Iterator[Tensor]:
    """Yields the attention probabilities of each block, ``(B, heads, N + 1, N + 1)``, by query and key.

    The model runs once, in evaluation mode, on normalised images ``(B, 3, H, W)``; only one block's probabilities are
    in memory at a time.
    """
    index = model.relative_position_index
    shared = None if model.rel_pos_bias is None else model.rel_pos_bias(index)
    tokens = model.embed(images)  # (B, N+1, D)
    for block in model.blocks:
        yield block.attn.attention_map(block.norm1(tokens), index, shared)
        tokens = block(tokens, index, shared)


def query_maps(attention: Tensor, queries: Sequence[Query], grid: tuple[int, int]) -> Tensor:
    """Selects the attention ``(B, heads, N + 1, N + 1)`` of some patches, arranged like the image.

    A map, of ``(B, queries, heads, h, w)``, sums to 1 minus the probability of the class token, which has no place in
    the image.

    Source: BEiT (arXiv 2106.08254), figure 2.
    """
    height, width = grid
    tokens = [1 + row * width + column for row, column in queries]
    return rearrange(attention[:, :, tokens, 1:], "b heads q (h w) -> b q heads h w", h=height)


def check_queries(queries: Sequence[Query], grid: tuple[int, int]) -> None:
    """Raises :class:`InputError` for the first query outside a patch grid ``(h, w)``."""
    height, width = grid
    for row, column in queries:
        if not (0 <= row < height and 0 <= column < width):
            raise InputError(
                f"--query {row},{column} is outside the image's {height} x {width} patches: "
                f"rows are 0 to {height - 1}, columns 0 to {width - 1}"
            )


def default_queries(grid: tuple[int, int]) -> list[Query]:
    """Returns a few patches far from each other: the centre, and the centres of two opposite quarters."""
    height, width = grid
    places = [(height // 2, width // 2), (height // 4, width // 4), (3 * height // 4, 3 * width // 4)]
    return list(dict.fromkeys(places))


def patch_distances(grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Returns the distances in pixels, ``(N, N)``, between patches of ``patch_size`` pixels in a grid of ``(h, w)``."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    centres = torch.stack((rows * patch_size[0], columns * patch_size[1]), dim=-1).flatten(0, 1).double()
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def mean_distances(attention: Tensor, distances: Tensor) -> Tensor:
    """Returns the mean attention distance of each head in pixels, float64 ``(B, heads)`` on the CPU.

    Distances, from :func:`patch_distances`, are weighted by the attention probabilities ``(B, heads, N + 1, N + 1)``
    of the patches, rescaled to sum to 1 without the class token, and then averaged over all query patches.

    Source: ViT (arXiv 2010.11929), appendix D.7, which does not mention the class token.
    """
    between_patches = attention[:, :, 1:, 1:].cpu().double()  # MPS has no float64
    seen = between_patches / between_patches.sum(dim=-1, keepdim=True)
    return (seen * distances).sum(dim=-1).mean(dim=-1)


@dataclass(frozen=True)
class BiasImages:
    """One table, as seen from a query patch in the centre.

    Pixel ``(h - 1 + y, w - 1 + x)`` is the bias for a key ``y`` rows below and ``x`` columns right of the query.
    """

    name: str  # where the table is used: all blocks, or block 3
    grids: Tensor  # (heads, 2h - 1, 2w - 1)
    class_token: Tensor  # (heads, 3): class token to patch, patch to class token, class token to itself


def bias_images(table: Tensor, window: tuple[int, int], name: str = "") -> BiasImages:
    """Arranges a table ``(rows, heads)`` of a window of ``(h, w)`` patches as images.

    Table rows are offsets of the query from the key, so the images are rotated by 180 degrees: right of the centre is
    right in the photograph.
    """
    values = table.detach().float().cpu()
    offsets = rearrange(values[:-CLASS_TOKEN_ROWS], "(y x) heads -> heads y x", y=2 * window[0] - 1)
    return BiasImages(name, offsets.flip(1, 2), values[-CLASS_TOKEN_ROWS:].T)


def bias_images_of(model: Backbone) -> list[BiasImages]:
    """Returns the tables of a model: the shared one, one per block, or none."""
    owners = {"all blocks": model.rel_pos_bias, **{f"block {n}": block.attn for n, block in enumerate(model.blocks)}}
    tables = {name: getattr(owner, "relative_position_bias_table", None) for name, owner in owners.items()}
    window = model.patch_embed.grid_size
    return [bias_images(table, window, name) for name, table in tables.items() if table is not None]
