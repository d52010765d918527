"""Relative position bias: its index, its gathering, and resizing a table, or absolute positions, to another window.

A window is the patch grid ``(h, w)`` of an image; its ``N = h * w`` patch tokens follow one class token. A table has
one row per offset between two patches, ``(2h - 1) * (2w - 1)`` in all, row-major over (vertical, horizontal) offsets
from ``(-(h - 1), -(w - 1))``, and then three rows for pairs with the class token: class to patch, patch to class, class
to class. Columns are attention heads.

Source: BEiT (arXiv 2106.08254), section 2.1 and the authors' released models.
"""

from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from beit.errors import InputError

CLASS_TOKEN_ROWS = 3
RATIO_BOUNDS = (1.01, 1.5)
RATIO_WIDTH = 1e-6

FloatArray = npt.NDArray[np.float64]


def num_table_rows(window_size: tuple[int, int]) -> int:
    """Returns the number of rows of a table for a window of ``(h, w)`` patches."""
    height, width = window_size
    return (2 * height - 1) * (2 * width - 1) + CLASS_TOKEN_ROWS


def relative_position_index(window_size: tuple[int, int]) -> Tensor:
    """Returns the table row of each pair (query, key) of a window's tokens, int64 ``(N + 1, N + 1)``."""
    height, width = window_size
    row = torch.arange(height).repeat_interleave(width)
    column = torch.arange(width).repeat(height)
    vertical = row[:, None] - row[None, :] + height - 1
    horizontal = column[:, None] - column[None, :] + width - 1

    class_to_patch = num_table_rows(window_size) - CLASS_TOKEN_ROWS
    index = torch.empty(height * width + 1, height * width + 1, dtype=torch.int64)
    index[1:, 1:] = vertical * (2 * width - 1) + horizontal
    index[0, 1:] = class_to_patch
    index[1:, 0] = class_to_patch + 1
    index[0, 0] = class_to_patch + 2
    return index


def relative_position_bias(table: Tensor, index: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Gathers the bias to be added to the attention logits, contiguous ``(H, N + 1, N + 1)`` of the table's dtype.

    Args:
        table: Bias table ``(rows, H)``, one column per head.
        index: The rows to read, int64 ``(N + 1, N + 1)``, from :func:`relative_position_index`.
        window_size: The patch grid ``(h, w)`` of both.
    """
    if table.device.type == "cuda":
        return bias_by_sliding(table, window_size)
    if table.element_size() < 4:  # of which single elements are gathered slowly
        return bias_by_rows(table, window_size)
    # On a CPU, gathering columns of the transposed table is several times faster than rows, and gives the final layout.
    return table.t().index_select(1, index.flatten()).view(-1, *index.shape)


def bias_by_sliding(table: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Gathers the same bias without an index, so that the backward pass uses sums instead of a scatter.

    The offsets to all keys are a window of the plane of offsets, which slides from query to query. On a GPU a scatter
    adds up to ``N`` gradients to one row, one at a time and in a nondeterministic order.
    """
    height, width = window_size
    patches, heads = height * width, table.shape[1]
    offsets = table[:-CLASS_TOKEN_ROWS].t().reshape(heads, 2 * height - 1, 2 * width - 1)
    pairs = offsets.unfold(1, height, 1).unfold(2, width, 1).flip(-2, -1)  # (H, h, w, h, w): query and key
    class_to_patch, patch_to_class, class_to_class = table[-CLASS_TOKEN_ROWS:, :, None, None].unbind(0)
    class_row = torch.cat((class_to_class, class_to_patch.expand(-1, 1, patches)), dim=2)
    patch_rows = torch.cat((patch_to_class.expand(-1, patches, 1), pairs.reshape(heads, patches, patches)), dim=2)
    return torch.cat((class_row, patch_rows), dim=1)


def bias_by_rows(table: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Gathers the same bias by copying what each query sees of the patches, ``h * w`` elements in succession.

    A query sees a plane of offsets from a place that its row and column give. With a plane for each column of queries,
    from which it starts, only the first line that is seen depends on the row.
    """
    height, width = window_size
    patches, heads = height * width, table.shape[1]
    offsets = table[:-CLASS_TOKEN_ROWS].t().reshape(heads, 2 * height - 1, 2 * width - 1).flip(1, 2)
    planes = offsets.unfold(2, width, 1).flip(2).transpose(1, 2).flatten(2)  # (H, w, (2h - 1) * w)
    class_to_patch, patch_to_class, class_to_class = table[-CLASS_TOKEN_ROWS:, :, None, None].unbind(0)
    rows = [torch.cat((class_to_class, class_to_patch.expand(-1, 1, patches)), dim=2)]
    for row in reversed(range(height)):
        seen = planes[..., row * width : row * width + patches]
        rows.append(torch.cat((patch_to_class.expand(-1, width, 1), seen), dim=2))  # (H, w, N + 1)
    return torch.cat(rows, dim=1)


def resize_table(table: Tensor, source_window: tuple[int, int], target_window: tuple[int, int]) -> Tensor:
    """Resizes a bias table to another window, which need not be square.

    The known offsets are placed on a geometric grid that spans the new window, dense around zero, and a bicubic spline
    through them is evaluated at the new integer offsets; those outside the grid take the value at its edge. The three
    rows of the class token are kept. Plain bicubic interpolation is no substitute: it costs several points of mIoU.

    Args:
        table: Bias table ``(num_table_rows(source_window), H)``.
        source_window: The patch grid ``(h, w)`` that the table was trained with.
        target_window: The new patch grid ``(h, w)``.

    Returns:
        A tensor ``(num_table_rows(target_window), H)`` of the table's dtype, on its device, without gradient.

    Raises:
        InputError: The table's shape is not that of ``source_window``.

    Deviation: The official code supports square windows only. Here each axis has its own ratio, one of unchanged length
        keeps its values, and one of two patches (one patch) uses a spline of degree two (a constant).
    """
    expected = num_table_rows(source_window)
    if table.ndim != 2 or len(table) != expected:
        raise InputError(
            f"a relative position table for {source_window[0]} x {source_window[1]} patches has shape "
            f"({expected}, heads), but this one has {tuple(table.shape)}: give the window it was trained with"
        )
    if source_window == target_window:
        return table.detach().clone()

    patches, class_token = table.detach().split([len(table) - CLASS_TOKEN_ROWS, CLASS_TOKEN_ROWS])
    grids = patches.t().reshape(-1, 2 * source_window[0] - 1, 2 * source_window[1] - 1)  # (H, 2h-1, 2w-1)
    resized = np.stack([_resize_grid(grid, target_window) for grid in grids.cpu().double().numpy()])
    rows = torch.from_numpy(resized).to(table).flatten(1).t()  # (H, 2h'-1, 2w'-1) -> (rows', H)
    return torch.cat((rows, class_token)).contiguous()


def resize_position_embedding(pos_embed: Tensor, source_grid: tuple[int, int], target_grid: tuple[int, int]) -> Tensor:
    """Returns a position embedding for another patch grid: bicubic, the class token's kept.

    From ``(1, 1 + h * w, D)`` for ``source_grid``, ``(h, w)``, to ``(1, 1 + h' * w', D)`` for ``target_grid``. Raises
    :class:`InputError` if the embedding does not have the shape of ``source_grid``.
    """
    height, width = source_grid
    if pos_embed.ndim != 3 or pos_embed.shape[1] != 1 + height * width:
        raise InputError(
            f"a position embedding for {height} x {width} patches has shape (1, {1 + height * width}, channels), "
            f"not {tuple(pos_embed.shape)}"
        )
    patches = rearrange(pos_embed[:, 1:], "one (h w) d -> one d h w", h=height)
    resized = F.interpolate(patches, size=target_grid, mode="bicubic", align_corners=False)
    return torch.cat((pos_embed[:, :1], rearrange(resized, "one d h w -> one (h w) d")), dim=1)


def source_positions(source: int, target: int) -> FloatArray:
    """Returns where the ``2 * source - 1`` offsets of an axis of ``source`` patches lie on one of ``target`` patches.

    Symmetric about 0: sums of 1, q, q**2, … with the q of :func:`geometric_ratio`; integers if the length is the same.
    """
    if source == target:
        return np.arange(1.0 - source, source)
    ratio = geometric_ratio(source, target)
    positive = list(accumulate(ratio**power for power in range(source - 1)))
    return np.array([-position for position in reversed(positive)] + [0.0] + positive)


def geometric_ratio(source: int, target: int) -> float:
    """Returns the q for which ``source - 1`` steps 1, q, q**2, … cover the distance of ``target - 1`` unit steps.

    Found by bisection in [1.01, 1.5] to a width of 1e-6 like the official code, whose results depend on where it stops.
    """
    low, high = RATIO_BOUNDS
    ratio = low
    while high - low > RATIO_WIDTH:
        ratio = (low + high) / 2.0
        reach = (1.0 - ratio ** (source - 1)) / (1.0 - ratio)
        if reach > target - 1:
            high = ratio
        else:
            low = ratio
    return ratio


def _resize_grid(values: FloatArray, target_window: tuple[int, int]) -> FloatArray:
    """Evaluates the spline through one head's offsets ``(2h - 1, 2w - 1)`` at the offsets of another window."""
    from scipy.interpolate import RectBivariateSpline  # slow to import, and most runs never resize

    positions, degrees = [], []
    for axis, target in enumerate(target_window):
        if values.shape[axis] == 1:  # one patch: its value holds for all offsets, and a spline needs two points
            values = np.repeat(values, 2, axis=axis)
            positions.append(np.array([-1.0, 1.0]))
        else:
            positions.append(source_positions((values.shape[axis] + 1) // 2, target))
        degrees.append(min(3, values.shape[axis] - 1))

    # The horizontal axis goes first: the other order differs from the official results in the last bit.
    spline = RectBivariateSpline(positions[1], positions[0], values.T, kx=degrees[1], ky=degrees[0])
    rows, columns = (np.arange(1.0 - target, target) for target in target_window)
    return spline(columns, rows).T
