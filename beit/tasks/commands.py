"""Small jobs of the console command: what there is, and what to fetch."""

import sys
from dataclasses import dataclass

import torch

from beit.config import option
from beit.errors import InputError, did_you_mean
from beit.tokenizer import download_tokenizer
from beit.zoo import create_model, list_models


@dataclass(frozen=True)
class DownloadTokenizerConfig:
    """The arguments of ``beit download tokenizer``."""

    directory: str = option("", "folder for the two files; they are fetched once", positional=True)


def download(config: DownloadTokenizerConfig) -> None:
    """Fetches OpenAI's tokenizer; the folder is then a ``--discrete_vae_weight_path``."""
    download_tokenizer(config.directory)


@dataclass(frozen=True)
class ModelsConfig:
    """The arguments of ``beit models``."""

    pattern: str = option("*", "names to list, such as '*_8k_vocab'")


def print_models(config: ModelsConfig) -> None:
    """Writes the names of the models and their parameter counts to standard output.

    Raises:
        InputError: No name matches.
    """
    names = list_models(config.pattern)
    if not names:
        raise InputError(f"no model matches {config.pattern!r}{did_you_mean(config.pattern, list_models())}")
    width = max(map(len, names))
    sys.stdout.writelines(f"{name:<{width}}  {count_parameters(name):>13,} parameters\n" for name in names)


def count_parameters(name: str) -> int:
    """Returns how many numbers a model learns; builds it without memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in create_model(name).parameters())
