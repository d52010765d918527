"""Small jobs of the console command: what there is, and what to fetch."""

import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch.utils.flop_counter import FlopCounterMode

from beit.checkpoints.load import RELEASED
from beit.config import option
from beit.data.index import index_images
from beit.errors import InputError, did_you_mean
from beit.tokenizers.dalle import download_tokenizer
from beit.zoo import create_model, list_models


@dataclass(frozen=True)
class DownloadTokenizerConfig:
    """The arguments of ``beit download tokenizer``."""

    directory: str = option("", "folder for the two files; they are fetched once", positional=True)


def download(config: DownloadTokenizerConfig) -> None:
    """Fetches OpenAI's tokenizer; the folder is then a ``--discrete_vae_weight_path``."""
    download_tokenizer(config.directory)


@dataclass(frozen=True)
class IndexConfig:
    """The arguments of ``beit index``."""

    data_path: str = option("", "folder of images, text file of paths, or shards-{000..127}.tar", positional=True)


def print_index(config: IndexConfig) -> None:
    """Lists images, which the runs that follow need not do: with several processes, all would wait for one.

    Raises:
        InputError: There are none.
    """
    sys.stdout.write(f"{len(index_images(config.data_path)):,} images in {config.data_path}; runs start at once now\n")


@dataclass(frozen=True)
class ModelsConfig:
    """The arguments of ``beit models``."""

    pattern: str = option("*", "names to list, such as '*_8k_vocab'")


def print_models(config: ModelsConfig) -> None:
    """Writes models with parameters and cost of an image, then the released checkpoints, to standard output.

    Raises:
        InputError: No name matches.
    """
    names = list_models(config.pattern)
    released = [row for name, row in RELEASED.items() if fnmatchcase(name, config.pattern)]
    if not names and not released:
        known = [*list_models(), *RELEASED]
        raise InputError(f"no model matches {config.pattern!r}{did_you_mean(config.pattern, known)}")
    width = max(len(name) for name in (*names, *(row.name for row in released)))
    for name in names:
        parameters, flops = measure(name)
        sys.stdout.write(f"{name:<{width}}  {parameters:>13,} parameters  {flops / 1e9:6.1f} GFLOPs\n")
    if released:
        sys.stdout.write("\nreleased checkpoints (for --finetune, --init_from, pretrained=, beit convert, ...):\n")
    for row in released:
        kind = "pre-trained" if row.num_classes is None else f"{row.num_classes:,} classes"
        sys.stdout.write(f"{row.name:<{width}}  {kind:>14}, {row.input_size} px, of {row.model}\n")


def measure(name: str) -> tuple[int, int]:
    """Returns how many numbers a model learns, and the multiply-adds that its backbone takes for one image.

    The field calls the second number FLOPs. The model is built without memory for its weights.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = create_model(name)
        model.forward_features(torch.empty(1, 3, *model.img_size))  # type: ignore[operator]
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2
