"""The official names, which are ours and timm's; files differ in wrappers' prefixes and in derived buffers.

A segmentor's file is that of mmsegmentation 0.x: everything but the heads is below ``backbone``, including the pyramid.
"""

import logging
import re
from collections.abc import Iterator

from torch import Tensor

from beit.checkpoints.formats.dialect import Content, Dialect, Weights, WholeModel
from beit.checkpoints.formats.segmentation import HEADS, is_segmentor
from beit.errors import InputError

logger = logging.getLogger(__name__)

INDEX = "relative_position_index"
TABLE = "relative_position_bias_table"
SHARED_TABLE = f"rel_pos_bias.{TABLE}"

# What wrappers put before every name: DistributedDataParallel, torch.compile, a segmentor, a detector, Lightning.
WRAPPERS = ("module.", "_orig_mod.", "backbone.", "bottom_up.", "model.")


# What wrappers of parts put inside names: regional torch.compile, activation checkpointing, FSDP.
_INSIDE = re.compile(r"(?<![^.])(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_FIRST_BLOCK = re.compile(r"((?:.*?\.)?)(?:blocks|layers|(?:beit\.)?encoder\.layer)\.0\.(?:attn|attention)\.")
_OTHER_BLOCKS = (*HEADS, "roi_heads.")


def bare(name: str) -> str:
    """Returns a name without what wrappers add."""
    name = _INSIDE.sub("", name)
    while prefix := next((prefix for prefix in WRAPPERS if name.startswith(prefix)), ""):
        name = name[len(prefix) :]
    return name


def one_model(state_dict: Weights, source: str) -> dict[str, Tensor]:
    """Returns the tensors under names without what wrappers add, nor any other prefix of the one model they are of.

    Raises :class:`InputError` if they are of several models, such as a student and its teacher.
    """
    unwrapped = {name: _INSIDE.sub("", name) for name in state_dict if not name.startswith(_OTHER_BLOCKS)}
    prefixes = {match[1] for name in unwrapped.values() if (match := _FIRST_BLOCK.match(name))}
    (prefix,) = map(bare, prefixes) if len(prefixes) == 1 else ("",)
    if prefix:
        logger.info("%s: taking the weights below %s", source, prefix)
    names: dict[str, str] = {}
    for name in state_dict:
        first = names.setdefault(bare(name).removeprefix(prefix), name)
        if len(prefixes) > 1 or first != name:
            found = " and ".join(map(repr, sorted(prefixes))) if len(prefixes) > 1 else f"{first} and {name}"
            what = f"{source} has the weights of several models, below {found}"
            raise InputError(f"{what}: choose one with prefix= (--model_prefix), what its names have before `blocks`")
    return {own: state_dict[name] for own, name in names.items()}


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
