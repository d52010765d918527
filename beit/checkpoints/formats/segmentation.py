"""Segmentors: a backbone, a pyramid (``fpn1``, ``fpn2``), a decode head and perhaps an auxiliary one.

In official files the pyramid is part of the backbone and the heads stand beside it, under mmsegmentation's names. Here
they are read off names and shapes, since the models themselves live in an application of this library.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

DECODE, AUXILIARY = "decode_head.", "auxiliary_head."
HEADS = (DECODE, AUXILIARY)
PYRAMID = ("fpn1.", "fpn2.")
PARTS = (*PYRAMID, *HEADS)
LEVELS = 4
POOL_SCALES = (1, 2, 3, 6)  # of UPerNet, unless recorded otherwise
PUBLISHED_TAPS = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}  # by depth
ADE20K_CLASSES = 150

Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Heads:
    """The heads of a segmentor.

    Args:
        kind: The decode head: ``uper`` (UPerNet), ``setr_pup``, or empty for an unknown one.
        num_classes: Number of classes.
        channels: Width of the decode head.
        stages: Scales that UPerNet pools at, or convolutions of SETR-PUP.
        auxiliary_channels: Width of the auxiliary head; 0 without one.
        auxiliary_convs: Its convolutions; 0 if the head is unknown.
        auxiliary_concat: Its input is concatenated with the output of its convolutions.
    """

    kind: str
    num_classes: int
    channels: int
    stages: int
    auxiliary_channels: int
    auxiliary_convs: int
    auxiliary_concat: bool


def is_segmentor(names: Iterable[str]) -> bool:
    """Returns whether these are the parameters of a segmentor."""
    return any(name.startswith(DECODE) for name in names)


def depth_of(names: Iterable[str]) -> int:
    """Returns the number of blocks."""
    return 1 + max(int(name.split(".")[1]) for name in names if name.startswith("blocks."))


def heads_of(weights: Mapping[str, Tensor]) -> Heads:
    """Reads the heads off weights in official names; sizes of missing tensors are 0."""
    kinds = {"uper": f"{DECODE}psp_modules", "setr_pup": f"{DECODE}up_convs"}
    kind = next((kind for kind, module in kinds.items() if _count(weights, module)), "")
    classes, channels = _outputs_and_inputs(weights, f"{DECODE}conv_seg.weight")
    has_auxiliary = any(name.startswith(AUXILIARY) for name in weights)
    return Heads(
        kind=kind,
        num_classes=classes,
        channels=channels,
        stages=_count(weights, kinds[kind]) if kind else 0,
        auxiliary_channels=(_outputs_and_inputs(weights, f"{AUXILIARY}conv_seg.weight")[1] or 1) * has_auxiliary,
        auxiliary_convs=_count(weights, f"{AUXILIARY}convs"),
        auxiliary_concat=f"{AUXILIARY}conv_cat.conv.weight" in weights,
    )


def taps_of(weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the blocks a segmentor taps, from 0: as recorded, or as published, or the last of each quarter.

    Args:
        weights: Of a segmentor, in official names.
        metadata: From :func:`beit.checkpoints.read.read_weights`.
    """
    if recorded := metadata.get("out_indices"):
        return tuple(recorded)
    depth = depth_of(weights)
    taps = PUBLISHED_TAPS.get(depth, tuple(depth * quarter // 4 - 1 for quarter in range(1, 5)))
    logger.info("%s does not record which blocks it taps: using %s", metadata.get("source"), ", ".join(map(str, taps)))
    return taps


def leaves_zero_out(metadata: Mapping[str, Any], num_classes: int) -> bool:
    """Returns whether 0 is no class in the label maps a segmentor was trained on, so that its first class is 1 there.

    That is how ADE20K is labelled; if nothing is recorded, a model with as many classes is assumed to be for ADE20K.

    Args:
        metadata: From :func:`beit.checkpoints.read.read_weights`.
        num_classes: Classes of the segmentor.
    """
    recorded = metadata.get("reduce_zero_label")
    return recorded if isinstance(recorded, bool) else num_classes == ADE20K_CLASSES


def _count(weights: Mapping[str, Tensor], module: str) -> int:
    """Returns the number of numbered modules below one."""
    pattern = re.compile(rf"{re.escape(module)}\.(\d+)\.")
    return max((1 + int(match[1]) for name in weights if (match := pattern.match(name))), default=0)


def _outputs_and_inputs(weights: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    shape = weights[name].shape if name in weights else ()
    return (shape[0], shape[1]) if len(shape) >= 2 else (0, 0)


def incomplete(weights: Mapping[str, Tensor], embed_dim: int, patch_size: int) -> list[str]:
    """Returns the tensors of pyramid and heads that are missing or do not have the shape their neighbours ask for.

    Unknown heads are accepted as they are.

    Args:
        weights: In official names.
        embed_dim: Width of the backbone.
        patch_size: Of the backbone, in pixels.
    """
    heads = heads_of(weights)
    needed = dict(_decode_head(heads, embed_dim)) | dict(_auxiliary_head(heads, embed_dim))
    if heads.kind == "uper" or any(name.startswith(PYRAMID) for name in weights):
        needed |= dict(_pyramid(embed_dim, patch_size))
    return [name for name, shape in needed.items() if name not in weights or weights[name].shape != shape]


def _norm(name: str, channels: int) -> Shapes:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (channels,)


def _conv_module(name: str, outputs: int, inputs: int, size: int) -> Shapes:
    yield f"{name}.conv.weight", (outputs, inputs, size, size)
    yield from _norm(f"{name}.bn", outputs)


def _biased(name: str, channels: int, *shape: int) -> Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", (channels,)


def _pyramid(width: int, patch_size: int) -> Shapes:
    """With patches of 8 pixels, one upsampling gives the finest level and the second level needs none."""
    yield from _biased("fpn1.0", width, width, width, 2, 2)
    if patch_size != 8:
        yield from _norm("fpn1.1", width)
        yield from _biased("fpn1.3", width, width, width, 2, 2)
        yield from _biased("fpn2.0", width, width, width, 2, 2)


def _decode_head(heads: Heads, width: int) -> Shapes:
    channels = heads.channels
    yield from _biased(f"{DECODE}conv_seg", heads.num_classes, heads.num_classes, channels, 1, 1)
    if heads.kind == "uper":
        for level in range(heads.stages):
            yield from _conv_module(f"{DECODE}psp_modules.{level}.1", channels, width, 1)
        yield from _conv_module(f"{DECODE}bottleneck", channels, width + heads.stages * channels, 3)
        for level in range(LEVELS - 1):
            yield from _conv_module(f"{DECODE}lateral_convs.{level}", channels, width, 1)
            yield from _conv_module(f"{DECODE}fpn_convs.{level}", channels, channels, 3)
        yield from _conv_module(f"{DECODE}fpn_bottleneck", channels, LEVELS * channels, 3)
    elif heads.kind == "setr_pup":
        yield from _biased(f"{DECODE}norm", width, width)
        for stage in range(heads.stages):
            yield from _conv_module(f"{DECODE}up_convs.{stage}.0", channels, channels if stage else width, 3)


def _auxiliary_head(heads: Heads, width: int) -> Shapes:
    if not heads.auxiliary_convs:
        return
    channels = heads.auxiliary_channels
    yield from _biased(f"{AUXILIARY}conv_seg", heads.num_classes, heads.num_classes, channels, 1, 1)
    for stage in range(heads.auxiliary_convs):
        yield from _conv_module(f"{AUXILIARY}convs.{stage}", channels, channels if stage else width, 3)
    if heads.auxiliary_concat:
        yield from _conv_module(f"{AUXILIARY}conv_cat", channels, width + channels, 3)
