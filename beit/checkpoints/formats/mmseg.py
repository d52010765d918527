"""OpenMMLab's names (mmsegmentation and mmpretrain since 1.0, which share the backbone's), below ``backbone``.

A segmentor's pyramid is a ``neck`` there, whose modules are named by their factor; the heads have the official names.
Files of mmsegmentation 0.x, which the official code writes, are in :mod:`beit.checkpoints.formats.unilm`.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from beit.checkpoints.formats.dialect import Content, Dialect, Names, NameTable, Weights, WholeModel, replace_prefix
from beit.checkpoints.formats.recorded import readable
from beit.checkpoints.formats.segmentation import HEADS, PYRAMID, depth_of, is_segmentor
from beit.checkpoints.formats.unilm import INDEX, SHARED_TABLE, TABLE, bare, with_index
from beit.errors import InputError

PREFIX = "backbone."

_SAME = ("cls_token", "mask_token", "pos_embed", SHARED_TABLE)
_SAME_IN_BLOCKS = ("attn.qkv", "attn.q_bias", "attn.v_bias", "attn.proj", f"attn.{TABLE}", "gamma_1", "gamma_2")
_NAMES = NameTable(
    outside={name: name for name in _SAME}
    | {"patch_embed.proj": "patch_embed.projection", "norm": "ln1", "fc_norm": "ln2"},
    inside={name: name for name in _SAME_IN_BLOCKS}
    | {"norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"},
    blocks="layers",
    heads={"head.": "head.fc.", "lm_head.": "head.cls_head."},
)
# The neck's upsampling modules; for patches of 8 pixels the finest level needs only one, and the second none.
_NECK = {"fpn1.": "neck.upsample_4x.", "fpn2.": "neck.upsample_2x."}
_NECK_PATCH_8 = {"fpn1.": "neck.upsample_2x."}
_LISTS = re.compile(r"\b(out_indices|pool_scales)\s*=\s*[\[(]([\d\s,]+)[\])]")
_IMAGES = re.compile(r"\b(mean|std)\s*=\s*[\[(]([\d\s.,]+)[\])]")
_ZERO = re.compile(r"\breduce_zero_label\s*=\s*(True|False)\b")


def _neck(names: Iterable[str], quadruples: str) -> dict[str, str]:
    """Returns the names of the neck's modules: those for patches of 16 pixels if one of them upsamples by four."""
    return _NECK if any(name.startswith(quadruples) for name in names) else _NECK_PATCH_8


def to_official(state_dict: Weights) -> dict[str, Tensor]:
    """Translates the names of either library; names of other heads stay as they are."""
    neck = {theirs: ours for ours, theirs in _neck(map(bare, state_dict), _NECK["fpn1."]).items()}
    bared = {bare(name): tensor for name, tensor in state_dict.items() if not name.endswith(INDEX)}
    return {replace_prefix(name, neck) or _NAMES.official(name): tensor for name, tensor in bared.items()}


def to_mmpretrain(weights: Weights, position_index: Tensor | None = None) -> dict[str, Tensor]:
    """Translates the whole model to mmpretrain's names, with the index buffers."""
    renamed = {
        replace_prefix(name, _NAMES.heads) or PREFIX + (_NAMES.theirs(name) or name): tensor
        for name, tensor in weights.items()
    }
    return dict(with_index(renamed, position_index))


def to_mmsegmentation(weights: Weights, position_index: Tensor | None = None) -> dict[str, Tensor]:
    """Translates a segmentor to mmsegmentation's names; of another model only the backbone, to start a segmentor from.

    There each block has its own table and LayerScale: a shared table is copied into every block, and a missing
    LayerScale is written as ones. Other heads, the mask token and final norms are left out. Raises
    :class:`InputError` for a model with absolute positions or without tables, which the library does not support.
    """
    backbone = {name: t for name, t in weights.items() if name.startswith(("cls_token", "patch_embed.", "blocks."))}
    for block in range(depth_of(weights)):
        table = f"blocks.{block}.attn.{TABLE}"
        if SHARED_TABLE in weights:
            shared = weights[SHARED_TABLE]
            backbone[table] = backbone[table] + shared if table in backbone else shared.clone()
        if "pos_embed" in weights or table not in backbone:
            raise InputError("mmsegmentation's BEiT has relative position tables and no absolute positions; not this")
        for gamma in ("gamma_1", "gamma_2"):
            backbone.setdefault(f"blocks.{block}.{gamma}", torch.ones_like(weights[f"blocks.{block}.norm1.weight"]))
    parts: dict[str, Tensor] = {}
    if is_segmentor(weights):
        prefixes = _neck(weights, PYRAMID[1]) | {head: head for head in HEADS}
        parts = {new: tensor for name, tensor in weights.items() if (new := replace_prefix(name, prefixes))}
    return to_mmpretrain(backbone, position_index) | parts


def _mmsegmentation_file(model: WholeModel) -> Content:
    content: Content = {"state_dict": to_mmsegmentation(model.weights, model.position_index)}
    if model.heads:
        described = {"classes": model.labels, "palette": model.metadata.get("palette")}
        content["meta"] = {"dataset_meta": described} if model.labels else {}
    return content


def read_meta(content: Mapping) -> Content:
    """Returns what ``meta`` records in a file of any version: classes, colours, taps, scales, label maps, mean, std.

    All but the first two are parsed from the text of the config; the first mention counts, since the backbone comes
    first.
    """
    recorded = content.get("meta")
    if not isinstance(recorded, Mapping):
        return {}
    places = [place for place in (recorded.get("dataset_meta"), recorded) if isinstance(place, Mapping)]
    found: Content = {}
    for key, ours in (("classes", "labels"), ("palette", "palette")):
        values = [place[name] for place in places for name in (key, key.upper()) if place.get(name) is not None]
        found |= {ours: values[0]} if values else {}
    for text in (recorded.get(key) for key in ("config", "cfg")):
        if isinstance(text, str):
            lists = {match[1]: match[2] for match in reversed(list(_LISTS.finditer(text)))}
            found |= {name: tuple(map(int, re.findall(r"\d+", numbers))) for name, numbers in lists.items()}
            for name, numbers in reversed(_IMAGES.findall(text)):
                found[name] = [float(number) / 255 for number in re.findall(r"\d+\.?\d*", numbers)]
            if match := _ZERO.search(text):
                found["reduce_zero_label"] = match[1] == "True"
    return readable(found, "meta", labels="classes")


def _is_openmmlab(names: Names) -> bool:
    return any(name.startswith("layers.0.") and ".ln1." in name for name in names)


MMSEGMENTATION = Dialect(
    matches=lambda names: _is_openmmlab(names) and is_segmentor(names),
    to_official=to_official,
    from_official=to_mmsegmentation,
    file=_mmsegmentation_file,
    segmentors=True,
)
MMPRETRAIN = Dialect(
    matches=lambda names: _is_openmmlab(names) and not is_segmentor(names),
    to_official=to_official,
    from_official=to_mmpretrain,
    file=lambda model: {"state_dict": to_mmpretrain(model.weights, model.position_index)},
)
