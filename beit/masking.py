"""Masks of patches: blockwise (the method's), blockwise with an exact count (BEiT v2's), and random.

:data:`beit.registry.MASK_STRATEGIES` lists them by name. A strategy is called with the arguments of
:class:`BlockwiseMaskGenerator` up to ``max_num_patches`` and gives a :class:`MaskGenerator`.
"""

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from beit.errors import InputError

PUBLISHED_SHARE = 75 / 196  # of the patches, at most
BLOCK_TRIES = 10  # proposals per block; if all fail, the mask is complete
_MOST_EMPTY = 1000  # masks; if none gets a block, the setting is refused


class MaskGenerator(Protocol):
    """Draws the mask of an image."""

    grid_size: tuple[int, int]
    num_mask_patches: int

    def __call__(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Returns a bool array ``grid_size``, True where the patch is masked."""


class BlockwiseMaskGenerator:
    """Masks rectangular blocks of patches until the target is met or no further block fits.

    The area of a block is uniform between ``min_num_patches`` and the number of patches left to mask (in either order),
    its aspect ratio (height over width) log-uniform, its position uniform. A block is accepted if it is smaller than
    the grid on both sides and adds between 1 and the remaining number of patches; after 10 rejections in a row the mask
    is complete. So ``num_mask_patches`` is an upper bound: the published 75 of 14 x 14 average 74.5, rarely below 70.

    Source: section 2.3 and algorithm 1 of arXiv 2106.08254.
    Deviation: an empty mask, whose loss is undefined, is drawn again; the published setting never draws one.

    Args:
        grid_size: Patches ``(H, W)`` of the image, or one number for a square grid.
        num_mask_patches: Maximum number of masked patches per image.
        min_num_patches: Minimum area of a block, in patches.
        max_num_patches: Maximum number of patches a block may add; ``None`` is ``num_mask_patches``.
        min_aspect: One end of the range of aspect ratios.
        max_aspect: The other end; ``None`` is ``1 / min_aspect``.

    Raises:
        InputError: A size is not positive, the target exceeds the grid, or no block fits, or hardly ever.
    """

    def __init__(
        self,
        grid_size: int | tuple[int, int],
        num_mask_patches: int = 75,
        min_num_patches: int = 16,
        max_num_patches: int | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ) -> None:
        self.grid_size = _checked_grid(grid_size, num_mask_patches)
        self.num_mask_patches = num_mask_patches
        self.min_num_patches = min_num_patches
        self.max_num_patches = num_mask_patches if max_num_patches is None else max_num_patches
        if min_num_patches < 0 or self.max_num_patches < 1:
            raise InputError(
                f"mask blocks of {min_num_patches} to {self.max_num_patches} patches cannot be drawn: "
                "min_num_patches must be at least 0 and max_num_patches at least 1"
            )
        if min_aspect <= 0 or (max_aspect is not None and max_aspect <= 0):
            raise InputError(f"aspect ratios must be positive, got min_aspect {min_aspect}, max_aspect {max_aspect}")
        low, high = sorted((min_aspect, 1 / min_aspect if max_aspect is None else max_aspect))
        self._log_aspect = (math.log(low), math.log(high / low))
        rng = np.random.default_rng(0)
        if not any(self._blocks(rng).any() for _ in range(_MOST_EMPTY)):
            rows, columns = self.grid_size
            raise InputError(
                f"no mask block fits: on the {rows} x {columns} grid a block must be smaller than the grid on both "
                f"sides, have {min_num_patches} to {self.max_num_patches} patches (at most {num_mask_patches} masked) "
                f"and an aspect ratio from {low:.3g} to {high:.3g}; lower min_num_patches, widen the aspect ratios "
                "(0.3 to 3.33 is usual) or use random masks"
            )

    def __call__(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Returns a bool array ``(H, W)``, True at 1 to ``num_mask_patches`` masked patches."""
        mask = self._blocks(rng)
        while not mask.any():
            mask = self._blocks(rng)
        return mask

    def _blocks(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        mask = np.zeros(self.grid_size, dtype=np.bool_)
        remaining = self.num_mask_patches
        while remaining and (added := self._add_block(mask, min(remaining, self.max_num_patches), rng)):
            remaining -= added
        return mask

    def _add_block(self, mask: NDArray[np.bool_], most: int, rng: np.random.Generator) -> int:
        """Masks one block that adds 1 to ``most`` patches; returns the number added, 0 if all proposals failed."""
        rows, columns = self.grid_size
        log_low, log_span = self._log_aspect
        # One call for all proposals: separate draws would dominate the cost.
        for area_draw, aspect_draw, top_draw, left_draw in rng.random((BLOCK_TRIES, 4)).tolist():
            area = self.min_num_patches + area_draw * (most - self.min_num_patches)
            aspect = math.exp(log_low + aspect_draw * log_span)
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = int(top_draw * (rows - height + 1)), int(left_draw * (columns - width + 1))
            block = mask[top : top + height, left : left + width]
            added = height * width - int(np.count_nonzero(block))
            if 0 < added <= most:
                block[:] = True
                return added
        return 0


class ExactBlockwiseMaskGenerator(BlockwiseMaskGenerator):
    """Masks exactly ``num_mask_patches`` patches: blocks, and where they leave some over, single patches at random.

    Source: the authors' code for BEiT v2 (arXiv 2208.06366).
    """

    def __call__(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Returns a bool array ``(H, W)``, True at ``num_mask_patches`` masked patches."""
        mask = super().__call__(rng)
        left = np.flatnonzero(~mask)
        missing = self.num_mask_patches - (mask.size - len(left))
        mask.flat[rng.choice(left, missing, replace=False)] = True
        return mask


class RandomMaskGenerator:
    """Masks exactly ``num_mask_patches`` patches, chosen uniformly; there are no blocks to have a size.

    Raises :class:`InputError` for a number that is not positive or exceeds the grid ``(H, W)``.
    """

    def __init__(
        self,
        grid_size: int | tuple[int, int],
        num_mask_patches: int = 75,
        min_num_patches: int = 1,  # noqa: ARG002
        max_num_patches: int | None = None,  # noqa: ARG002
    ) -> None:
        self.grid_size = _checked_grid(grid_size, num_mask_patches)
        self.num_mask_patches = num_mask_patches

    def __call__(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Returns a bool array ``(H, W)``, True at ``num_mask_patches`` masked patches."""
        rows, columns = self.grid_size
        mask = np.zeros(rows * columns, dtype=np.bool_)
        mask[rng.choice(rows * columns, self.num_mask_patches, replace=False)] = True
        return mask.reshape(rows, columns)


def _checked_grid(grid_size: int | tuple[int, int], num_mask_patches: int) -> tuple[int, int]:
    rows, columns = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    if rows < 1 or columns < 1:
        raise InputError(f"a mask needs a grid of at least 1 x 1 patches, got {rows} x {columns}")
    usual = max(1, round(rows * columns * PUBLISHED_SHARE))
    if num_mask_patches <= 0:
        raise InputError(f"num_mask_patches must be at least 1, got {num_mask_patches} (usual here: {usual})")
    if num_mask_patches > rows * columns:
        raise InputError(
            f"num_mask_patches {num_mask_patches} is more than the {rows * columns} patches of the "
            f"{rows} x {columns} grid (usual here: {usual})"
        )
    return rows, columns
