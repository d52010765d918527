"""OpenAI's DALL-E tokenizer, with which the published models were pre-trained."""

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from beit.errors import InputError
from beit.storage import check_recorded_hash, download, weights_fingerprint
from beit.tokenizers.base import LogitTokenizer

try:
    from dall_e import Decoder, Encoder, ModelFileError, load_model, map_pixels, unmap_pixels
    from dall_e.utils import ResidualBlock
except ImportError as error:
    problem = f"the package dall_e is not the one that belongs to beit, as after `pip install DALL-E` ({error})"
    raise InputError(f"{problem}: `pip uninstall DALL-E`, and install beit anew") from error

logger = logging.getLogger(__name__)

Half = TypeVar("Half", bound=Encoder | Decoder)
OPENAI_URL = "https://cdn.openai.com/dall-e/"


class DallETokenizer(LogitTokenizer):
    """The tokenizer of the published models; it loads the decoder at the first :meth:`decode`, not for pre-training."""

    def __init__(
        self,
        encoder: Encoder,
        load_decoder: Callable[[], Decoder],
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        super().__init__(encoder.vocab_size, 2 ** (encoder.group_count - 1), compiled)
        self._fingerprint = weights_fingerprint(encoder)  # of what the file has, whatever ``dtype`` makes of it
        encoder.use_mixed_precision = False  # the weights are in ``dtype`` already and need no cast per call
        # bfloat16's 8 bits are too few for the shortcuts, which carry the sum over all blocks; the branches are 93 % of
        # the operations anyway. float16 is enough for both, as in the released modules.
        blocks = [block for block in encoder.modules() if isinstance(block, ResidualBlock)]
        for part in [block.res_path for block in blocks] if dtype == torch.bfloat16 else [encoder.blocks[:-1]]:
            part.to(dtype)
        for block in blocks:
            block.overwrites_input = True
        self.encoder = encoder.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.decoder: Decoder | None = None
        self._load_decoder = load_decoder
        self.train()

    def fingerprint(self) -> str:
        """Returns a hash of the encoder's weights; the decoder decides nothing about tokens."""
        return self._fingerprint

    def features(self, images: Tensor) -> Tensor:
        return self.encoder.features(map_pixels(images))

    def head(self) -> tuple[Tensor, Tensor]:
        return self.encoder.head.w, self.encoder.head.b

    def reconstruct(self, ids: Tensor) -> Tensor:
        if self.decoder is None:
            decoder = self._load_decoder()
            if decoder.vocab_size != self.vocab_size:
                raise InputError(
                    f"the decoder has {decoder.vocab_size} tokens and the encoder {self.vocab_size}: not a pair"
                )
            decoder.use_mixed_precision = False
            self.decoder = decoder.requires_grad_(False).eval().to(self.encoder.head.w.device)
        one_hot = F.one_hot(ids, self.vocab_size).permute(0, 3, 1, 2).float()  # (B, vocab, h, w)
        return unmap_pixels(self.decoder(one_hot)[:, :3].sigmoid())


def open_dall_e(path: Path, dtype: torch.dtype, compiled: bool) -> DallETokenizer:
    """Opens the tokenizer in a folder, or that of an encoder's file; see :func:`beit.load_tokenizer`."""
    folder = path if path.is_dir() else path.parent
    encoder = _load_half(_find_half(folder, "encoder") if path.is_dir() else path, Encoder)
    return DallETokenizer(encoder, lambda: _load_half(_find_half(folder, "decoder"), Decoder), dtype, compiled)


def _find_half(folder: Path, name: str) -> Path:
    for file in (folder / f"{name}.safetensors", folder / f"{name}.pkl"):
        if file.is_file():
            return file
    hint = "; give --discrete_vae_type customized" if (folder / "pytorch_model.bin").is_file() else ""
    found = ", ".join(sorted(os.listdir(folder))[:8]) or "nothing"
    raise InputError(f"{folder} has neither {name}.pkl nor {name}.safetensors (found: {found}){hint}")


def _load_half(file: Path, expected: type[Half]) -> Half:
    """Opens an encoder or a decoder, after checking the hash recorded when it was downloaded, if there is one."""
    if file.with_name(file.name + ".sha256").exists():
        check_recorded_hash(file)
    try:
        model = load_model(file)
    except ModelFileError as error:
        raise InputError(str(error)) from error
    if not isinstance(model, expected):
        raise InputError(f"{file} holds the {type(model).__name__.lower()}, not the {expected.__name__.lower()}")
    return model


def download_tokenizer(directory: str | os.PathLike[str], base_url: str = OPENAI_URL) -> None:
    """Downloads ``encoder.pkl`` and ``decoder.pkl`` of the published tokenizer, unless they are there.

    No hashes were published, so a new file is verified by opening it and comparing names and shapes, and its hash is
    recorded for later checks. Shapes are compared for the default address only; others may have other models.

    Raises:
        InputError: See :func:`beit.storage.download`; or a file is not an encoder or decoder of the published sizes.
    """
    for name, expected in (("encoder.pkl", Encoder), ("decoder.pkl", Decoder)):
        verify = partial(_verify_half, expected=expected, published=base_url == OPENAI_URL)
        download(base_url.rstrip("/") + "/" + name, Path(directory) / name, verify=verify)
        logger.info("%s is in %s", name, directory)


def _verify_half(file: Path, expected: type[Encoder] | type[Decoder], published: bool) -> None:
    """Raises an :class:`InputError` unless ``file`` is an encoder or a decoder, of the published sizes if asked."""
    found = _load_half(file, expected).state_dict()
    with torch.device("meta"):
        wanted = expected().state_dict() if published else found
    if {name: value.shape for name, value in found.items()} != {name: value.shape for name, value in wanted.items()}:
        raise InputError(f"{file.name} does not have the sizes of the published {expected.__name__.lower()}")
