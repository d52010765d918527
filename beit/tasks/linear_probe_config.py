"""The flags of the linear probe, and what cannot be asked for."""

from dataclasses import dataclass
from typing import Any

from beit.config import Size, option
from beit.data.classification import DATA_SETS
from beit.errors import InputError
from beit.tasks.options import RunOptions, check_positive

AUTO = "auto"
OFFICIAL_NUM_LABELS = 1000


@dataclass(frozen=True)
class LinearProbeConfig(RunOptions):
    """The flags of ``run_linear_eval.py``; every official one, with its official default."""

    model: str = option("beit_base_patch16_224", "model name, or auto: the one that --pretrained_weights is of")
    model_kwargs: dict[str, Any] | None = option(
        None, "more of the model's constructor, such as patch_size=8 embed_dim=128"
    )
    rel_pos_bias: bool = option(True, "relative position bias in every block", off="--disable_rel_pos_bias")
    abs_pos_emb: bool = option(False, "learned absolute position embeddings")
    layer_scale_init_value: float = option(0.1, "LayerScale: 0.1 for base, 1e-5 for large, 0 for none")
    patch_size: int = option(16, "size of a patch, in pixels")
    input_size: Size | None = option(
        None, "size of the images, in pixels (HEIGHTxWIDTH or one number); the model's own"
    )
    pretrained_weights: str = option(
        "", "checkpoint of the backbone, pre-trained or fine-tuned: a path, a released name, a URL or a hub id"
    )
    checkpoint_key: str = option("model|module|teacher", "where the checkpoint has its weights; the first key found")

    avgpool_patchtokens: bool = option(
        True,
        "features are the class token and the mean of the patch tokens, not the class token alone",
    )
    pool: tuple[str, ...] = option((), "one head for each of these instead: cls, mean, cls_mean")
    layers: tuple[int, ...] = option((), "blocks to probe, from 0 on; all by default")

    data_set: str = option("IMNET", "kind of data; CIFAR is CIFAR-100", choices=DATA_SETS)
    data_path: str = option("/path/to/imagenet/", "folder of the data")
    eval_data_path: str | None = option(None, "folder of validation images, for --data_set image_folder")
    num_labels: int = option(OFFICIAL_NUM_LABELS, "classes that must be found; 0, and the default, take what is there")
    imagenet_default_mean_and_std: bool = option(False, "normalise with ImageNet's mean and std instead of 0.5")
    train_interpolation: str = option("bilinear", "interpolation of training images")
    crop_pct: float | None = option(None, "share of the shorter side shown at evaluation; 0.875, from 384 pixels on 1")
    max_unreadable: int | None = option(
        None, "unreadable images that end the run; 1 % of them, at least 10, by default"
    )

    batch_size_per_gpu: int = option(128, "images per process and batch")
    update_freq: int = option(1, "batches whose gradients are added up for one optimizer step")
    epochs: int = option(100, "passes over the data")
    optimizer: str = option("adamw", "optimizer: any name that timm knows")
    lr: float | None = option(None, "peak learning rate; --base_lr in proportion to the batch by default")
    base_lr: float = option(0.001, "learning rate of a batch of 256 images, in all processes together")
    weight_decay: float | None = option(None, "weight decay of the heads; 1e-4 by default, with sgd 0")
    min_lr: float = option(0.0, "learning rate at the end of the cosine")
    val_freq: int = option(1, "epochs between two evaluations")
    amp_forward: bool = option(True, "run the backbone in mixed precision (--amp_dtype), on a GPU")
    output_dir: str = option(".", "folder for checkpoints and log.txt; empty writes nothing")
    local_rank: int = option(0, "GPU of this process, as old launchers pass it; LOCAL_RANK wins")


def check_settings(config: LinearProbeConfig) -> None:
    """Raises :class:`InputError` for the first setting that cannot be used."""
    check_positive(
        config, "batch_size_per_gpu", "epochs", "update_freq", "log_every", "save_ckpt_freq", "val_freq", "patch_size"
    )
    if config.num_labels < 0:
        raise InputError(f"--num_labels {config.num_labels}: must be 0 (as many as there are) or more")
