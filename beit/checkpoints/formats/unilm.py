"""The official names, which are ours and timm's; files differ in wrappers' prefixes and in derived buffers.

A segmentor's file is one of mmsegmentation 0.x: all but the heads, the pyramid too, stands below ``backbone``.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from beit.checkpoints.formats.segmentation import HEADS, is_segmentor

INDEX = "relative_position_index"
TABLE = "relative_position_bias_table"

# What a wrapper puts before every name: DistributedDataParallel, torch.compile, a segmentor, a detector, Lightning.
WRAPPERS = ("module.", "_orig_mod.", "backbone.", "bottom_up.", "model.")


def bare(name: str) -> str:
    """Returns a name without the prefixes of wrappers."""
    while prefix := next((prefix for prefix in WRAPPERS if name.startswith(prefix)), ""):
        name = name[len(prefix) :]
    return name


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Takes off the prefixes of wrappers and leaves out the index buffers, which follow from the window."""
    return {bare(name): tensor for name, tensor in state_dict.items() if not name.endswith(INDEX)}


def from_official(weights: Mapping[str, Tensor], position_index: Tensor | None = None) -> dict[str, Tensor]:
    """Writes a file as the official code does: with the index buffers beside the tables, and a segmentor in its parts.

    Args:
        weights: Weights in official names.
        position_index: Rows of the tables, int64 ``(N + 1, N + 1)``; None where there are no tables.
    """
    if is_segmentor(weights):
        weights = {name if name.startswith(HEADS) else f"backbone.{name}": t for name, t in weights.items()}
    return dict(with_index(weights, position_index))


def with_index(weights: Mapping[str, Tensor], position_index: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights, each table followed by a copy of the index."""
    for name, tensor in weights.items():
        yield name, tensor
        if position_index is not None and name.endswith(TABLE):
            yield name.removesuffix(TABLE) + INDEX, position_index.clone()
