"""Segmentors: a BEiT backbone tapped at some blocks, a pyramid built on the taps, a decode head, an auxiliary head.

State-dict names are mmsegmentation's: ``backbone.*``, ``decode_head.*``, ``auxiliary_head.*``.
"""

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from beit.checkpoints.formats.segmentation import AUXILIARY, HEADS, POOL_SCALES, Heads, heads_of, is_segmentor, taps_of
from beit.checkpoints.load import KeyReport, load_weights
from beit.checkpoints.read import Metadata, architecture_of
from beit.errors import InputError, listed
from beit.modeling import Backbone, Biases, Size
from semantic_segmentation.heads import FCNHead, Head, SETRUPHead, UPerHead, resize

logger = logging.getLogger(f"beit.{__name__}")

DECODE_HEADS = ("uper", "setr_pup")


class BeitPyramid(Backbone):
    """The backbone of a segmentor: raw outputs of some blocks, without a norm, as feature levels from fine to coarse.

    Blocks in ``out_indices``, from 0, are tapped; those after the last tap neither run nor learn. With ``multi_scale``
    four taps become levels of strides 4, 8, 16 and 32, otherwise all have the patch's stride.

    Raises:
        InputError: Blocks that do not exist, or a patch size without a pyramid.

    Source: BEiT (arXiv 2106.08254), section 3.2; the official code's pyramids for patches of 16 and 8 pixels.
    """

    def __init__(self, *, out_indices: Sequence[int], multi_scale: bool = True, **backbone: Any) -> None:
        super().__init__(**backbone)
        self.out_indices = tuple(out_indices)
        self.multi_scale = multi_scale
        depth, taps = self.get_num_layers(), self.out_indices
        if not taps or list(taps) != sorted({*taps} & {*range(depth)}):
            raise InputError(f"out_indices={taps}: the model has {depth} blocks, numbered from 0; list taps, ascending")
        if multi_scale and len(taps) != 4:
            raise InputError(f"out_indices={taps}: the pyramid has four levels, give four blocks")
        for block in islice(self.blocks, self.out_indices[-1] + 1, None):
            block.requires_grad_(False)
        if multi_scale:
            self.fpn1, self.fpn2, self.fpn3, self.fpn4 = _pyramid(self.patch_embed.patch_size, self.embed_dim)
        self.init_weights()

    def forward(self, images: Tensor, biases: Biases | None = None) -> list[Tensor]:
        """Turns images ``(B, 3, H, W)`` into levels ``(B, D, h, w)``; for ``biases`` see :meth:`forward_blocks`.

        Raises:
            InputError: The images do not have the model's size, or are too small for the coarsest level.
        """
        stop = self.out_indices[-1] + 1
        _, outputs = self.forward_blocks(self.embed(images), stop=stop, keep=self.out_indices, biases=biases)
        taps = [self.feature_map(tokens) for tokens in outputs]
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
        """Reinitialises every parameter; convolutions get torch's default, as official."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
                module.reset_parameters()


def _pyramid(patch_size: tuple[int, int], dim: int) -> tuple[nn.Module, ...]:
    """Returns the modules that bring taps at the patch's stride to strides 4, 8, 16 and 32."""

    def double() -> nn.Module:
        return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)

    if patch_size == (16, 16):
        fourfold = nn.Sequential(double(), nn.BatchNorm2d(dim), nn.GELU(), double())
        return fourfold, nn.Sequential(double()), nn.Identity(), nn.MaxPool2d(2)
    if patch_size == (8, 8):
        return nn.Sequential(double()), nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4)
    raise InputError(f"no pyramid for patches of {patch_size[0]} x {patch_size[1]} pixels: use patch_size 16 or 8")


class Segmentor(nn.Module):
    """A backbone, a decode head that turns its feature levels into logits, and another for training mode only.

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
        """Returns both heads' logits ``(B, K, h, w)``, at the size of their finest level, for images ``(B, 3, H, W)``.

        Those of the auxiliary head are None without one and in evaluation mode.
        """
        levels = self.backbone(images)
        if self.auxiliary_head is None or not self.training:
            return self.decode_head(levels), None
        return self.decode_head(levels), self.auxiliary_head(levels)

    def segment(self, images: Tensor, biases: Biases | None = None) -> Tensor:
        """Returns per-pixel logits ``(B, K, H, W)`` for normalised images ``(B, 3, H, W)``, in float32 at least.

        ``biases``, from ``backbone.position_biases()``, save their look-up in many calls without gradients.
        """
        logits = self.decode_head(self.backbone(images, biases))
        # In bfloat16, neighbouring pixels and competing classes would tie.
        return resize(logits.to(torch.promote_types(logits.dtype, torch.float32)), images.shape[2:])

    @property
    def num_classes(self) -> int:
        """``K``, the number of classes."""
        return self.decode_head.num_classes

    @property
    def img_size(self) -> tuple[int, int]:
        """Image height and width, in pixels."""
        return self.backbone.img_size

    def set_input_size(self, img_size: Size) -> None:
        """Switches to images of another size; see :meth:`beit.modeling.Backbone.set_input_size`."""
        self.backbone.set_input_size(img_size)

    def get_num_layers(self) -> int:
        """Returns the number of blocks."""
        return self.backbone.get_num_layers()

    def layer_id(self, parameter_name: str) -> int:
        """Returns a parameter's depth: 0 for tokens and patch embedding, i + 1 for block i, depth + 1 for the rest."""
        part, _, name = parameter_name.partition(".")
        return self.backbone.layer_id(name) if part == "backbone" else self.get_num_layers() + 1


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
    """Builds a segmentor initialised from scratch.

    Args:
        out_indices: Blocks to tap, from 0.
        num_classes: ``K``.
        decode_head: ``"uper"``, or ``"setr_pup"``, which upsamples the last tap to the image size.
        channels: Channels of the head's convolutions.
        pool_scales: Grids that UPerNet pools to.
        dropout: Dropout of the channels that enter a classifier.
        auxiliary_channels: Channels of the auxiliary head; 0 for none.
        auxiliary_index: Level that the auxiliary head reads, from 0.
        **backbone: Keywords of :class:`beit.modeling.Backbone`: ``img_size``, ``patch_size``, ``embed_dim``, …

    Raises:
        InputError: An unknown head, or sizes that do not go together.
    """
    if decode_head not in DECODE_HEADS:
        raise InputError(f"unknown decode_head {decode_head!r}: choose {' or '.join(DECODE_HEADS)}")
    pyramid = BeitPyramid(out_indices=out_indices, multi_scale=decode_head == "uper", **backbone)
    common: dict[str, Any] = {"in_channels": pyramid.embed_dim, "num_classes": num_classes, "dropout": dropout}
    head: Head
    if decode_head == "uper":
        head = UPerHead(channels=channels, pool_scales=pool_scales, **common)
    else:
        height, width = pyramid.patch_embed.patch_size
        if height != width or height & (height - 1):
            raise InputError(f"SETR-PUP doubles sizes: patches must be squares of 8, 16 or 32, not {height} x {width}")
        head = SETRUPHead(channels=channels, num_convs=height.bit_length() - 1, **common)
    if not auxiliary_channels:
        return Segmentor(pyramid, head)
    if not 0 <= auxiliary_index < len(pyramid.out_indices):
        raise InputError(f"auxiliary_index={auxiliary_index}: there are {len(pyramid.out_indices)} taps, from 0")
    return Segmentor(pyramid, head, FCNHead(channels=auxiliary_channels, index=auxiliary_index, **common))


def at_size(segmentor: Segmentor, img_size: tuple[int, int]) -> Segmentor:
    """Returns a segmentor for images of ``img_size`` = ``(H, W)`` in evaluation mode, or itself if it has that size.

    A copy shares every tensor with the original but the resized bias tables and position embeddings.

    Raises:
        InputError: The size is not a multiple of the patch size.
    """
    if tuple(img_size) == segmentor.img_size:
        return segmentor
    shared = [*segmentor.parameters(), *segmentor.buffers()]
    resized = copy.deepcopy(segmentor, {id(tensor): tensor for tensor in shared})
    resized.set_input_size(img_size)
    return resized.eval()


def segmentor_from(weights: Mapping[str, Tensor], metadata: Metadata) -> Segmentor:
    """Builds the segmentor that a checkpoint holds and loads the weights; it is in evaluation mode.

    Weights and metadata are from :func:`beit.checkpoints.read.read_weights`: names without ``backbone.``, and those of
    the heads. ``out_indices``, ``pool_scales`` and ``auxiliary_index``, which do not follow from shapes, default to
    those of the published models.

    Raises:
        InputError: The checkpoint is no segmentor.
    """
    source = str(metadata.get("source", "the checkpoint"))
    heads = heads_in(weights, source)
    scales = metadata.get("pool_scales", POOL_SCALES)
    if heads.kind == "uper" and heads.stages != len(scales):
        raise InputError(f"{source} pools to {heads.stages} grids and does not record which; only {scales} is known")
    known, of_a_classifier = architecture_of(weights, metadata).arguments, ("num_classes", "use_mean_pooling")
    backbone = {name: value for name, value in known.items() if name not in of_a_classifier}
    if "layer_norm_eps" in metadata:
        backbone["norm_layer"] = partial(nn.LayerNorm, eps=metadata["layer_norm_eps"])
    segmentor = build_segmentor(
        out_indices=taps_of(weights, metadata),
        num_classes=heads.num_classes,
        decode_head=heads.kind,
        channels=heads.channels,
        pool_scales=scales,
        auxiliary_channels=heads.auxiliary_channels if heads.auxiliary_convs else 0,
        auxiliary_index=metadata.get("auxiliary_index", 2),
        **backbone,
    )
    load_segmentor(segmentor, weights, metadata, source)
    return segmentor.eval()


def heads_in(weights: Mapping[str, Tensor], source: str) -> Heads:
    """Describes the heads of a checkpoint called ``source``; raises InputError for no decode head or an unknown one."""
    heads = heads_of(weights)
    if not is_segmentor(weights):
        raise InputError(
            f"{source} is a backbone (a pre-training or classification checkpoint), not a segmentor: it has no "
            "decode_head; train a segmentor from it first, with tools/train.py and init_from="
        )
    if not heads.kind:
        raise InputError(f"{source} has a decode_head that is neither UPerNet nor SETR-PUP: no others are supported")
    if not heads.num_classes:
        raise InputError(f"{source} is not a whole segmentor: it lacks decode_head.conv_seg.weight")
    return heads


def load_segmentor(
    segmentor: Segmentor, weights: Mapping[str, Tensor], metadata: Metadata, source: str = "the checkpoint"
) -> KeyReport:
    """Loads weights into a segmentor of the same build; bias tables and positions are resized to its image size.

    Weights and metadata are from :func:`beit.checkpoints.read.read_weights`; the latter become the segmentor's. The
    auxiliary head may be missing. Returns what happened to every tensor; it is logged too.

    Raises:
        InputError: The checkpoint is no segmentor, or one of another build.
    """
    own = {name: tensor for name, tensor in segmentor.state_dict().items() if name.startswith(HEADS)}
    given = {name: tensor for name, tensor in weights.items() if name.startswith(HEADS)}
    _check_build(segmentor, weights, metadata, source)
    backbone = {name: tensor for name, tensor in weights.items() if name not in given}
    report = load_weights(segmentor.backbone, backbone, {**metadata, "source": source})
    heads = {name: tensor for name, tensor in given.items() if name in own}
    if odd := [name for name, tensor in heads.items() if tensor.shape != own[name].shape]:
        sizes = f"{tuple(given[odd[0]].shape)} in the file, {tuple(own[odd[0]].shape)} in the segmentor"
        raise InputError(f"{source} has other head sizes: {len(odd)} tensors differ, such as {odd[0]} ({sizes})")
    segmentor.load_state_dict(heads, strict=False)
    segmentor.metadata = dict(metadata)

    report = _with_heads(report, given, own)
    # Old files lack the counters of batch norms, and a checkpoint need not have an auxiliary head.
    optional = () if any(name.startswith(AUXILIARY) for name in given) else (AUXILIARY,)
    needed = [n for n in report.missing if not n.endswith("num_batches_tracked") and not n.startswith(optional)]
    if needed:
        raise InputError(f"{source} is not a whole segmentor of this kind: it lacks {listed(needed)}")
    (logger.warning if report.unexpected else logger.info)("%s", report.summary())
    return report


def _check_build(segmentor: Segmentor, weights: Mapping[str, Tensor], metadata: Metadata, source: str) -> None:
    """Refuses weights of another head, or of other taps and grids, which would load and segment badly."""
    heads, head, auxiliary = heads_in(weights, source), segmentor.decode_head, segmentor.auxiliary_head
    if heads.kind != (kind := "uper" if isinstance(head, UPerHead) else "setr_pup"):
        raise InputError(f"{source} has the head {heads.kind} and the segmentor {kind}: give decode_head={heads.kind}")
    built: dict[str, tuple[object, str]] = {
        "out_indices": (segmentor.backbone.out_indices, "--out_indices {}, or the config.yaml of its run")
    }
    if isinstance(head, UPerHead):
        built["pool_scales"] = head.pool_scales, "pool_scales={} to build_segmentor"
    if isinstance(auxiliary, FCNHead) and heads.auxiliary_channels:
        built["auxiliary_index"] = auxiliary.index, "--auxiliary_index {}"
    for name, (own, remedy) in built.items():
        has, wants = _spaced(metadata.get(name, own)), _spaced(own)
        if has != wants:
            raise InputError(f"{source} has {name} {has}, and the segmentor {wants}: give {remedy.format(has)}")


def _spaced(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _with_heads(report: KeyReport, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> KeyReport:
    """Returns the backbone's report under the segmentor's names, extended by the heads."""
    full, extra = "backbone.{}".format, [name for name in given if name not in own]
    headless = not any(name.startswith(AUXILIARY) for name in own)
    unwanted = {n: "the segmentor has no auxiliary head" for n in extra if headless and n.startswith(AUXILIARY)}
    return dataclasses.replace(
        report,
        loaded=(*map(full, report.loaded), *(name for name in given if name in own)),
        resized={full(name): note for name, note in report.resized.items()},
        dropped=report.dropped | unwanted,
        missing=(*map(full, report.missing), *(name for name in own if name not in given)),
        unexpected=(*report.unexpected, *(name for name in extra if name not in unwanted)),
    )
