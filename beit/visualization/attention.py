"""Where blocks look: attention maps of chosen patches, and how far away from a patch each head looks."""

from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor

from beit.errors import InputError
from beit.modeling import Backbone

Query = tuple[int, int]  # row and column of a patch, from 0


def attention_by_block(model: Backbone, images: Tensor, bool_masked_pos: Tensor | None = None) -> Iterator[Tensor]:
    """Runs images through a model once, and stops at each block for its attention probabilities.

    Args:
        model: Any backbone, in evaluation mode.
        images: Normalised, ``(B, 3, H, W)``.
        bool_masked_pos: Patches that a pre-trained model does not see, bool ``(B, h, w)``.

    Yields:
        ``(B, heads, N + 1, N + 1)``, indexed by query and key; only one block's are in memory at a time.
    """
    index = model.relative_position_index
    shared = None if model.rel_pos_bias is None else model.rel_pos_bias(index)
    tokens = model.embed(images, bool_masked_pos)  # (B, N+1, D)
    for block in model.blocks:
        yield block.attn.attention_map(block.norm1(tokens), index, shared)
        tokens = block(tokens, index, shared)


def query_maps(attention: Tensor, queries: Sequence[Query], grid: tuple[int, int]) -> Tensor:
    """Takes the attention of some patches out of a block's, arranged as the image is.

    Args:
        attention: Probabilities ``(B, heads, N + 1, N + 1)``.
        queries: The patches that look.
        grid: The patch grid ``(h, w)``.

    Returns:
        ``(B, queries, heads, h, w)``. A map sums to 1 less the probability of the class token, which has no place in
        the image.

    Raises:
        InputError: A query is outside the grid.

    Source: BEiT (arXiv 2106.08254), figure 2.
    """
    check_queries(queries, grid)
    height, width = grid
    tokens = [1 + row * width + column for row, column in queries]
    return rearrange(attention[:, :, tokens, 1:], "b heads q (h w) -> b q heads h w", h=height)


def check_queries(queries: Sequence[Query], grid: tuple[int, int]) -> None:
    """Raises :class:`InputError` for the first query that is outside a patch grid ``(h, w)``."""
    height, width = grid
    for row, column in queries:
        if not (0 <= row < height and 0 <= column < width):
            raise InputError(
                f"--query {row},{column} is outside the image's {height} x {width} patches: "
                f"rows are 0 to {height - 1}, columns 0 to {width - 1}"
            )


def default_queries(grid: tuple[int, int]) -> list[Query]:
    """Returns a few patches that are far apart: the centre, and the middles of two opposite quarters."""
    height, width = grid
    places = [(height // 2, width // 2), (height // 4, width // 4), (3 * height // 4, 3 * width // 4)]
    return list(dict.fromkeys(places))


def patch_distances(grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Returns the distances in pixels between the centres of patches, ``(N, N)``.

    Args:
        grid: The patch grid ``(h, w)``.
        patch_size: Height and width of a patch, in pixels.
    """
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    centres = torch.stack((rows * patch_size[0], columns * patch_size[1]), dim=-1).flatten(0, 1).double()
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def mean_distances(attention: Tensor, distances: Tensor) -> Tensor:
    """Returns how far each head looks: the distance from a patch to the patches it attends to, in pixels.

    Each key counts with its probability; the class token, which is nowhere, is left out and the probabilities of the
    patches are scaled to sum to 1. The mean over all query patches is taken after that, so each counts the same.

    Args:
        attention: Probabilities ``(B, heads, N + 1, N + 1)``.
        distances: From :func:`patch_distances`.

    Returns:
        float64 ``(B, heads)``.

    Source: the attention distance of arXiv 2010.11929, appendix D.7, which says nothing of the class token.
    """
    between_patches = attention[:, :, 1:, 1:].double()
    seen = between_patches / between_patches.sum(dim=-1, keepdim=True)
    return (seen * distances.to(seen.device)).sum(dim=-1).mean(dim=-1)
