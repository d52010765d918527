"""Small images, a small tokenizer and small settings, to run whole commands as a user does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit.tokenizers.dvae import DiscreteVAE, save_dvae

# Sizes of a model that trains in seconds. 32 pixels in 8-pixel patches are a 4 x 4 grid, for model and tokenizer alike.
SMALL_MODEL = (
    *("--model", "beit_tiny_patch16_224_8k_vocab", "--model_kwargs", "patch_size=8", "embed_dim=32", "depth=2"),
    *("num_heads=2", "--input_size", "32", "--second_input_size", "32", "--discrete_vae_type", "customized"),
    *("--num_mask_patches", "6", "--min_mask_patches_per_block", "2"),
)
SMALL_RUN = ("--device", "cpu", "--num_workers", "0", "--batch_size", "8", "--epochs", "3", "--warmup_epochs", "1")


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """40 small JPEGs, smooth enough that neighbouring patches tell of each other."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(40):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((60, 48), Image.Resampling.BICUBIC).save(folder / f"{number:02}.jpg")
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    """A tokenizer of 16 tokens with random weights."""
    folder = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    save_dvae(folder, DiscreteVAE(image_size=32, num_tokens=16, codebook_dim=8, num_layers=3, hidden_dim=8))
    return folder


@pytest.fixture(scope="session")
def pretraining_flags(images, tokenizer) -> tuple[str, ...]:
    """Flags of a pre-training run of 3 epochs of 5 steps; the output folder is missing."""
    data = ("--data_path", str(images), "--discrete_vae_weight_path", str(tokenizer))
    return (*SMALL_MODEL, *SMALL_RUN, *data)
