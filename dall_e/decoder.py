"""The decoder: one-hot tokens to the parameters of a logit-Laplace distribution of the pixels."""

from functools import partial

import torch
from torch import Tensor, nn

from dall_e.utils import Conv2d, ResidualBlock, check_input, half_precision, stack_blocks


class DecoderBlock(ResidualBlock):
    """A residual block of the decoder."""

    kernels = (1, 3, 3, 3)


class Decoder(nn.Module):
    """Four groups of residual blocks, of 8, 4, 2 and 1 times ``n_hid`` channels, with nearest upsampling between them.

    The image of tokens is ``unmap_pixels(sigmoid(output[:, :output_channels]))``; tokens of another shape are a
    ValueError.

    Args:
        n_init: Channels of a token's vector.
        n_hid: Channels of the last group, a multiple of 4.
        n_blk_per_group: Blocks in a group.
        output_channels: Channels of the images; the network gives a location and a log-scale for each.
        vocab_size: Size of the vocabulary.
        device: Where the parameters are created.
        requires_grad: Whether they are trained.
        use_mixed_precision: As in the released modules, run all convolutions but the first in float16, on CUDA only.
    """

    group_count = 4

    def __init__(
        self,
        n_init: int = 128,
        n_hid: int = 256,
        n_blk_per_group: int = 2,
        output_channels: int = 3,
        vocab_size: int = 8192,
        device: torch.device | str | None = None,
        requires_grad: bool = False,
        use_mixed_precision: bool = True,
    ) -> None:
        super().__init__()
        self.n_init, self.n_hid, self.n_blk_per_group = n_init, n_hid, n_blk_per_group
        self.output_channels, self.vocab_size = output_channels, vocab_size
        self.use_mixed_precision = use_mixed_precision
        stem = Conv2d(vocab_size, n_init, 1, use_float16=False)
        widths = [n_hid * 2**group for group in reversed(range(self.group_count))]
        between = "upsample", nn.Upsample(scale_factor=2, mode="nearest")
        head = partial(Conv2d, n_hid, 2 * output_channels, 1)
        self.blocks = stack_blocks(stem, DecoderBlock, widths, n_blk_per_group, between, head)
        self.requires_grad_(requires_grad).to(device)

    def forward(self, x: Tensor) -> Tensor:
        """One-hot tokens, float32 ``(B, vocab_size, h, w)`` → float32 ``(B, 2 · output_channels, 8h, 8w)``."""
        check_input(x, self.vocab_size, "the decoder's input")
        with half_precision(x.device.type, self.use_mixed_precision):
            return self.blocks(x).float()
