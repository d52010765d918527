"""What encoder and decoder share: their convolution, their residual block, and the range of their pixels."""

import math

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
        use_float16: Whether it may run in half precision where its model does; otherwise it is float32 throughout.
        device: Where its parameters are made.
        requires_grad: Whether they are trained.

    Raises:
        ValueError: A size is not positive, or ``kw`` is even.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kw: int,
        use_float16: bool = True,
        device: torch.device | str | None = None,
        requires_grad: bool = False,
    ) -> None:
        super().__init__()
        if min(n_in, n_out, kw) < 1 or kw % 2 == 0:
            raise ValueError(f"a convolution needs channels >= 1 and an odd kernel, not {n_in}, {n_out} and {kw}")
        self.n_in, self.n_out, self.kw, self.use_float16 = n_in, n_out, kw, use_float16
        weight = torch.empty(n_out, n_in, kw, kw, device=device)
        if not weight.is_meta:  # torch takes a second to load what random numbers on "meta" need, which are none
            weight.normal_(std=1 / math.sqrt(n_in * kw * kw))
        self.w = nn.Parameter(weight, requires_grad=requires_grad)
        self.b = nn.Parameter(torch.zeros(n_out, device=device), requires_grad=requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, n_in, H, W)`` → ``(B, n_out, H, W)``."""
        if self.use_float16:
            if self.w.dtype != torch.float32:  # a part of a model that was brought to half precision by itself
                x = x.to(self.w.dtype)
            return F.conv2d(x, self.w, self.b, padding=self.kw // 2)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.float(), self.w.float(), self.b.float(), padding=self.kw // 2)

    def extra_repr(self) -> str:
        """The sizes, for ``print(model)``."""
        return f"{self.n_in}, {self.n_out}, kw={self.kw}"


class ResidualBlock(nn.Module):
    """``id_path(x) + post_gain · res_path(x)``: a pre-activation bottleneck of four convolutions.

    Args:
        n_in: Input channels.
        n_out: Output channels, a multiple of 4; the bottleneck has a quarter of them.
        n_layers: Blocks in the whole network; the residual path is scaled by ``1 / n_layers²``.
        kernels: Sides of the four kernels.
        device: Where the parameters are made.
        requires_grad: Whether they are trained.

    Raises:
        ValueError: ``n_out`` is no multiple of 4.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        n_layers: int,
        kernels: tuple[int, int, int, int],
        device: torch.device | str | None = None,
        requires_grad: bool = False,
    ) -> None:
        super().__init__()
        if n_out % 4:
            raise ValueError(f"the channels of a block must be a multiple of 4, not {n_out}")
        self.n_in, self.n_out, self.n_hid, self.n_layers = n_in, n_out, n_out // 4, n_layers
        self.post_gain = 1 / n_layers**2
        self.id_path: nn.Module = nn.Identity()
        if n_in != n_out:
            self.id_path = Conv2d(n_in, n_out, 1, device=device, requires_grad=requires_grad)
        widths = [n_in, self.n_hid, self.n_hid, self.n_hid, n_out]
        self.res_path = nn.Sequential()
        for i, kernel in enumerate(kernels):
            self.res_path.add_module(f"relu_{i + 1}", nn.ReLU())
            convolution = Conv2d(widths[i], widths[i + 1], kernel, device=device, requires_grad=requires_grad)
            self.res_path.add_module(f"conv_{i + 1}", convolution)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, n_in, H, W)`` → ``(B, n_out, H, W)``."""
        return self.id_path(x) + self.post_gain * self.res_path(x)


def half_precision(device_type: str, wanted: bool) -> torch.autocast:
    """The precision of a network's convolutions: float16 on a GPU that is asked for it, float32 otherwise.

    An autocast region around the model makes no difference.
    """
    return torch.autocast(device_type, dtype=torch.float16, enabled=wanted and device_type == "cuda")


def check_input(x: Tensor, channels: int, name: str) -> None:
    """Raises a ValueError unless ``x`` is float32 ``(B, channels, H, W)``."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{name} must have the shape (B, {channels}, H, W), not {tuple(x.shape)}")
    if x.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, not {x.dtype}")


def map_pixels(x: Tensor) -> Tensor:
    """Squeezes float32 images ``(B, C, H, W)`` from [0, 1] into [0.1, 0.9], the range the encoder was trained on.

    Raises:
        ValueError: ``x`` is not a float32 batch of images.
    """
    _check_images(x)
    return logit_laplace_eps + x * (1 - 2 * logit_laplace_eps)


def unmap_pixels(x: Tensor) -> Tensor:
    """Stretches float32 images ``(B, C, H, W)`` from [0.1, 0.9] back to [0, 1], clamped.

    Raises:
        ValueError: ``x`` is not a float32 batch of images.
    """
    _check_images(x)
    return ((x - logit_laplace_eps) / (1 - 2 * logit_laplace_eps)).clamp(0, 1)


def _check_images(x: Tensor) -> None:
    if x.ndim != 4 or x.dtype != torch.float32:
        raise ValueError(f"images must be float32 of 4 dimensions, not {x.dtype} of {x.ndim}")
