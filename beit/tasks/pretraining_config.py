"""The flags of pre-training, and which of them go without effect beside others."""

import logging
from dataclasses import dataclass
from typing import Any

from beit.config import Size, option
from beit.tasks.options import AMP_CHOICES, OptimizerOptions, RunOptions, ShardingOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainingConfig(RunOptions, OptimizerOptions, ShardingOptions):
    """The flags of ``run_beit_pretraining.py``; every official one, with its official default."""

    model: str = option("beit_base_patch16_224_8k_vocab", "model name; `beit models` lists them")
    model_kwargs: dict[str, Any] | None = option(
        None, "more of the model's constructor, such as patch_size=8 embed_dim=128"
    )
    init_from: str = option(
        "", "checkpoint whose weights the model starts with: file, released name, address or hub id"
    )
    rel_pos_bias: bool = option(True, "relative position bias, shared by all blocks", off="--disable_rel_pos_bias")
    abs_pos_emb: bool = option(False, "learned absolute position embeddings")
    layer_scale_init_value: float = option(0.1, "initial LayerScale: 0.1 for base, 1e-5 for large, 0 for none")
    drop_path: float = option(0.1, "stochastic depth rate of the last block; grows linearly with depth")
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass, to save memory")
    compile: bool = option(False, "compile the model for training; takes minutes to begin")

    target: str = option("tokens", "what is predicted of a patch", choices=("tokens", "pixels"))
    pixel_norm: bool = option(
        True, "for --target pixels: predict them less their patch's mean, over its standard deviation"
    )
    predict: str = option("masked", "which patches are predicted in training", choices=("masked", "all"))

    discrete_vae_weight_path: str | None = option(None, "folder of the tokenizer")
    discrete_vae_type: str = option("dall-e", "kind of tokenizer: dall-e or customized")
    second_input_size: Size = option(112, "size of the tokenizer's view, in pixels (HEIGHTxWIDTH or one number)")
    second_interpolation: str = option("lanczos", "interpolation of the tokenizer's view")
    tokenizer_dtype: str = option(
        "auto", "number format of the tokenizer's encoder; its logits are float32 in any case", choices=AMP_CHOICES
    )
    tokenizer_compile: bool = option(False, "compile the tokenizer's encoder; takes a minute to begin")
    tokenizer_stream: bool = option(
        False,
        "compute the tokens of the next batch beside the training step, on a CUDA stream of their own; beginning with "
        "it counts as waiting for data",
    )

    mask_strategy: str = option(
        "block", "mask blocks of patches, or single patches at random", choices=("block", "random")
    )
    num_mask_patches: int = option(75, "most patches masked in an image; with --mask_strategy random exactly so many")
    max_mask_patches_per_block: int | None = option(None, "largest masked block, in patches; no limit by default")
    min_mask_patches_per_block: int = option(16, "smallest masked block, in patches")

    data_path: str = option(
        "/datasets01/imagenet_full_size/061417/", "folder of images, text file of paths, or shards-{000..127}.tar"
    )
    eval_data_path: str | None = option(None, "held-out images to score masked-token prediction on, after epochs")
    eval_freq: int = option(1, "epochs between two evaluations")
    log_images: int = option(
        0, "images whose reconstructions go to --log_dir after each epoch: of --eval_data_path, else of --data_path"
    )
    input_size: Size = option(224, "size of the model's view, in pixels (HEIGHTxWIDTH or one number)")
    train_interpolation: str = option("bicubic", "interpolation of the model's view")
    color_jitter: float = option(0.4, "strength of brightness, contrast and saturation jitter")
    imagenet_default_mean_and_std: bool = option(False, "normalise with ImageNet's mean and std instead of 0.5")
    fast_decode: bool = option(
        False, "decode JPEG files at a reduced scale where the views show no more; changes pixels"
    )
    max_unreadable: int | None = option(
        None, "unreadable images that end the run; 1 % of them, at least 10, by default"
    )

    batch_size: int = option(64, "images per process and batch")
    epochs: int = option(300, "passes over the data")
    opt_betas: tuple[float, ...] | None = option((0.9, 0.999), "decay rates of Adam")


def announce_flags_without_effect(config: PretrainingConfig, own_target: bool) -> None:
    """Says which of the flags given can have no effect together with the others.

    Args:
        config: The flags.
        own_target: Whether the target is not that of ``--target``: what such a target reads is not known here.
    """
    if config.mask_strategy == "random":
        _say_unused(config, "mask_strategy", "min_mask_patches_per_block", "max_mask_patches_per_block")
    if own_target:
        return
    if config.target == "tokens":
        _say_unused(config, "target", "pixel_norm")
    else:
        tokenizer = ("discrete_vae_weight_path", "discrete_vae_type", "tokenizer_dtype", "tokenizer_compile")
        _say_unused(config, "target", *tokenizer, "second_input_size", "second_interpolation")


def _say_unused(config: PretrainingConfig, because: str, *names: str) -> None:
    default = PretrainingConfig()
    given = [f"--{name}" for name in names if getattr(config, name) != getattr(default, name)]
    if given:
        logger.warning("without effect beside --%s %s: %s", because, getattr(config, because), ", ".join(given))
