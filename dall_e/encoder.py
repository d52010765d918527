"""The encoder: an image to logits over the vocabulary at every cell of a grid 8 times smaller."""

from functools import partial

import torch
from torch import Tensor, nn

from dall_e.utils import Conv2d, ResidualBlock, check_input, half_precision, stack_blocks


class EncoderBlock(ResidualBlock):
    """A residual block of the encoder."""

    kernels = (3, 3, 3, 1)


class Encoder(nn.Module):
    """Four groups of residual blocks, of 1, 2, 4 and 8 times ``n_hid`` channels, with max-pooling between them.

    Its input is images in [0, 1] mapped by :func:`dall_e.map_pixels`; others are a ValueError.

    Args:
        n_hid: Channels of the first group, a multiple of 4.
        n_blk_per_group: Blocks in a group.
        input_channels: Channels of the images.
        vocab_size: Size of the vocabulary.
        device: Where the parameters are created.
        requires_grad: Whether they are trained.
        use_mixed_precision: As in the released modules, run all convolutions but the last in float16, on CUDA only.
    """

    group_count = 4

    def __init__(
        self,
        n_hid: int = 256,
        n_blk_per_group: int = 2,
        input_channels: int = 3,
        vocab_size: int = 8192,
        device: torch.device | str | None = None,
        requires_grad: bool = False,
        use_mixed_precision: bool = True,
    ) -> None:
        super().__init__()
        self.n_hid, self.n_blk_per_group = n_hid, n_blk_per_group
        self.input_channels, self.vocab_size = input_channels, vocab_size
        self.use_mixed_precision = use_mixed_precision
        widths = [n_hid * 2**group for group in range(self.group_count)]
        head = partial(Conv2d, widths[-1], vocab_size, 1, use_float16=False)
        between = "pool", nn.MaxPool2d(2)
        self.blocks = stack_blocks(
            Conv2d(input_channels, n_hid, 7), EncoderBlock, widths, n_blk_per_group, between, head
        )
        self.requires_grad_(requires_grad).to(device)

    @property
    def head(self) -> Conv2d:
        """The last 1×1 convolution, from features to logits."""
        head = self.blocks.get_submodule("output.conv")
        assert isinstance(head, Conv2d)
        return head

    def features(self, x: Tensor) -> Tensor:
        """What the head sees: float32 ``(B, input_channels, H, W)`` → float32 ``(B, 8 · n_hid, H // 8, W // 8)``."""
        check_input(x, self.input_channels, "the encoder's input")
        with half_precision(x.device.type, self.use_mixed_precision):
            return self.blocks[:-1](x).relu().float()

    def forward(self, x: Tensor) -> Tensor:
        """Logits: float32 ``(B, input_channels, H, W)`` → float32 ``(B, vocab_size, H // 8, W // 8)``."""
        return self.head(self.features(x))
