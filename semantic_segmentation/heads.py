"""Heads that turn feature levels into logits: UPerNet, SETR-PUP and the auxiliary FCN, with mmsegmentation's names.

Shapes: ``B`` images, ``C`` feature channels, ``K`` classes, ``(h, w)`` the size of a level. Each head takes all levels
of the backbone, a list from fine to coarse, and picks those it reads.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from beit.errors import InputError

LEVELS = 4


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes ``(B, C, h, w)`` to ``size`` pixels, bilinear with ``align_corners=False``, as images are resized."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def convolved_resized(x: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    """Computes ``conv2d(resize(x, size), weight, padding="same")`` without convolving at the large size.

    Resizing mixes positions and a kernel tap mixes channels, so the two commute: every tap is applied at the small
    size, and one matrix for the rows and one for the columns, which resize and shift, sum the taps at the large size.
    That takes a quarter of the products for twice the height and width, a 64th for eight times. From ``x``,
    ``(B, C, h, w)``, and ``weight``, ``(D, C, k, k)`` with ``k`` odd, the result is ``(B, D, H, W)``, channels last.
    """
    side = weight.shape[-1]
    rows, columns = (_resized_taps(x, axis, new, side) for axis, new in zip((2, 3), size, strict=True))
    taps = rearrange(x, "b c h w -> b h w c") @ rearrange(weight, "d c ky kx -> c (kx ky d)")  # (B, h, w, k * k * D)
    wide = columns @ rearrange(taps, "b h w (kx kyd) -> b h (w kx) kyd", kx=side)  # (B, h, W, k * D)
    tall = rows @ rearrange(wide, "b h w (ky d) -> b (h ky) (w d)", ky=side)  # (B, H, W * D)
    return rearrange(tall, "b h (w d) -> b d h w", w=size[1])


def _resized_taps(x: Tensor, axis: int, new: int, side: int) -> Tensor:
    """Returns the weight of each position on an axis of ``x`` in each tap at ``new`` positions, ``(new, old * k)``."""
    exact = torch.promote_types(x.dtype, torch.float32)
    places = torch.eye(x.shape[axis], device=x.device, dtype=exact)
    resized = F.interpolate(places[None], size=new, mode="linear", align_corners=False)[0]  # (old, new)
    padded = F.pad(resized, (side // 2, side // 2))  # zero padding of the convolution
    return rearrange(padded.unfold(1, side, 1), "old new tap -> new (old tap)").to(x.dtype)


class ConvNormReLU(nn.Sequential):
    """A convolution without bias and with an odd kernel that keeps the size, batch normalisation, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        super().__init__(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), activate=nn.ReLU()))

    def fuse(self, levels: Sequence[Tensor]) -> Tensor:
        """Applies this to levels ``(B, C, h, w)``, concatenated at the size of the first.

        Equal to ``self(torch.cat([resize(level, size) for level in levels], dim=1))`` up to rounding in the dtype of
        the levels. Hooks on this module and on its convolution are not called.
        """
        conv, norm, activate = cast("tuple[nn.Conv2d, nn.Module, nn.Module]", tuple(self))
        size, padding = levels[0].shape[2:], conv.padding
        weights = conv.weight.split([level.shape[1] for level in levels], dim=1)
        parts = [
            F.conv2d(level, weight, padding=padding)  # type: ignore[arg-type]
            if level.shape[2:] == size
            else convolved_resized(level, weight, size)
            for level, weight in zip(levels, weights, strict=True)
        ]
        return activate(norm(sum(parts[1:], parts[0])))


class Head(nn.Module):
    """The common part of the heads: the classifier of each position, before which channels drop, and initialisation."""

    def __init__(self, *, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)
        self.dropout = nn.Dropout2d(dropout)

    def classify(self, x: Tensor) -> Tensor:
        """Classifies features ``(B, channels, h, w)``: logits ``(B, K, h, w)``."""
        return self.conv_seg(self.dropout(x))

    def init_weights(self) -> None:
        """Reinitialises every weight: the classifier from N(0, 0.01²), other convolutions by He's rule, fan out."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                module.reset_parameters()
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(cast("Tensor", self.conv_seg.bias))


class UPerHead(Head):
    """UPerNet: pyramid pooling of the coarsest level, a top-down feature pyramid, and the fusion of all levels.

    ``channels`` are the output channels of every convolution, ``pool_scales`` the grids that the coarsest level is
    pooled to.

    Source: Unified Perceptual Parsing for Scene Understanding (arXiv 1807.10221).
    """

    def __init__(self, *, in_channels: int, channels: int, pool_scales: Sequence[int], **classifier: Any) -> None:
        super().__init__(channels=channels, **classifier)
        self.pool_scales = tuple(pool_scales)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNormReLU(in_channels, channels, kernel_size=1))
            for scale in pool_scales
        )
        pooled = in_channels + len(pool_scales) * channels
        self.bottleneck = ConvNormReLU(pooled, channels, kernel_size=3)
        finer = range(LEVELS - 1)
        self.lateral_convs = nn.ModuleList(ConvNormReLU(in_channels, channels, kernel_size=1) for _ in finer)
        self.fpn_convs = nn.ModuleList(ConvNormReLU(channels, channels, kernel_size=3) for _ in finer)
        self.fpn_bottleneck = ConvNormReLU(LEVELS * channels, channels, kernel_size=3)
        self.init_weights()

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Classifies ``levels`` of ``(B, C, h, w)``, from fine to coarse: logits at the size of the finest.

        Raises:
            InputError: Training on a single image, which 1 x 1 pooling leaves nothing to normalise over.
        """
        single = self.training and len(levels[-1]) == 1 and 1 in self.pool_scales
        if single and type(self.bottleneck.bn) is nn.BatchNorm2d:  # synchronised ones see other processes' images too
            raise InputError(
                "UPerNet cannot be trained on one image at a time: pooled to 1 x 1 it leaves batch normalisation a "
                "single value; use at least 2 images per process (batch_size), or several processes"
            )
        top = self.bottleneck.fuse([levels[-1], *(module(levels[-1]) for module in self.psp_modules)])
        path = [top]  # from fine to coarse, each level with all coarser ones added
        for level, lateral in zip(reversed(levels[:-1]), reversed(self.lateral_convs), strict=True):
            path.insert(0, lateral(level) + resize(path[0], level.shape[2:]))
        outputs = [conv(level) for conv, level in zip(self.fpn_convs, path, strict=False)] + [top]
        return self.classify(self.fpn_bottleneck.fuse(outputs))


class FCNHead(Head):
    """One convolution and the classifier on the level ``index``: the auxiliary head of mmsegmentation's configs.

    Source: Fully Convolutional Networks for Semantic Segmentation (arXiv 1411.4038).
    """

    def __init__(self, *, in_channels: int, channels: int, index: int, **classifier: Any) -> None:
        super().__init__(channels=channels, **classifier)
        self.index = index
        self.convs = nn.Sequential(ConvNormReLU(in_channels, channels, kernel_size=3))
        self.init_weights()

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Classifies one of ``levels`` ``(B, C, h, w)``: logits at its size."""
        return self.classify(self.convs(levels[self.index]))


class SETRUPHead(Head):
    """SETR-PUP: ``num_convs`` convolutions on the last level, each followed by upsampling to twice the size.

    Four lead from patches of 16 pixels back to the image size.

    Source: SETR (arXiv 2012.15840), section 3.2; the head of BEiT's own paper (arXiv 2106.08254, section 3.2).
    """

    def __init__(self, *, in_channels: int, channels: int, num_convs: int, **classifier: Any) -> None:
        super().__init__(channels=channels, **classifier)
        self.norm = nn.LayerNorm(in_channels, eps=1e-6)
        self.up_convs = nn.ModuleList(
            nn.Sequential(
                ConvNormReLU(channels if step else in_channels, channels, kernel_size=3),
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            )
            for step in range(num_convs)
        )
        self.init_weights()

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Classifies the last of ``levels`` ``(B, C, h, w)``: logits ``(B, K, h * 2**num_convs, w * 2**num_convs)``."""
        x = self.norm(rearrange(levels[-1], "b c h w -> b h w c"))
        x = rearrange(x, "b h w c -> b c h w")
        for up_conv in self.up_convs:
            x = up_conv(x)
        return self.classify(x)
