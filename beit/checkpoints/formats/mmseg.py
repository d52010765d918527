"""OpenMMLab's names (mmsegmentation and mmpretrain since 1.0, which share the backbone's), below ``backbone``.

A segmentor's pyramid is a ``neck`` there, whose modules are called by their factor; the heads have the official names.
Files of mmsegmentation 0.x, which the official code writes, are in :mod:`beit.checkpoints.formats.unilm`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from beit.checkpoints.formats.names import NameTable
from beit.checkpoints.formats.segmentation import HEADS, PYRAMID, is_segmentor
from beit.checkpoints.formats.unilm import INDEX, TABLE, bare, with_index
from beit.errors import InputError

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
# The neck's upsampling modules; with patches of 8 pixels the finest level needs but one, and the second none.
_NECK = {"fpn1.": "neck.upsample_4x.", "fpn2.": "neck.upsample_2x."}
_NECK_PATCH_8 = {"fpn1.": "neck.upsample_2x."}
_LISTS = re.compile(r"\b(out_indices|pool_scales)\s*=\s*[\[(]([\d\s,]+)[\])]")
_ZERO = re.compile(r"\breduce_zero_label\s*=\s*(True|False)\b")


def _neck(names: Iterable[str], quadruples: str) -> dict[str, str]:
    """Returns what the neck's modules are called: those of patches of 16 pixels if one quadruples the grid."""
    return _NECK if any(name.startswith(quadruples) for name in names) else _NECK_PATCH_8


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translates the names of either library; names of other heads stay as they are."""
    weights = {}
    modules = _HEADS | _neck(map(bare, state_dict), _NECK["fpn1."])
    for name, tensor in state_dict.items():
        if name.endswith(INDEX):
            continue
        own = bare(name)
        head = next((ours + own[len(theirs) :] for ours, theirs in modules.items() if own.startswith(theirs)), None)
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
    """Translates a segmentor to mmsegmentation's names, and of another model the backbone, which segmentors start from.

    There each block has its own table and its LayerScale: a shared table is copied into every block, and a missing
    LayerScale is written as ones. Other heads, mask token and final norms have no place there and are left out.

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
    return to_mmpretrain(backbone, position_index) | _segmentation_parts(weights)


def _segmentation_parts(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translates pyramid and heads; none of another model."""
    if not is_segmentor(weights):
        return {}
    names = _neck(weights, PYRAMID[1]) | {head: head for head in HEADS}
    return {
        theirs + name[len(ours) :]: tensor
        for name, tensor in weights.items()
        for ours, theirs in names.items()
        if name.startswith(ours)
    }


def meta(labels: Any, palette: Any, *, legacy: bool) -> dict[str, Any]:
    """Returns what mmsegmentation keeps beside the weights.

    Args:
        labels: Names of the classes, or None.
        palette: Their colours, or None.
        legacy: For 0.x, which asks for both even if they are not known.
    """
    if legacy:
        return {"CLASSES": labels, "PALETTE": palette}
    return {"dataset_meta": {"classes": labels, "palette": palette}} if labels else {}


def read_meta(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what ``meta`` of a checkpoint of either version says: names, colours, taps, scales, label maps.

    Values are as they stand there; all but the first two are read off the text of the config, from their first mention:
    the backbone comes first in it.
    """
    recorded = content.get("meta")
    if not isinstance(recorded, Mapping):
        return {}
    known = recorded.get("dataset_meta")
    places = [place for place in (known, recorded) if isinstance(place, Mapping)]
    found: dict[str, Any] = {}
    for key, ours in (("classes", "labels"), ("palette", "palette")):
        values = [place[name] for place in places for name in (key, key.upper()) if place.get(name)]
        found |= {ours: values[0]} if values else {}
    for text in (recorded.get(key) for key in ("config", "cfg")):
        if isinstance(text, str):
            lists = {match[1]: match[2] for match in reversed(list(_LISTS.finditer(text)))}
            found |= {name: tuple(map(int, re.findall(r"\d+", numbers))) for name, numbers in lists.items()}
            if match := _ZERO.search(text):
                found["reduce_zero_label"] = match[1] == "True"
    return found
