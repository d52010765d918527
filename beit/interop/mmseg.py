"""OpenMMLab's names (mmsegmentation and mmpretrain since 1.0, which share the backbone's), below ``backbone``."""

from collections.abc import Mapping

import torch
from torch import Tensor

from beit.errors import InputError
from beit.interop.names import NameTable
from beit.interop.unilm import INDEX, TABLE, bare, with_index

PREFIX = "backbone."
SHARED = f"rel_pos_bias.{TABLE}"

_SAME = ("cls_token", "mask_token", "pos_embed", SHARED)
_NAMES = NameTable(
    outside={name: name for name in _SAME}
    | {"patch_embed.proj": "patch_embed.projection", "norm": "ln1", "fc_norm": "ln2"},
    inside={name: name for name in ("attn.qkv", "attn.q_bias", "attn.v_bias", "attn.proj", f"attn.{TABLE}")}
    | {name: name for name in ("gamma_1", "gamma_2")}
    | {"norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"},
    blocks="layers",
)
_HEADS = {"head.": "head.fc.", "lm_head.": "head.cls_head."}


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translates the names of either library; names of other heads stay as they are."""
    weights = {}
    for name, tensor in state_dict.items():
        if name.endswith(INDEX):
            continue
        own = bare(name)
        head = next((ours + own[len(theirs) :] for ours, theirs in _HEADS.items() if own.startswith(theirs)), None)
        weights[head or _NAMES.official(own) or own] = tensor
    return weights


def to_mmpretrain(weights: Mapping[str, Tensor], position_index: Tensor | None = None) -> dict[str, Tensor]:
    """Translates official names to mmpretrain's: the whole model, with the index buffers.

    Args:
        weights: Weights in official names.
        position_index: Rows of the tables, int64 ``(N + 1, N + 1)``; None where there are no tables.
    """
    result = {}
    for name, tensor in weights.items():
        head = next((theirs + name[len(ours) :] for ours, theirs in _HEADS.items() if name.startswith(ours)), None)
        result[head or PREFIX + (_NAMES.theirs(name) or name)] = tensor
    return dict(with_index(result, position_index))


def to_mmsegmentation(weights: Mapping[str, Tensor], position_index: Tensor | None = None) -> dict[str, Tensor]:
    """Translates the backbone to mmsegmentation's names: what its segmentors start from.

    There each block has its own table and its LayerScale: a shared table is copied into every block, and a missing
    LayerScale is written as ones. Heads, mask token and final norms have no place there and are left out.

    Args:
        weights: Weights in official names.
        position_index: Rows of the tables, int64 ``(N + 1, N + 1)``.

    Raises:
        InputError: The model has absolute positions or no tables, which that library cannot compute.
    """
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    backbone = {name: t for name, t in weights.items() if name.startswith(("cls_token", "patch_embed.", "blocks."))}
    for block in range(depth):
        table = f"blocks.{block}.attn.{TABLE}"
        if SHARED in weights:
            backbone[table] = backbone[table] + weights[SHARED] if table in backbone else weights[SHARED].clone()
        if "pos_embed" in weights or table not in backbone:
            raise InputError(
                "mmsegmentation's BEiT has relative position tables and no absolute positions; this model has others"
            )
        for gamma in ("gamma_1", "gamma_2"):
            backbone.setdefault(f"blocks.{block}.{gamma}", torch.ones_like(weights[f"blocks.{block}.norm1.weight"]))
    return to_mmpretrain(backbone, position_index)
