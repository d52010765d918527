"""The official names, which are ours and timm's; files differ in wrappers' prefixes and in derived buffers.

A segmentor's file is that of mmsegmentation 0.x: everything but the heads is below ``backbone``, including the pyramid.
"""

from collections.abc import Iterator

from torch import Tensor

from beit.checkpoints.formats.dialect import Content, Dialect, Weights, WholeModel
from beit.checkpoints.formats.segmentation import HEADS, is_segmentor

INDEX = "relative_position_index"
TABLE = "relative_position_bias_table"

# What wrappers put before every name: DistributedDataParallel, torch.compile, a segmentor, a detector, Lightning.
WRAPPERS = ("module.", "_orig_mod.", "backbone.", "bottom_up.", "model.")


def bare(name: str) -> str:
    """Returns a name without the prefixes of wrappers."""
    while prefix := next((prefix for prefix in WRAPPERS if name.startswith(prefix)), ""):
        name = name[len(prefix) :]
    return name


def to_official(state_dict: Weights) -> dict[str, Tensor]:
    """Removes the prefixes of wrappers and the index buffers, which follow from the window."""
    return {bare(name): tensor for name, tensor in state_dict.items() if not name.endswith(INDEX)}


def from_official(weights: Weights, position_index: Tensor | None = None) -> dict[str, Tensor]:
    """Adds what the official code saves: an index buffer beside every table, ``backbone.`` in a segmentor."""
    if is_segmentor(weights):
        weights = {name if name.startswith(HEADS) else f"backbone.{name}": t for name, t in weights.items()}
    return dict(with_index(weights, position_index))


def with_index(weights: Weights, position_index: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights, each table followed by a copy of the index."""
    for name, tensor in weights.items():
        yield name, tensor
        if position_index is not None and name.endswith(TABLE):
            yield name.removesuffix(TABLE) + INDEX, position_index.clone()


def _file(model: WholeModel) -> Content:
    translated = from_official(model.weights, model.position_index)
    if not model.heads:
        return {"model": translated}
    # mmsegmentation 0.x reads both entries of `meta` even if they are not known.
    return {"state_dict": translated, "meta": {"CLASSES": model.labels, "PALETTE": model.metadata.get("palette")}}


UNILM = Dialect(
    matches=lambda names: any(name.startswith("blocks.0.attn.qkv.") for name in names),
    to_official=to_official,
    from_official=from_official,
    file=_file,
    segmentors=True,
)
