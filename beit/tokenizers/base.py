"""Visual tokens: one frozen interface over OpenAI's DALL-E encoder and our own discrete VAE.

Source: BEiT, section 2.1. Images enter in [0, 1] whichever kind it is; each kind scales them as it was trained.
"""

import json
import logging
import os
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.errors import InputError, did_you_mean
from beit.storage import (
    atomic_write,
    check_recorded_hash,
    describe_problem,
    download,
    load_checkpoint,
    require_file,
    save_checkpoint,
)
from beit.tokenizers.dvae import DiscreteVAE, denormalise_pixels, normalise_pixels
from dall_e import Decoder, Encoder, ModelFileError, load_model, map_pixels, unmap_pixels
from dall_e.utils import ResidualBlock

logger = logging.getLogger(__name__)

Half = TypeVar("Half", bound=Encoder | Decoder)
KINDS = ("dall-e", "customized")
OPENAI_URL = "https://cdn.openai.com/dall-e/"
OFFICIAL_DVAE_SIZES: dict[str, Any] = {
    "image_size": 112,
    "num_tokens": 8192,
    "codebook_dim": 512,
    "num_layers": 3,
    "hidden_dim": 256,
}
# Logits are computed for this many cells × tokens at a time: 256 MiB of float32.
LOGITS_AT_ONCE = 1 << 26


class VisualTokenizer(nn.Module):
    """Turns images into a grid of tokens, and tokens back into images.

    It stays in evaluation mode whatever is called on it or its parents, has no trainable parameter, and computes in its
    own number format even inside an autocast region.

    Args:
        vocab_size: Number of different tokens.
        downsampling: Pixels per token in each direction.
        dtype: Number format of the encoder up to its last layer. float16 and bfloat16 are faster where the hardware has
            them, at the price of a few other ids where two tokens are nearly equally likely. Logits and their maximum,
            and the decoder, are float32 in any case.
        compiled: Compile the encoder up to its last layer, once for each shape of images.
    """

    def __init__(
        self, vocab_size: int, downsampling: int, dtype: torch.dtype = torch.float32, compiled: bool = False
    ) -> None:
        super().__init__()
        self.vocab_size, self.downsampling, self.dtype = vocab_size, downsampling, dtype
        self._compiled_features = torch.compile(self._features, dynamic=False) if compiled else None

    @abstractmethod
    def _features(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [0, 1] → what the last 1×1 convolution sees, ``(B, C, h, w)``."""

    @abstractmethod
    def _head(self) -> tuple[Tensor, Tensor]:
        """Weight ``(vocab_size, C, 1, 1)`` and bias ``(vocab_size,)`` of the last convolution."""

    @abstractmethod
    def _images(self, ids: Tensor) -> Tensor:
        """Int64 ``(B, h, w)`` → images ``(B, 3, H, W)`` in [0, 1]."""

    def train(self, mode: bool = True) -> "VisualTokenizer":  # noqa: ARG002
        """Stays in evaluation mode."""
        return super().train(False)

    def grid_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The grid ``(h, w)`` of tokens of an image of ``(H, W)`` pixels.

        Raises:
            InputError: A side is no multiple of ``downsampling``.
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
        """Makes sure that there is one token for each patch.

        Args:
            image_size: ``(H, W)`` of the tokenizer's view, in pixels.
            patch_grid: ``(h, w)`` of the backbone's patches.

        Raises:
            InputError: The grids differ; the message names both and the size that would match.
        """
        wanted = tuple(cells * self.downsampling for cells in patch_grid)
        size = str(wanted[0]) if wanted[0] == wanted[1] else f"{wanted[0]}x{wanted[1]}"
        remedy = f"for the {patch_grid[0]}×{patch_grid[1]} grid of patches, set second_input_size to {size}"
        try:
            grid = self.grid_size(image_size)
        except InputError as error:
            raise InputError(f"{error}; {remedy}") from error
        if grid != tuple(patch_grid):
            raise InputError(
                f"the tokenizer's {grid[0]}×{grid[1]} grid (of a {image_size[0]}×{image_size[1]} image) is not the "
                f"patches' {patch_grid[0]}×{patch_grid[1]}: {remedy}"
            )

    @torch.no_grad()
    def encode(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """The tokens of images, all or only those asked for.

        Args:
            images: Float ``(B, 3, H, W)`` in [0, 1].
            mask: Which tokens to compute: bool ``(B, h, w)`` or ``(B, h·w)``; or int64 ``(M,)``, the places in the
                flattened ``(B, h, w)``, which spares a GPU the wait for the number of True in a mask.

        Returns:
            Int64 ``(B, h, w)``; with a mask ``(M,)``, equal to ``encode(images)[mask]``, in row-major order.

        Raises:
            InputError: The images or the mask have another shape or type.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InputError(
                f"encode needs float images (B, 3, H, W) in [0, 1], not {images.dtype} of shape {tuple(images.shape)}"
            )
        grid = (images.shape[0], *self.grid_size((images.shape[2], images.shape[3])))
        places = None if mask is None else _places(mask, grid)
        with torch.autocast(images.device.type, enabled=False):
            trunk = self._compiled_features or self._features
            # The layout that convolutions are fastest in, and the one in which the features need no other order.
            images = images.float().contiguous(memory_format=torch.channels_last)
            features = trunk(images).permute(0, 2, 3, 1).flatten(0, 2)  # (B·h·w, C)
            if places is None:
                return self._most_likely(features).view(grid)
            return self._most_likely(features[places])

    def _most_likely(self, features: Tensor) -> Tensor:
        """``(M, C)`` → int64 ``(M,)``, in pieces: the logits of all images at once may not fit into the memory."""
        weight, bias = self._head()
        rows = max(1, LOGITS_AT_ONCE // self.vocab_size)
        ids = [F.linear(piece.float(), weight.flatten(1), bias).argmax(dim=1) for piece in features.split(rows)]
        return torch.cat(ids)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """The images of tokens: int64 ``(B, h, w)`` → float32 ``(B, 3, H, W)`` in [0, 1].

        Raises:
            InputError: The ids have another shape or type, or the tokenizer has no decoder.
        """
        if ids.ndim != 3 or ids.is_floating_point():
            raise InputError(f"decode needs int64 ids (B, h, w), not {ids.dtype} of shape {tuple(ids.shape)}")
        with torch.autocast(ids.device.type, enabled=False):
            return self._images(ids.long())


def _places(mask: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The places in the flattened grid that a mask asks for, int64 ``(M,)``."""
    if mask.dtype == torch.int64 and mask.ndim == 1:
        return mask
    if mask.dtype != torch.bool or tuple(mask.shape) not in (grid, (grid[0], grid[1] * grid[2])):
        raise InputError(
            f"the mask must be bool of shape {grid} like the tokens, not {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return mask.flatten().nonzero().squeeze(1)


class DallETokenizer(VisualTokenizer):
    """The tokenizer of the published models.

    Args:
        encoder: The encoder; it is frozen.
        load_decoder: Called at the first :meth:`decode`; pre-training never needs the decoder.
        dtype: See :class:`VisualTokenizer`.
        compiled: See :class:`VisualTokenizer`.
    """

    def __init__(
        self,
        encoder: Encoder,
        load_decoder: Callable[[], Decoder],
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        super().__init__(encoder.vocab_size, 2 ** (encoder.group_count - 1), dtype, compiled)
        encoder.use_mixed_precision = False  # the weights have the format already and need not be cast each time
        # bfloat16's 8 bits are too few for the shortcuts, which carry what is added up over all blocks. They are 7 % of
        # the operations; the branches are the rest. float16 does for both, as in the released modules.
        branches = [block.res_path for block in encoder.modules() if isinstance(block, ResidualBlock)]
        for part in branches if dtype == torch.bfloat16 else [encoder.blocks[:-1]]:
            part.to(dtype)
        self.encoder = encoder.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.decoder: Decoder | None = None
        self._load_decoder = load_decoder
        self.train()

    def _features(self, images: Tensor) -> Tensor:
        return self.encoder.features(map_pixels(images))

    def _head(self) -> tuple[Tensor, Tensor]:
        return self.encoder.head.w, self.encoder.head.b

    def _images(self, ids: Tensor) -> Tensor:
        if self.decoder is None:
            decoder = self._load_decoder()
            if decoder.vocab_size != self.vocab_size:
                raise InputError(
                    f"the decoder knows {decoder.vocab_size} tokens and the encoder {self.vocab_size}: not a pair"
                )
            decoder.use_mixed_precision = False
            self.decoder = decoder.requires_grad_(False).eval().to(self.encoder.head.w.device)
        one_hot = F.one_hot(ids, self.vocab_size).permute(0, 3, 1, 2).float()  # (B, vocab, h, w)
        return unmap_pixels(self.decoder(one_hot)[:, :3].sigmoid())


class CustomizedTokenizer(VisualTokenizer):
    """A discrete VAE of our own (or of the official "customized" format) as a tokenizer.

    Args:
        model: The VAE; it is frozen.
        dtype: See :class:`VisualTokenizer`.
        compiled: See :class:`VisualTokenizer`.
    """

    def __init__(self, model: DiscreteVAE, dtype: torch.dtype = torch.float32, compiled: bool = False) -> None:
        super().__init__(model.num_tokens, model.downsampling, dtype, compiled)
        self.model = model.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train()

    def _features(self, images: Tensor) -> Tensor:
        half = self.dtype != torch.float32
        with torch.autocast(images.device.type, dtype=self.dtype if half else None, enabled=half):
            return self.model.features(normalise_pixels(images))

    def _head(self) -> tuple[Tensor, Tensor]:
        head = self.model.head
        assert head.bias is not None
        return head.weight, head.bias

    def _images(self, ids: Tensor) -> Tensor:
        return denormalise_pixels(self.model.decode(ids))


def load_tokenizer(
    path: str | os.PathLike[str],
    kind: str = "dall-e",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> VisualTokenizer:
    """Opens a tokenizer.

    Args:
        path: For ``dall-e`` a folder with ``encoder.pkl`` or ``encoder.safetensors``, and a decoder likewise if
            :meth:`VisualTokenizer.decode` is called. For ``customized`` a folder with ``pytorch_model.bin`` and
            ``config.json``. In both cases the file itself will do.
        kind: ``dall-e`` or ``customized``.
        device: Where to put it.
        dtype: See :class:`VisualTokenizer`.
        compiled: See :class:`VisualTokenizer`.

    Returns:
        The tokenizer, frozen.

    Raises:
        InputError: There is no such kind or path, or the files are of the other kind, damaged or something else.
    """
    if kind not in KINDS:
        raise InputError(f"there is no tokenizer of kind {kind!r}{did_you_mean(kind, KINDS)}: use {' or '.join(KINDS)}")
    if str(path).startswith(("http://", "https://")):
        raise InputError(f"{path} is an address: run `beit download tokenizer DIR` and give that folder")
    path = Path(path)
    if not path.exists():
        near = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        raise InputError(
            f"there is no tokenizer at {path}{near}; `beit download tokenizer DIR` fetches the published one"
        )
    if kind == "customized":
        return CustomizedTokenizer(load_dvae(path), dtype, compiled).to(device)
    return _load_dall_e(path, dtype, compiled).to(device)


def _load_dall_e(path: Path, dtype: torch.dtype, compiled: bool) -> DallETokenizer:
    folder = path if path.is_dir() else path.parent
    encoder = _load_half(_find_half(folder, "encoder") if path.is_dir() else path, Encoder)

    def load_decoder() -> Decoder:
        return _load_half(_find_half(folder, "decoder"), Decoder)

    return DallETokenizer(encoder, load_decoder, dtype, compiled)


def _find_half(folder: Path, name: str) -> Path:
    """The file of the encoder or the decoder in a folder."""
    for file in (folder / f"{name}.safetensors", folder / f"{name}.pkl"):
        if file.is_file():
            return file
    hint = "; set the kind to customized" if (folder / "pytorch_model.bin").is_file() else ""
    found = ", ".join(sorted(os.listdir(folder))[:8]) or "nothing"
    raise InputError(f"{folder} has neither {name}.pkl nor {name}.safetensors (found: {found}){hint}")


def _load_half(file: Path, expected: type[Half]) -> Half:
    """Opens an encoder or a decoder, after comparing its hash if one was recorded at its download."""
    if file.with_name(file.name + ".sha256").exists():
        check_recorded_hash(file)
    if problem := describe_problem(file):
        raise InputError(f"{file} is no {expected.__name__.lower()}: {problem}")
    try:
        model = load_model(file)
    except ModelFileError as error:
        raise InputError(str(error)) from error
    if not isinstance(model, expected):
        raise InputError(f"{file} holds the {type(model).__name__.lower()}, not the {expected.__name__.lower()}")
    return model


def _dvae_file(path: Path) -> Path:
    """The weights of a customized tokenizer: the file itself, or the one in the folder."""
    if path.is_file():
        return path
    file = path / "pytorch_model.bin"
    if not file.is_file():
        found = sorted(os.listdir(path))
        hint = "; set the kind to dall-e" if any(name.startswith("encoder.") for name in found) else ""
        raise InputError(f"{path} has no pytorch_model.bin (found: {', '.join(found[:8]) or 'nothing'}){hint}")
    return file


def load_dvae(path: str | os.PathLike[str]) -> DiscreteVAE:
    """Opens a discrete VAE, with the sizes of the ``config.json`` beside it, or the official ones without that.

    Args:
        path: A folder with ``pytorch_model.bin``, or the file.

    Returns:
        The model, trainable, on the CPU.

    Raises:
        InputError: The file is missing or something else, or its weights have other sizes.
    """
    path = Path(path)
    if not path.is_dir():
        require_file(path)
    file = _dvae_file(path)
    if file.suffix == ".pkl":
        raise InputError(f"{file} looks like a part of the dall-e tokenizer: set the kind to dall-e")
    checkpoint = load_checkpoint(file)
    weights = checkpoint.get("weights", checkpoint) if isinstance(checkpoint, dict) else {}
    if "codebook.weight" not in weights:
        raise InputError(f"{file} holds no discrete VAE: it has no codebook.weight")
    config = file.with_name("config.json")
    sizes = _read_sizes(config) if config.exists() else OFFICIAL_DVAE_SIZES
    try:
        model = DiscreteVAE(**sizes)
    except (TypeError, ValueError) as error:
        raise InputError(f"{config} does not describe a discrete VAE: {error}") from error
    _check_shapes(file, config, model, weights)
    model.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    return model.requires_grad_(True)


def _check_shapes(file: Path, config: Path, model: DiscreteVAE, weights: dict[str, Any]) -> None:
    """Raises an :class:`InputError` that names the first parameter which does not fit the sizes."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(getattr(value, "shape", ())) for name, value in weights.items()}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            source = str(config) if config.exists() else "the official sizes (there is no config.json beside it)"
            raise InputError(
                f"{file} does not fit {source}: {name} is {found.get(name, 'missing')}, "
                f"where {expected.get(name, 'nothing')} is expected; write the sizes of the model into config.json"
            )


def _read_sizes(config: Path) -> dict[str, Any]:
    """The sizes in a ``config.json``; unknown keys are left out, for other tools may write more into it."""
    try:
        content = json.loads(config.read_text())
        sizes = {name: content[name] for name in OFFICIAL_DVAE_SIZES if name in content}
    except (ValueError, TypeError) as error:
        raise InputError(f"{config} is no JSON object ({error})") from error
    if isinstance(sizes.get("image_size"), list):
        sizes["image_size"] = tuple(sizes["image_size"])
    return {**OFFICIAL_DVAE_SIZES, **sizes}


def save_dvae(folder: str | os.PathLike[str], model: DiscreteVAE) -> None:
    """Writes ``pytorch_model.bin`` and ``config.json`` so that :func:`load_tokenizer` opens the folder.

    Args:
        folder: Made if it is missing.
        model: Its weights are saved as they are.

    Raises:
        InputError: The folder cannot be written.
    """
    folder = Path(folder)
    with atomic_write(folder / "config.json") as file:
        file.write((json.dumps(model.sizes(), indent=2) + "\n").encode())
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    save_checkpoint(folder / "pytorch_model.bin", {"weights": weights})


def download_tokenizer(directory: str | os.PathLike[str], base_url: str = OPENAI_URL) -> None:
    """Fetches ``encoder.pkl`` and ``decoder.pkl`` of the published tokenizer, unless they are there.

    No hash was ever published: a new file is verified by opening it and comparing names and shapes, and its hash is
    recorded for the next time.

    Args:
        directory: Where to put them; made if it is missing.
        base_url: The address of the folder on a server. The sizes are compared for the default one alone, so that
            other models can be served elsewhere.

    Raises:
        InputError: See :func:`beit.storage.download`; or a file is no encoder or decoder of the published sizes.
    """
    for name, expected in (("encoder.pkl", Encoder), ("decoder.pkl", Decoder)):
        published = base_url == OPENAI_URL
        verify = partial(_verify_half, expected=expected, published=published)
        download(base_url.rstrip("/") + "/" + name, Path(directory) / name, verify=verify)
        logger.info("%s is in %s", name, directory)


def _verify_half(file: Path, expected: type[Encoder] | type[Decoder], published: bool) -> None:
    """Raises an :class:`InputError` unless ``file`` opens as what it should be."""
    model = _load_half(file, expected)
    if not published:
        return
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in expected().state_dict().items()}
    if {name: tuple(value.shape) for name, value in model.state_dict().items()} != wanted:
        raise InputError(f"{file.name} does not have the sizes of the published {expected.__name__.lower()}")
