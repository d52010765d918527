"""Segmentors: a BEiT backbone tapped at a few blocks, the levels made of the taps, a head, an auxiliary head.

State-dict names are mmsegmentation's: ``backbone.*``, ``decode_head.*``, ``auxiliary_head.*``.

segmentor = segmentor_from(*read_weights("beit_base_patch16_640_pt22k_ft22ktoade20k.pth"))
logits = at_size(segmentor, (512, 768)).segment(images)
"""

import copy
import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from timm.layers import trunc_normal_
from torch import Tensor, nn

from beit.checkpoints.formats.segmentation import POOL_SCALES, taps_of
from beit.checkpoints.load import KeyReport, load_weights
from beit.checkpoints.read import Metadata, architecture_of
from beit.errors import InputError
from beit.modeling import Backbone, Size
from semantic_segmentation.heads import FCNHead, Head, SETRUPHead, UPerHead, resize

logger = logging.getLogger(f"beit.{__name__}")

HEAD_NAMES = {"decode_head.psp_modules.": "uper", "decode_head.up_convs.": "setr_pup"}
CACHED_SIZES = 4  # the index of a large image alone is 100 MB
_SHOWN = 3


class BeitPyramid(Backbone):
    """The backbone of a segmentor: raw outputs of some blocks, without any norm, as levels from fine to coarse.

    Args:
        out_indices: The blocks that are tapped, from 0. Blocks after the last of them do not run and do not learn.
        multi_scale: Make four levels of strides 4, 8, 16 and 32 of four taps; False: all taps keep the patch's stride.
        **backbone: Keywords of :class:`beit.modeling.Backbone`.

    Raises:
        InputError: Taps that there are not, or a patch size without a pyramid.

    Source: BEiT (arXiv 2106.08254), section 3.2; the official code's patch 16 and patch 8 pyramids.
    """

    def __init__(self, *, out_indices: Sequence[int], multi_scale: bool = True, **backbone: Any) -> None:
        super().__init__(**backbone)
        self.out_indices = tuple(out_indices)
        self.multi_scale = multi_scale
        _check_taps(self.out_indices, self.get_num_layers(), multi_scale)
        for block in islice(self.blocks, self.out_indices[-1] + 1, None):
            block.requires_grad_(False)
        if multi_scale:
            self.fpn1, self.fpn2, self.fpn3, self.fpn4 = _pyramid(self.patch_embed.patch_size, self.embed_dim)
        self.init_weights()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Turns images ``(B, 3, H, W)`` into levels ``(B, D, h, w)``.

        Raises:
            InputError: The images do not have the model's size, or are too small for the coarsest level.
        """
        height = self.patch_embed.grid_size[0]
        _, outputs = self.forward_blocks(self.embed(images), stop=self.out_indices[-1] + 1, keep=self.out_indices)
        taps = [rearrange(out[:, 1:], "b (h w) d -> b d h w", h=height) for out in outputs]
        if not self.multi_scale:
            return taps
        if min(self.img_size) < 32:
            raise InputError(
                f"images of {self.img_size[0]} x {self.img_size[1]} pixels are smaller than the 32 x 32 of the "
                "pyramid's coarsest level: enlarge or pad them"
            )
        return [level(tap) for level, tap in zip((self.fpn1, self.fpn2, self.fpn3, self.fpn4), taps, strict=True)]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws every parameter anew; the convolutions keep torch's own distribution, as official."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
                module.reset_parameters()

    def draw_(self, parameter: Tensor) -> None:
        """Draws from N(0, 0.02²) truncated at ±2, 100 standard deviations: in effect not truncated, as official."""
        trunc_normal_(parameter, std=0.02, a=-2.0, b=2.0)


def _check_taps(out_indices: tuple[int, ...], depth: int, multi_scale: bool) -> None:
    if not out_indices or list(out_indices) != sorted({*out_indices} & {*range(depth)}):
        raise InputError(
            f"out_indices={out_indices}: the model has {depth} blocks, numbered from 0; give those to tap, ascending"
        )
    if multi_scale and len(out_indices) != 4:
        raise InputError(f"out_indices={out_indices}: the pyramid has four levels, give four blocks")


def _pyramid(patch_size: tuple[int, int], dim: int) -> tuple[nn.Module, ...]:
    """Returns what brings taps at the patch's stride to strides 4, 8, 16 and 32."""

    def double() -> nn.Module:
        return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)

    if patch_size == (16, 16):
        fourfold = nn.Sequential(double(), nn.BatchNorm2d(dim), nn.GELU(), double())
        return fourfold, nn.Sequential(double()), nn.Identity(), nn.MaxPool2d(2)
    if patch_size == (8, 8):
        return nn.Sequential(double()), nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4)
    raise InputError(
        f"there is no pyramid for patches of {patch_size[0]} x {patch_size[1]} pixels: use patch_size 16 or 8"
    )


class Segmentor(nn.Module):
    """A backbone, the head that decides, and an auxiliary head that helps while training.

    Args:
        backbone: What makes levels of images.
        decode_head: What makes logits of the levels.
        auxiliary_head: Another such head, used in training mode only.

    Attributes:
        metadata: What a checkpoint records besides the weights; see :mod:`beit.checkpoints.read`.
    """

    def __init__(self, backbone: BeitPyramid, decode_head: Head, auxiliary_head: Head | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        self.metadata: Mapping[str, Any] = {}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the logits of both heads for images ``(B, 3, H, W)``.

        Returns:
            ``(B, K, h, w)`` in the size of the head's finest level, and those of the auxiliary head in its own; None
            without one and in evaluation mode.
        """
        levels = self.backbone(images)
        if self.auxiliary_head is None or not self.training:
            return self.decode_head(levels), None
        return self.decode_head(levels), self.auxiliary_head(levels)

    def segment(self, images: Tensor) -> Tensor:
        """Returns logits ``(B, K, H, W)`` for the pixels of images ``(B, 3, H, W)``, in float32 at least."""
        logits = self.decode_head(self.backbone(images))
        # With the digits of bfloat16, neighbouring pixels and competing classes would tie.
        return resize(logits.to(torch.promote_types(logits.dtype, torch.float32)), images.shape[2:])

    @property
    def num_classes(self) -> int:
        """``K``, the number of classes."""
        return self.decode_head.num_classes

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.backbone.img_size

    def set_input_size(self, img_size: Size) -> None:
        """Takes images of another size from now on; see :meth:`beit.modeling.Backbone.set_input_size`."""
        self.backbone.set_input_size(img_size)

    def get_num_layers(self) -> int:
        """Returns the number of blocks."""
        return self.backbone.get_num_layers()

    def layer_id(self, parameter_name: str) -> int:
        """Returns a parameter's depth: 0 for tokens and patches, i + 1 for block i, the last for all the others."""
        part, _, name = parameter_name.partition(".")
        return self.backbone.layer_id(name) if part == "backbone" else self.get_num_layers() + 1

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: runs each block again in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)


def build_segmentor(
    *,
    out_indices: Sequence[int],
    num_classes: int,
    decode_head: str = "uper",
    channels: int = 768,
    pool_scales: Sequence[int] = POOL_SCALES,
    dropout: float = 0.1,
    auxiliary_channels: int = 256,
    auxiliary_index: int = 2,
    **backbone: Any,
) -> Segmentor:
    """Builds a segmentor with fresh weights.

    Args:
        out_indices: The blocks that are tapped, from 0.
        num_classes: ``K``.
        decode_head: ``"uper"``, or ``"setr_pup"``, which reads the last tap only and doubles it up to the image's size.
        channels: Channels of the head's convolutions.
        pool_scales: Grids that UPerNet pools to.
        dropout: Of the channels that enter a classifier.
        auxiliary_channels: Channels of the auxiliary head; 0 for none.
        auxiliary_index: Which level the auxiliary head reads, from 0.
        **backbone: Keywords of :class:`beit.modeling.Backbone`: ``img_size``, ``patch_size``, ``embed_dim``, …

    Raises:
        InputError: An unknown head, or sizes that do not fit each other.
    """
    if decode_head not in HEAD_NAMES.values():
        raise InputError(f"unknown decode_head {decode_head!r}: choose {' or '.join(HEAD_NAMES.values())}")
    pyramid = BeitPyramid(out_indices=out_indices, multi_scale=decode_head == "uper", **backbone)
    common: dict[str, Any] = {"in_channels": pyramid.embed_dim, "num_classes": num_classes, "dropout": dropout}
    head: Head
    if decode_head == "uper":
        head = UPerHead(channels=channels, pool_scales=pool_scales, **common)
    else:
        head = SETRUPHead(channels=channels, num_convs=_doublings(pyramid.patch_embed.patch_size), **common)
    if not auxiliary_channels:
        return Segmentor(pyramid, head)
    if not 0 <= auxiliary_index < len(pyramid.out_indices):
        raise InputError(f"auxiliary_index={auxiliary_index}: there are {len(pyramid.out_indices)} taps, from 0")
    return Segmentor(pyramid, head, FCNHead(channels=auxiliary_channels, index=auxiliary_index, **common))


def _doublings(patch_size: tuple[int, int]) -> int:
    """Returns how many doublings make an image of a patch grid."""
    height, width = patch_size
    if height != width or height & (height - 1):
        raise InputError(f"SETR-PUP doubles sizes: patches of {height} x {width} pixels must be squares of 8, 16 or 32")
    return height.bit_length() - 1


_SIZED: "WeakKeyDictionary[Segmentor, OrderedDict[Any, Segmentor]]" = WeakKeyDictionary()


def at_size(segmentor: Segmentor, img_size: tuple[int, int]) -> Segmentor:
    """Returns a segmentor's twin for images of another size, for evaluation only.

    The twin shares every tensor but the bias tables and the position embedding, which are resized. The last few twins
    of a segmentor are kept as long as it lives, until one of those tensors changes; through ``.data`` that goes unseen.

    Args:
        segmentor: The segmentor, which stays as it is.
        img_size: Height and width of the images, in pixels.

    Returns:
        The twin in evaluation mode, or the segmentor itself where it has that size already.

    Raises:
        InputError: The size is not a multiple of the patch size.
    """
    if tuple(img_size) == segmentor.img_size:
        return segmentor
    twins = _SIZED.setdefault(segmentor, OrderedDict())
    key = (*img_size, *_fingerprint(segmentor))
    if key not in twins:
        for stale in [other for other in twins if other[2:] != key[2:]]:
            del twins[stale]
        shared = [*segmentor.parameters(), *segmentor.buffers()]
        twin = copy.deepcopy(segmentor, {id(tensor): tensor for tensor in shared})
        twin.set_input_size(img_size)
        twins[key] = twin.eval()
    twins.move_to_end(key)
    if len(twins) > CACHED_SIZES:
        twins.popitem(last=False)
    return twins[key]


def _fingerprint(segmentor: Segmentor) -> tuple[int, ...]:
    """Returns numbers that change when what a twin copied changes, or when shared tensors move to another place."""
    copied = [p for name, p in segmentor.named_parameters() if name.endswith(("bias_table", "pos_embed"))]
    places = (tensor.data_ptr() for tensor in (*segmentor.parameters(), *segmentor.buffers()))
    # What was made in inference mode counts no changes.
    return *(0 if tensor.is_inference() else tensor._version for tensor in copied), *places


def segmentor_from(weights: Mapping[str, Tensor], metadata: Metadata) -> Segmentor:
    """Builds the segmentor that a checkpoint is of, and loads it.

    Args:
        weights: From :func:`beit.checkpoints.read.read_weights`: names without ``backbone.``, and those of the heads.
        metadata: What is known of them. ``out_indices``, ``pool_scales`` and ``auxiliary_index``, which no shape tells,
            are those of the published models where it does not say.

    Returns:
        The segmentor, in evaluation mode.

    Raises:
        InputError: They are not those of a segmentor.
    """
    source = str(metadata.get("source", "the checkpoint"))
    known = signature(Backbone).parameters
    _head_kind(weights, source)
    arguments = {key: v for key, v in architecture_of(weights, metadata).arguments.items() if key in known}
    if "layer_norm_eps" in metadata:
        arguments["norm_layer"] = partial(nn.LayerNorm, eps=metadata["layer_norm_eps"])
    heads = _head_arguments(weights, metadata, source)
    segmentor = build_segmentor(out_indices=taps_of(weights, metadata), **heads, **arguments)
    load_segmentor(segmentor, weights, metadata, source)
    return segmentor.eval()


def _head_arguments(weights: Mapping[str, Tensor], metadata: Metadata, source: str) -> dict[str, Any]:
    """Reads the keywords of :func:`build_segmentor` about heads off their shapes."""
    kind = _head_kind(weights, source)
    outputs, channels = _classifier(weights, source).shape[:2]
    auxiliary = weights.get("auxiliary_head.convs.0.conv.weight")
    scales = metadata.get("pool_scales", POOL_SCALES)
    pools = {name.split(".")[2] for name in weights if name.startswith("decode_head.psp_modules.")}
    if kind == "uper" and len(pools) != len(scales):
        raise InputError(f"{source} pools to {len(pools)} grids and does not say to which: only {scales} is known")
    return {
        "num_classes": outputs,
        "decode_head": kind,
        "channels": channels,
        "pool_scales": scales,
        "auxiliary_channels": 0 if auxiliary is None else len(auxiliary),
        "auxiliary_index": metadata.get("auxiliary_index", 2),
    }


def _head_kind(weights: Mapping[str, Tensor], source: str) -> str:
    if not any(name.startswith("decode_head.") for name in weights):
        raise InputError(
            f"{source} is a backbone (a pre-training or classification checkpoint), not a segmentor: it has no "
            "decode_head; train a segmentor from it first, with tools/train.py and pretrained="
        )
    for prefix, kind in HEAD_NAMES.items():
        if any(name.startswith(prefix) for name in weights):
            return kind
    raise InputError(f"{source} has a decode_head that is neither UPerNet nor SETR-PUP: there are no others here")


def _classifier(weights: Mapping[str, Tensor], source: str) -> Tensor:
    if "decode_head.conv_seg.weight" not in weights:
        raise InputError(f"{source} is not a whole segmentor: it lacks decode_head.conv_seg.weight")
    return weights["decode_head.conv_seg.weight"]


def load_segmentor(
    segmentor: Segmentor, weights: Mapping[str, Tensor], metadata: Metadata, source: str = "the checkpoint"
) -> KeyReport:
    """Loads a segmentor's weights into another of the same sizes; bias tables and positions are resized to its images.

    ``segmentor.metadata`` becomes what the checkpoint records. A checkpoint without auxiliary head will do.

    Args:
        segmentor: What to load into.
        weights: From :func:`beit.checkpoints.read.read_weights`.
        metadata: What is known of them.
        source: What to call the checkpoint.

    Returns:
        What became of every tensor; it is logged too.

    Raises:
        InputError: They are not those of a segmentor, or of another one.
    """
    own = segmentor.state_dict()
    given = {name: tensor for name, tensor in weights.items() if _is_head(name)}
    _check_task(given, own, source, segmentor.num_classes)
    _check_build(segmentor, weights, metadata, source)
    backbone = {name: tensor for name, tensor in weights.items() if name not in given}
    report = load_weights(segmentor.backbone, backbone, {**metadata, "source": source})
    _check_head_sizes(given, own, source)
    heads = {name: tensor for name, tensor in given.items() if name in own}
    segmentor.load_state_dict(heads, strict=False)
    segmentor.metadata = dict(metadata)

    report = _with_heads(report, given, heads, own)
    needed = [name for name in report.missing if not _may_lack(name, given)]
    if needed:
        raise InputError(f"{source} is not a whole segmentor of this kind: it lacks {_listed(needed)}")
    (logger.warning if report.unexpected else logger.info)("%s", report.summary())
    return report


def _is_head(name: str) -> bool:
    return name.startswith(("decode_head.", "auxiliary_head."))


def _may_lack(name: str, given: Mapping[str, Tensor]) -> bool:
    """Tells what nobody misses: counters, which old files do not have, and a whole auxiliary head."""
    no_auxiliary_head = not any(other.startswith("auxiliary_head.") for other in given)
    return name.endswith("num_batches_tracked") or (no_auxiliary_head and name.startswith("auxiliary_head."))


def _check_task(given: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str, num_classes: int) -> None:
    kind, wanted = _head_kind(given, source), _head_kind(own, "the segmentor")
    if kind != wanted:
        raise InputError(f"{source} has the head {kind} and the segmentor {wanted}: give decode_head={kind}")
    if (outputs := len(_classifier(given, source))) != num_classes:
        raise InputError(
            f"{source} knows {outputs} classes and the segmentor is built for {num_classes}: give the classes it was "
            "trained with, or train from its backbone (pretrained=)"
        )


def _check_build(segmentor: Segmentor, weights: Mapping[str, Tensor], metadata: Metadata, source: str) -> None:
    """Compares what no shape tells: weights that learnt at other blocks or grids would load, and segment badly.

    The number of the backbone's heads is compared where its weights are loaded.
    """
    built: dict[str, tuple[Any, str]] = {
        "out_indices": (segmentor.backbone.out_indices, "--out_indices {}, or the config.yaml of its run")
    }
    if isinstance(segmentor.decode_head, UPerHead):
        built["pool_scales"] = segmentor.decode_head.pool_scales, "pool_scales={} to build_segmentor"
    if isinstance(segmentor.auxiliary_head, FCNHead) and any(name.startswith("auxiliary_head.") for name in weights):
        built["auxiliary_index"] = segmentor.auxiliary_head.index, "--auxiliary_index {}"
    for name, (own, remedy) in built.items():
        has, wants = _in_words(metadata.get(name, own)), _in_words(own)
        if has != wants:
            raise InputError(f"{source} has {name} {has}, and the segmentor {wants}: give {remedy.format(has)}")


def _in_words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _check_head_sizes(given: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    odd = [name for name, tensor in given.items() if name in own and tensor.shape != own[name].shape]
    if odd:
        sizes = f"{tuple(given[odd[0]].shape)} in the file, {tuple(own[odd[0]].shape)} in the segmentor"
        raise InputError(f"{source} has other head sizes: {len(odd)} tensors differ, such as {odd[0]} ({sizes})")


def _with_heads(
    report: KeyReport, given: Mapping[str, Tensor], heads: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> KeyReport:
    """Returns the backbone's report with its names as the segmentor has them, and the heads beside."""

    def full(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"backbone.{name}" for name in names)

    extra = [name for name in given if name not in own]
    unwanted = {n: "the segmentor has no auxiliary head" for n in extra if n.startswith("auxiliary_head.")}
    if any(name.startswith("auxiliary_head.") for name in own):
        unwanted = {}
    return dataclasses.replace(
        report,
        loaded=(*full(report.loaded), *heads),
        resized={f"backbone.{name}": note for name, note in report.resized.items()},
        dropped=report.dropped | unwanted,
        missing=(*full(report.missing), *(name for name in own if _is_head(name) and name not in heads)),
        unexpected=(*report.unexpected, *(name for name in extra if name not in unwanted)),
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
