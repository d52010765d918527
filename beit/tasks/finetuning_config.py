"""The flags of fine-tuning for classification, and what cannot be asked for."""

from dataclasses import dataclass
from typing import Any

from beit.config import Size, option
from beit.data.classification import DATA_SETS
from beit.errors import InputError
from beit.tasks.options import OptimizerOptions, RunOptions, ShardingOptions, check_sharding, check_training

MIXUP_MODES = ("batch", "pair", "elem")


@dataclass(frozen=True)
class FinetuningConfig(RunOptions, OptimizerOptions, ShardingOptions):
    """The flags of ``run_class_finetuning.py``; every official one, with its official default."""

    model: str = option("beit_base_patch16_224", "model name; `beit models` lists them")
    model_kwargs: dict[str, Any] | None = option(
        None, "more of the model's constructor, such as patch_size=8 embed_dim=128"
    )
    rel_pos_bias: bool = option(True, "relative position bias in every block", off="--disable_rel_pos_bias")
    abs_pos_emb: bool = option(False, "learned absolute position embeddings")
    layer_scale_init_value: float = option(0.1, "initial LayerScale: 0.1 for base, 1e-5 for large, 0 for none")
    input_size: Size = option(224, "size of the images, in pixels (HEIGHTxWIDTH or one number); sets the model's size")
    drop: float = option(0.0, "dropout of tokens and branches")
    attn_drop_rate: float = option(0.0, "dropout of the attention probabilities")
    drop_path: float = option(0.1, "stochastic depth rate of the last block; grows linearly with depth")
    use_mean_pooling: bool = option(True, "classify the mean of the patch tokens, not the class token", off="--use_cls")
    init_scale: float = option(0.001, "factor on the new head's initial weights")
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass, to save memory")
    compile: bool = option(False, "compile the model for training; takes minutes to begin")

    finetune: str = option("", "checkpoint to start from: a path, a released name, a URL or a hub id")
    model_key: str = option("model|module", "where a checkpoint has its weights; the first key found")
    model_prefix: str = option("", "what the names of a checkpoint's weights begin with")
    model_ema: bool = option(False, "keep a moving average of the weights, and evaluate it too")
    model_ema_decay: float = option(0.9999, "decay of the moving average")
    model_ema_force_cpu: bool = option(False, "keep the moving average in host memory")

    data_set: str = option("IMNET", "kind of data; CIFAR is CIFAR-100", choices=DATA_SETS)
    data_path: str = option("/datasets01/imagenet_full_size/061417/", "folder of the data")
    eval_data_path: str | None = option(None, "folder of validation images, for --data_set image_folder")
    download_data: bool = option(False, "fetch CIFAR where it is missing")
    nb_classes: int = option(0, "classes that must be found; 0 takes what is there")
    imagenet_default_mean_and_std: bool = option(False, "normalise with ImageNet's mean and std instead of 0.5")
    max_unreadable: int | None = option(
        None, "unreadable images that end the run; 1 % of them, at least 10, by default"
    )
    batch_size: int = option(64, "images per process and batch")
    epochs: int = option(30, "passes over the data")
    save_ckpt_freq: int = option(5, "epochs between two checkpoint-<epoch>.pth")
    save_ckpt: bool = option(True, "write checkpoints", off="--no_save_ckpt")
    min_lr: float = option(1e-6, "learning rate at the end of the cosine")
    layer_decay: float = option(0.9, "factor on the learning rate from one layer to the one below")
    disable_weight_decay_on_rel_pos_bias: bool = option(False, "no weight decay on relative position bias tables")

    color_jitter: float = option(0.4, "brightness, contrast and saturation jitter; only without --aa")
    aa: str = option("rand-m9-mstd0.5-inc1", "augmentation policy, by timm's name; none for none")
    train_interpolation: str = option("bicubic", "interpolation of training images")
    crop_pct: float | None = option(None, "share of the shorter side shown at evaluation; 0.875, from 384 pixels on 1")
    smoothing: float = option(0.1, "label smoothing")
    reprob: float = option(0.25, "probability of random erasing")
    remode: str = option("pixel", "what is put in place: pixel (noise), rand (a colour) or const")
    recount: int = option(1, "most rectangles erased in an image")
    resplit: bool = option(False, "unused", no_effect="random erasing has no clean split of a batch here")
    mixup: float = option(0.0, "alpha of mixup; 0 for none")
    cutmix: float = option(0.0, "alpha of cutmix; 0 for none")
    cutmix_minmax: tuple[float, ...] | None = option(None, "smallest and largest share of a side cut; overrides alpha")
    mixup_prob: float = option(1.0, "probability of mixing a batch, if there is mixup or cutmix")
    mixup_switch_prob: float = option(0.5, "probability of cutmix rather than mixup, where there are both")
    mixup_mode: str = option("batch", "what shares a mixing ratio: batch, pair or elem")

    disable_eval_during_finetuning: bool = option(False, "do not evaluate, and need no validation images")
    eval: bool = option(False, "evaluate only: --resume, else the newest checkpoint in --output_dir")
    dist_eval: bool = option(False, "unused", no_effect="processes always share an evaluation, each image counts once")


def check_settings(config: FinetuningConfig) -> None:
    """Raises :class:`InputError` for the first setting that cannot be used."""
    check_training(config)
    check_sharding(config)
    if not 0 <= config.smoothing < 1:
        raise InputError(f"--smoothing {config.smoothing}: must be at least 0 and below 1")
    if not 0 < config.layer_decay <= 1:
        raise InputError(f"--layer_decay {config.layer_decay}: must be above 0 and at most 1")
    if config.nb_classes < 0:
        raise InputError(f"--nb_classes {config.nb_classes}: must be 0 (as many as there are) or more")
    if config.mixup_mode not in MIXUP_MODES:
        raise InputError(f"--mixup_mode {config.mixup_mode}: choose {', '.join(MIXUP_MODES)}")
    shares = config.cutmix_minmax
    if shares is not None and not (len(shares) == 2 and 0 <= shares[0] <= shares[1] <= 1):
        raise InputError("--cutmix_minmax takes two numbers from 0 to 1, the smallest and the largest share of a side")
    for name in ("mixup_prob", "mixup_switch_prob"):
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(f"--{name} {getattr(config, name)}: a probability is between 0 and 1")
    if mixes(config) and config.batch_size % 2:
        raise InputError(f"--batch_size {config.batch_size}: mixup and cutmix pair images up, so it must be even")


def mixes(config: FinetuningConfig) -> bool:
    """Whether images are mixed with each other."""
    return config.mixup > 0 or config.cutmix > 0 or config.cutmix_minmax is not None
