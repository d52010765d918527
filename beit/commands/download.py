"""``beit download tokenizer`` and ``beit index``: what takes time once, before many runs."""

import sys

from beit.commands.settings import DownloadTokenizerConfig, IndexConfig
from beit.data.index import index_images
from beit.tokenizers.dalle import download_tokenizer


def download(config: DownloadTokenizerConfig) -> None:
    """Downloads OpenAI's tokenizer into a folder that serves as ``--discrete_vae_weight_path``."""
    download_tokenizer(config.output_dir)


def print_index(config: IndexConfig) -> None:
    """Lists images and caches the list, so that later runs start at once; raises InputError if there are none."""
    sys.stdout.write(f"{len(index_images(config.data_path)):,} images in {config.data_path}; runs start at once now\n")
