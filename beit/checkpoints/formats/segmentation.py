"""Segmentors: a backbone, a pyramid (``fpn1``, ``fpn2``), a decode head and perhaps an auxiliary one.

In official files the pyramid is part of the backbone and the heads stand beside it, under mmsegmentation's names. Here
they are read off names and shapes, since the models themselves live in an application of this library.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Heads:
    """The heads of a segmentor."""

    kind: str  # of the decode head: uper (UPerNet), setr_pup, or empty for an unknown one
    num_classes: int
    channels: int  # of the decode head
    stages: int  # scales that UPerNet pools at, or convolutions of SETR-PUP
    auxiliary_channels: int  # 0 without an auxiliary head
    auxiliary_convs: int  # 0 if the auxiliary head is unknown
    auxiliary_concat: bool  # whether its input is concatenated with the output of its convolutions


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


def taps_of(weights: Mapping[str, Tensor], metadata: Mapping) -> tuple[int, ...]:
    """Returns the blocks a segmentor taps, from 0: as recorded, or as published, or the last of each quarter."""
    if recorded := metadata.get("out_indices"):
        return tuple(recorded)
    depth = depth_of(weights)
    taps = PUBLISHED_TAPS.get(depth, tuple(depth * quarter // 4 - 1 for quarter in range(1, 5)))
    logger.info("%s does not record which blocks it taps: using %s", metadata.get("source"), ", ".join(map(str, taps)))
    return taps


def leaves_zero_out(metadata: Mapping, num_classes: int) -> bool:
    """Returns whether the label maps a segmentor was trained on have no class 0, so that its first class is 1 there.

    That is how ADE20K is labelled; if nothing is recorded, a model with as many classes is assumed to be for ADE20K.
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


def incomplete(weights: Mapping[str, Tensor], patch_size: int) -> list[str]:
    """Returns the missing parameters of pyramid and heads, for patches of ``patch_size`` pixels; unknown heads pass."""
    heads = heads_of(weights)
    biased = [f"{DECODE}conv_seg"]  # modules with weight and bias
    convs: list[str] = []  # convolutions followed by a batch norm
    if heads.kind == "uper":
        convs += [f"{DECODE}psp_modules.{stage}.1" for stage in range(heads.stages)]
        convs += [f"{DECODE}{kind}_convs.{level}" for level in range(LEVELS - 1) for kind in ("lateral", "fpn")]
        convs += [f"{DECODE}bottleneck", f"{DECODE}fpn_bottleneck"]
    elif heads.kind == "setr_pup":
        biased.append(f"{DECODE}norm")
        convs += [f"{DECODE}up_convs.{stage}.0" for stage in range(heads.stages)]
    if heads.auxiliary_convs:
        biased.append(f"{AUXILIARY}conv_seg")
        convs += [f"{AUXILIARY}convs.{stage}" for stage in range(heads.auxiliary_convs)]
        convs += [f"{AUXILIARY}conv_cat"] if heads.auxiliary_concat else []
    norms = [f"{name}.bn" for name in convs]
    if heads.kind == "uper" or any(name.startswith(PYRAMID) for name in weights):
        # With patches of 8 pixels, one upsampling gives the finest level and the second level needs none.
        biased += ["fpn1.0"] if patch_size == 8 else ["fpn1.0", "fpn1.3", "fpn2.0"]
        norms += [] if patch_size == 8 else ["fpn1.1"]
    needed = [f"{name}.{part}" for name in biased for part in ("weight", "bias")]
    needed += [f"{name}.conv.weight" for name in convs]
    needed += [f"{name}.{part}" for name in norms for part in ("weight", "bias", "running_mean", "running_var")]
    return [name for name in needed if name not in weights]
