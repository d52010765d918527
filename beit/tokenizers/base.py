"""The interface of visual tokenizers: images in, tokens out, and images of tokens.

Images enter in [0, 1] whatever the kind; each kind scales them as it was trained. A kind is a subclass of
:class:`VisualTokenizer` and a function that opens its files, listed in :data:`beit.registry.TOKENIZERS`.

Source: section 2.1 of arXiv 2106.08254.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.checkpoints.load import describe
from beit.checkpoints.read import read_weights
from beit.errors import InputError, did_you_mean
from beit.registry import TOKENIZERS, resolve
from beit.storage import load_checkpoint, weights_fingerprint

# Logits are computed for this many cells × tokens at a time: 256 MiB of float32.
LOGITS_AT_ONCE = 1 << 26


class VisualTokenizer(nn.Module, ABC):
    """Turns images into a grid of tokens, and tokens back into images.

    A subclass defines :meth:`features`, :meth:`quantise` and, if it can decode, :meth:`reconstruct`; all three run
    without gradients and with autocast off. The module is frozen and always in evaluation mode, even when it or its
    parent is switched to training.

    Args:
        vocab_size: Number of different tokens.
        downsampling: Pixels per token in each direction.
        compiled: Compile :meth:`features`, once for each shape of images.
        in_chans: Channels of the images.
    """

    def __init__(self, vocab_size: int, downsampling: int, compiled: bool = False, in_chans: int = 3) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.vocab_size, self.downsampling = vocab_size, downsampling
        self._compiled_features = torch.compile(self.features, dynamic=False) if compiled else None

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Encodes float32 images ``(B, 3, H, W)`` in [0, 1], channels last in memory, into ``(B, C, h, w)``."""

    @abstractmethod
    def quantise(self, features: Tensor) -> Tensor:
        """Assigns tokens, int64 ``(M,)``, to the features ``(M, C)`` of any ``M`` cells."""

    def reconstruct(self, ids: Tensor) -> Tensor:  # noqa: ARG002
        """Decodes int64 ids ``(B, h, w)`` into images ``(B, 3, H, W)`` in [0, 1]."""
        raise InputError(f"{type(self).__name__} has no decoder")

    def fingerprint(self) -> str:
        """Returns a hash of the weights: two tokenizers with the same one mean the same by a token."""
        return weights_fingerprint(self)

    def train(self, mode: bool = True) -> "VisualTokenizer":  # noqa: ARG002
        """Stays in evaluation mode."""
        return super().train(False)

    def grid_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Returns the token grid ``(h, w)`` of an image of ``(H, W)`` pixels.

        Raises :class:`InputError` if a side is not a multiple of ``downsampling``.
        """
        height, width = image_size
        step = self.downsampling
        if height % step or width % step or min(image_size) < step:
            nearest = tuple(max(step, round(side / step) * step) for side in image_size)
            raise InputError(
                f"the tokenizer needs image sides that are multiples of {step} pixels, not {height}×{width}; "
                f"the nearest are {nearest[0]}×{nearest[1]}"
            )
        return height // step, width // step

    def check_grid(self, image_size: tuple[int, int], patch_grid: tuple[int, int]) -> None:
        """Checks that a view of ``(H, W)`` pixels has one token per patch of the backbone's grid ``(h, w)``.

        Raises :class:`InputError` otherwise; the message gives the size that would match.
        """
        height, width = (cells * self.downsampling for cells in patch_grid)
        if tuple(image_size) != (height, width):
            size = str(height) if height == width else f"{height}x{width}"
            raise InputError(
                f"the tokenizer's view of {image_size[0]}×{image_size[1]} pixels, {self.downsampling} per token, does "
                f"not match the patch grid {patch_grid[0]}×{patch_grid[1]}: set second_input_size to {size}"
            )

    @torch.no_grad()
    def encode(self, images: Tensor, mask: Tensor | None = None, *, index: Tensor | None = None) -> Tensor:
        """Returns the tokens of images: all of them, or those of a mask or an index.

        Args:
            images: Float ``(B, 3, H, W)`` in [0, 1].
            mask: Tokens to compute, bool ``(B, h, w)`` or ``(B, h·w)``.
            index: The same as positions in the flattened ``(B, h, w)``, int64 ``(M,)``, without making the host wait.

        Returns:
            Int64 ``(B, h, w)``; with a mask ``(M,)``, equal to ``encode(images)[mask]``, in row-major order.

        Raises:
            InputError: The images, the mask or the index have the wrong shape or type.
        """
        if images.ndim != 4 or images.shape[1] != self.in_chans or not images.is_floating_point():
            given = f"{images.dtype} of shape {tuple(images.shape)}"
            raise InputError(f"encode needs float images (B, {self.in_chans}, H, W) in [0, 1], not {given}")
        grid = (images.shape[0], *self.grid_size((images.shape[2], images.shape[3])))
        if mask is not None:
            if mask.dtype != torch.bool or tuple(mask.shape) not in (grid, (grid[0], grid[1] * grid[2])):
                raise InputError(
                    f"the mask must be bool of shape {grid} like the tokens, not {mask.dtype} of shape "
                    f"{tuple(mask.shape)}"
                )
            index = mask.flatten().nonzero().squeeze(1)
        elif index is not None and (index.dtype != torch.int64 or index.ndim != 1):
            raise InputError(f"the index must be int64 (M,), not {index.dtype} of shape {tuple(index.shape)}")
        with torch.autocast(images.device.type, enabled=False):
            encoder = self._compiled_features or self.features
            # The fastest layout for convolutions, and the one whose features need no reordering.
            images = images.float().contiguous(memory_format=torch.channels_last)
            features = encoder(images).permute(0, 2, 3, 1).flatten(0, 2)  # (B·h·w, C)
            return self.quantise(features).view(grid) if index is None else self.quantise(features[index])

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Returns the images of tokens: int64 ``(B, h, w)`` → float32 ``(B, 3, H, W)`` in [0, 1].

        Raises :class:`InputError` if the ids have another shape or type or are out of range, or there is no decoder.
        """
        if ids.ndim != 3 or ids.is_floating_point():
            raise InputError(f"decode needs int64 ids (B, h, w), not {ids.dtype} of shape {tuple(ids.shape)}")
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
        if not 0 <= low <= high < self.vocab_size:
            raise InputError(f"decode needs ids from 0 to {self.vocab_size - 1}, not {low} to {high}")
        with torch.autocast(ids.device.type, enabled=False):
            return self.reconstruct(ids.long())


class LogitTokenizer(VisualTokenizer):
    """A tokenizer whose token is the arg-max of a linear layer's logits, which are float32."""

    @abstractmethod
    def head(self) -> tuple[Tensor, Tensor]:
        """Returns weight ``(vocab_size, C, 1, 1)`` and bias ``(vocab_size,)`` of the layer."""

    def quantise(self, features: Tensor) -> Tensor:
        """Takes the arg-max in chunks: the logits of all cells at once may not fit into memory."""
        weight, bias = self.head()
        rows = max(1, LOGITS_AT_ONCE // self.vocab_size)
        ids = [F.linear(chunk.float(), weight.flatten(1), bias).argmax(dim=1) for chunk in features.split(rows)]
        return torch.cat(ids)


def load_tokenizer(
    path: str | os.PathLike[str],
    kind: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    num_heads: int | None = None,
) -> VisualTokenizer:
    """Opens a tokenizer, frozen.

    Args:
        path: For ``dall-e`` a folder with ``encoder.pkl`` or ``encoder.safetensors``, and a decoder likewise if
            :meth:`VisualTokenizer.decode` is called. For ``customized`` a folder with ``pytorch_model.bin`` and
            ``config.json``. In both cases the file itself works too. For ``vqkd`` a file, or a name in
            :data:`beit.tokenizers.vqkd.DOWNLOADS`. A checkpoint of the run that trained it works as well.
        kind: A key of :data:`beit.registry.TOKENIZERS`; by default that of the file.
        device: Where to put it.
        dtype: Number format of the encoder up to its last layer; logits and decoder are always float32. float16 and
            bfloat16 are faster where supported and change a few ids, where two tokens are nearly equally likely.
        compiled: Compile the encoder up to its last layer, once for each shape of images.
        num_heads: For ``vqkd``, attention heads per block where the file does not record them.

    Raises:
        InputError: There is no such kind or path, or the files are of another kind, damaged or something else.
    """
    opens_names, name = (kind or "vqkd").startswith("vqkd"), Path(path).name.partition("-")[0]
    if str(path).startswith(("http://", "https://")):
        if not (opens_names and name.startswith("vqkd_")):
            raise InputError(f"{path} is an address: run `beit download tokenizer DIR` and give that folder")
        path = name  # of the official address …/NAME-HASH.pth
    path = Path(os.path.expanduser(path))
    opens_names &= path.name.startswith("vqkd_") and not path.suffix
    if not path.exists() and not opens_names:
        near = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        released = "`beit download tokenizer DIR` fetches the published one"
        if kind and kind.startswith("vqkd"):
            released = f"released ones go by name: {', '.join(name for name in TOKENIZERS if name.startswith('vqkd_'))}"
        raise InputError(f"no tokenizer at {path}{near}; {released}")
    kind = kind or detect_kind(path)
    if kind.startswith("vqkd") and (found := detect_kind(path)) != "vqkd":
        raise InputError(f"{path} is a tokenizer of kind {found}, not VQ-KD: name that kind, or give another file")
    open_tokenizer = resolve(TOKENIZERS, kind, "tokenizer kind")
    if num_heads is not None and not kind.startswith("vqkd"):
        raise InputError(f"{path} is a tokenizer of kind {kind}: only VQ-KD's files take num_heads")
    options = {} if num_heads is None else {"num_heads": num_heads}
    try:
        tokenizer: VisualTokenizer = open_tokenizer(path, dtype, compiled, **options)
    except InputError as problem:
        try:
            found = describe(*read_weights(path))
        except InputError:
            raise problem from None
        raise InputError(f"{path} is no tokenizer but {found}") from problem
    return tokenizer.to(device)


def detect_kind(path: Path) -> str:
    """Returns which of this library's kinds of tokenizer is in a folder, by its files' names, or in a file."""
    names = os.listdir(path) if path.is_dir() else [path.name]
    if any(name.startswith(("encoder.", "decoder.")) for name in names):
        return "dall-e"
    content = load_checkpoint(path, mmap=True) if path.is_file() else {}
    is_dvae = isinstance(content, Mapping) and "quantizer" in content  # a checkpoint of its training
    return "customized" if is_dvae or "pytorch_model.bin" in names else "vqkd"
