"""What encoder and decoder share: their convolution, residual block and layout, and the range of their pixels."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logit_laplace_eps: float = 0.1


class Conv2d(nn.Module):
    """A convolution of stride 1 that keeps height and width, with parameters ``w`` ``(n_out, n_in, kw, kw)`` and ``b``.

    Args:
        n_in: Input channels.
        n_out: Output channels.
        kw: Side of the kernel, odd.
        use_float16: Whether it may run in half precision where its model does; otherwise it is always float32.
    """

    def __init__(self, n_in: int, n_out: int, kw: int, use_float16: bool = True) -> None:
        super().__init__()
        if min(n_in, n_out, kw) < 1 or kw % 2 == 0:
            raise ValueError(f"a convolution needs channels >= 1 and an odd kernel, not {n_in}, {n_out} and {kw}")
        self.n_in, self.n_out, self.kw, self.use_float16 = n_in, n_out, kw, use_float16
        weight = torch.empty(n_out, n_in, kw, kw)
        if not weight.is_meta:  # random numbers on "meta" have no effect, but torch takes a second to load their code
            weight.normal_(std=1 / math.sqrt(n_in * kw * kw))
        self.w = nn.Parameter(weight)
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, n_in, H, W)`` → ``(B, n_out, H, W)``."""
        if self.use_float16:
            if self.w.dtype != torch.float32:  # only this part of the model was cast to half precision
                x = x.to(self.w.dtype)
            return F.conv2d(x, self.w, self.b, padding=self.kw // 2)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.float(), self.w.float(), self.b.float(), padding=self.kw // 2)


class ResidualBlock(nn.Module):
    """``id_path(x) + post_gain · res_path(x)``: a pre-activation bottleneck of four convolutions.

    Args:
        n_in: Input channels.
        n_out: Output channels, a multiple of 4; the bottleneck has a quarter of them.
        n_layers: Blocks in the whole network; the residual path is scaled by ``1 / n_layers²``.

    Attributes:
        overwrites_input: Whether the sum may be written over ``x``, which saves a quarter of an encoder's time.
    """

    overwrites_input = False
    kernels: ClassVar[tuple[int, int, int, int]]  # sides of the four kernels

    def __init__(self, n_in: int, n_out: int, n_layers: int) -> None:
        super().__init__()
        if n_out % 4:
            raise ValueError(f"the channels of a block must be a multiple of 4, not {n_out}")
        self.post_gain = 1 / n_layers**2
        self.id_path: nn.Module = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = [n_in, n_out // 4, n_out // 4, n_out // 4, n_out]
        self.res_path = nn.Sequential()
        for i, kernel in enumerate(self.kernels):
            self.res_path.add_module(f"relu_{i + 1}", nn.ReLU(inplace=i > 0))
            self.res_path.add_module(f"conv_{i + 1}", Conv2d(widths[i], widths[i + 1], kernel))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, n_in, H, W)`` → ``(B, n_out, H, W)``."""
        residual, x = self.res_path(x), self.id_path(x)
        return (x.add_ if self.overwrites_input else x.add)(residual, alpha=self.post_gain)


def stack_blocks(
    stem: Conv2d,
    block: type[ResidualBlock],
    widths: Sequence[int],
    n_blk_per_group: int,
    between: tuple[str, nn.Module],
    head: Callable[[], Conv2d],
) -> nn.Sequential:
    """Builds the layers of a network: stem, groups of residual blocks, ReLU and head.

    ``widths`` are the groups' channels; ``between`` is the name of what stands between two groups, and that module.
    """
    blocks = nn.Sequential()
    blocks.add_module("input", stem)
    channels = stem.n_out
    for group, width in enumerate(widths, 1):
        members = nn.Sequential()
        for number in range(1, n_blk_per_group + 1):
            members.add_module(f"block_{number}", block(channels, width, len(widths) * n_blk_per_group))
            channels = width
        if group < len(widths):
            members.add_module(*between)
        blocks.add_module(f"group_{group}", members)
    blocks.add_module("output", nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=head())))
    return blocks


def half_precision(device_type: str, wanted: bool) -> torch.autocast:
    """Runs convolutions in float16 on a GPU if wanted, in float32 otherwise; overrides any autocast around them."""
    return torch.autocast(device_type, dtype=torch.float16, enabled=wanted and device_type == "cuda")


def check_input(x: Tensor, channels: int | None, name: str) -> None:
    """Raises a ValueError unless ``x`` is float32 ``(B, channels, H, W)``; ``None`` stands for any number."""
    if x.ndim != 4 or x.dtype != torch.float32 or channels not in (None, x.shape[1]):
        wanted = f"(B, {channels or 'C'}, H, W)"
        raise ValueError(f"{name} must be float32 of shape {wanted}, not {x.dtype} of shape {tuple(x.shape)}")


def map_pixels(x: Tensor) -> Tensor:
    """Maps float32 images ``(B, C, H, W)`` from [0, 1] to [0.1, 0.9], the range the encoder was trained on."""
    check_input(x, None, "images")
    return logit_laplace_eps + x * (1 - 2 * logit_laplace_eps)


def unmap_pixels(x: Tensor) -> Tensor:
    """Maps float32 images ``(B, C, H, W)`` from [0.1, 0.9] back to [0, 1], clamped."""
    check_input(x, None, "images")
    return ((x - logit_laplace_eps) / (1 - 2 * logit_laplace_eps)).clamp(0, 1)
