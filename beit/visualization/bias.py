"""What a model has learnt about places: its relative position bias tables as images."""

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from beit.modeling import Backbone
from beit.relative_position import CLASS_TOKEN_ROWS


@dataclass(frozen=True)
class BiasImages:
    """One table, seen from a patch in the middle.

    Attributes:
        name: Whose table it is: ``all blocks``, or ``block 3``.
        grids: ``(heads, 2h - 1, 2w - 1)``; the pixel ``(h - 1 + y, w - 1 + x)`` is the bias towards the patch that is
            ``y`` rows below and ``x`` columns right of the one that looks.
        class_token: ``(heads, 3)``: from the class token to a patch, from a patch to it, from it to itself.
    """

    name: str
    grids: Tensor
    class_token: Tensor


def bias_images(table: Tensor, window: tuple[int, int], name: str = "") -> BiasImages:
    """Arranges a table ``(rows, heads)`` for a window of ``(h, w)`` patches as images.

    A table's rows count offsets of the query from the key; the images are turned by 180 degrees, so that what is right
    of the centre is right in the photograph.
    """
    values = table.detach().float().cpu()
    offsets = rearrange(values[:-CLASS_TOKEN_ROWS], "(y x) heads -> heads y x", y=2 * window[0] - 1)
    return BiasImages(name, offsets.flip(1, 2), values[-CLASS_TOKEN_ROWS:].T)


def bias_images_of(model: Backbone) -> list[BiasImages]:
    """Returns the tables of a model: the shared one, those of the blocks, or none."""
    window = model.patch_embed.grid_size
    found = []
    if model.rel_pos_bias is not None:
        found.append(bias_images(model.rel_pos_bias.relative_position_bias_table, window, "all blocks"))
    for number, block in enumerate(model.blocks):
        if block.attn.relative_position_bias_table is not None:
            found.append(bias_images(block.attn.relative_position_bias_table, window, f"block {number}"))
    return found
