"""The settings of every training job: flags, YAML keys and defaults, in groups that jobs share. Imports no torch."""

import os
from dataclasses import dataclass
from typing import Any, ClassVar

from beit.config import Size, option
from beit.errors import InputError
from beit.registry import MASK_STRATEGIES, TARGETS, TOKENIZERS, TRACKERS
from beit.training.placement import PATIENCE

AMP_CHOICES = ("auto", "bf16", "fp16", "fp32")
DATA_SETS = ("CIFAR", "IMNET", "image_folder", "CIFAR10")  # the first three have their official names
VARIANTS = ("imagenet_r", "imagenet_a")  # as timm names the lists of their classes
IMAGENET_FOLDER = "/datasets01/imagenet_full_size/061417/"  # the official default
AUTO = "auto"
IMAGES = "folder of images, text file of paths, shards-{000..127}.tar, or hf:NAME_OR_FOLDER[:SPLIT]"
ANY_MODEL = "file, folder (such as a run's), released name, URL or hub id"
OFFICIAL_NUM_LABELS = 1000  # the official default of the probe, which stands for "as many as there are"

# Optimizers whose step treats each number alone, so that it can be taken on any part of a tensor, or of many at once;
# --shard fsdp also has norms, which PyTorch takes over all parts of a tensor.
ELEMENTWISE_OPTIMIZERS = ("adamw", "adam", "nadamw", "sgd", "momentum", "lion", "adan")
SHARDABLE_OPTIMIZERS = ("adamw", "adam", "nadamw", "sgd", "momentum", "lamb", "lion")
NO_MODEL_KWARGS = {  # arguments of a model that a job sets, and from what
    "img_size": "the size of the images sets it",
    "num_classes": "the data set it",
    "vocab_size": "the target sets it",
    "in_chans": "--in_chans sets it",
}
NOT_WITH_FSDP = {  # flags that --shard fsdp cannot go with, and why
    "enable_deepspeed": "both shard the training state",
    "compile": "it makes one graph of what is gathered block by block",
    "log_images": "the pictures are drawn by one process, which holds only a part of the model",
    "model_ema_force_cpu": "the average is sharded like the weights",
}


@dataclass(frozen=True)
class RunOptions:
    """Where a run computes, what it writes and how it is resumed."""

    GROUP: ClassVar[str] = "run"
    output_dir: str = option("", "folder for checkpoints and log.txt; empty writes nothing")
    log_dir: str | None = option(None, "folder for TensorBoard")
    report_to: tuple[str, ...] = option((), "what shows the run besides TensorBoard in --log_dir", choices=TRACKERS)
    device: str = option("cuda", "cuda, cpu or mps; the CPU where there is no CUDA")
    seed: int = option(0, "random seed", within="[0, inf)")
    resume: str = option("", "checkpoint to resume from")
    auto_resume: bool = option(True, "resume from the newest checkpoint in --output_dir", off="--no_auto_resume")
    save_ckpt_steps: int = option(1000, "steps between writes of checkpoint-last.pth; 0 for never", within="[0, inf)")
    keep_checkpoints: int = option(0, "numbered checkpoints to keep; 0 keeps all", within="[0, inf)")
    amp_dtype: str = option("auto", "number format of forward and backward", choices=AMP_CHOICES)
    deterministic: bool = option(False, "deterministic GPU kernels where there are any (slower)")
    log_every: int = option(10, "steps between console lines", within="[1, inf)")
    world_size: int = option(1, "number of processes", no_effect="the launcher sets the number of processes")
    local_rank: int = option(-1, "GPU of this process, as old launchers pass it; LOCAL_RANK wins")
    dist_on_itp: bool = option(False, "the processes were started by Open MPI's mpirun")
    dist_url: str = option("env://", "where the processes meet")
    dist_timeout: float = option(PATIENCE, "minutes to wait for a process that does not answer", within="(0, inf)")


@dataclass(frozen=True)
class BatchOptions:
    """How many images make a step."""

    GROUP: ClassVar[str] = "batch"
    batch_size: int = option(64, "images per process and batch", within="[1, inf)")
    update_freq: int = option(1, "batches whose gradients are accumulated for one step", within="[1, inf)")
    total_batch_size: int = option(
        0,
        "images per step over all processes; sets --update_freq, with at most --batch_size per process; 0 sets nothing",
        within="[0, inf)",
        yields_to="update_freq",
    )


@dataclass(frozen=True)
class EpochOptions:
    """How long a run is, in passes over the data."""

    GROUP: ClassVar[str] = "schedule"
    epochs: int = option(300, "passes over the data", within="[1, inf)")
    start_epoch: int = option(0, "epoch to start with when nothing is resumed, from 0", within="[0, inf)")
    eval_freq: int = option(1, "epochs between evaluations", within="[1, inf)")
    save_ckpt_freq: int = option(20, "epochs between checkpoint-<epoch>.pth", within="[1, inf)")


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and the schedules of learning rate and weight decay."""

    GROUP: ClassVar[str] = "optimizer"
    opt: str = option("adamw", "optimizer: any name that timm knows, or fusedadamw")
    opt_eps: float = option(1e-8, "epsilon of Adam", within="[0, inf)")
    opt_betas: tuple[float, ...] | None = option(None, "decay rates of Adam", within="[0, 1)")
    clip_grad: float | None = option(None, "largest gradient norm; no clipping by default", within="(0, inf)")
    momentum: float = option(0.9, "momentum of SGD", within="[0, 1)")
    weight_decay: float = option(0.05, "weight decay", within="[0, inf)")
    lr: float = option(5e-4, "peak learning rate; never rescaled to the batch", within="[0, inf)")
    min_lr: float = option(1e-5, "learning rate at the end of the schedule", within="[0, inf)")


@dataclass(frozen=True)
class CosineOptions(OptimizerOptions):
    """The schedules of jobs that count epochs."""

    weight_decay_end: float | None = option(None, "weight decay at the end; constant by default", within="[0, inf)")
    warmup_lr: float = option(1e-6, "unused", no_effect="the warm-up starts at 0, as in the official schedule")
    warmup_epochs: int = option(5, "epochs of linear warm-up", within="[0, inf)")
    warmup_steps: int = option(-1, "steps of linear warm-up; overrides --warmup_epochs when positive")


@dataclass(frozen=True)
class ShardingOptions:
    """How processes split the training state."""

    GROUP: ClassVar[str] = "sharding"
    shard: str = option(
        "none",
        "fsdp: each process holds a part of weights, gradients (with --update_freq 1) and optimizer state; checkpoints "
        "are folders that all processes must see, and any number of processes, or none with --shard, can resume them",
        choices=("none", "fsdp"),
    )
    enable_deepspeed: bool = option(False, "train with DeepSpeed (the extra deepspeed)")
    zero_stage: int = option(0, "what DeepSpeed shards: 0 nothing, 1 optimizer state, 2 gradients too", within="[0, 2]")


def check_sharding(config: ShardingOptions, opt: str) -> None:
    """Raises :class:`InputError` for flags that do not go with ``--shard``, or an optimizer that cannot be split."""
    for name, reason in NOT_WITH_FSDP.items() if config.shard != "none" else ():
        if getattr(config, name, False):
            raise InputError(f"--{name} does not go with --shard fsdp: {reason}; leave one of them out")
    split, works = f"--shard {config.shard}", SHARDABLE_OPTIMIZERS
    if config.enable_deepspeed and config.zero_stage:  # on each process, a group of parameters is one long vector
        split, works = f"--zero_stage {config.zero_stage}", ELEMENTWISE_OPTIMIZERS
    elif config.shard == "none":
        return
    if opt.lower().removeprefix("fused") not in works:
        raise InputError(f"--opt {opt} is not known to work in parts: with {split} choose one of {', '.join(works)}")


def check_job(config: RunOptions) -> None:
    """Raises :class:`InputError` for settings that do not work together in any job; each alone is checked already."""
    if isinstance(config, OptimizerOptions) and config.opt_betas is not None and len(config.opt_betas) != 2:
        raise InputError(f"--opt_betas {' '.join(map(str, config.opt_betas))}: must be two numbers")
    if taken := next((name for name in getattr(config, "model_kwargs", None) or {} if name in NO_MODEL_KWARGS), ""):
        raise InputError(f"--model_kwargs {taken}: {NO_MODEL_KWARGS[taken]}; leave it out")
    if isinstance(config, ShardingOptions):
        check_sharding(config, getattr(config, "opt", ""))
    if (
        isinstance(config, DataOptions)
        and config.data_path == type(config).data_path  # where the official authors have it
        and not os.path.exists(config.data_path)
    ):
        raise InputError("--data_path is missing: give the folder of your images, or what else --help names")


@dataclass(frozen=True)
class ModelOptions:
    """The backbone."""

    GROUP: ClassVar[str] = "model"
    model: str = option("beit_base_patch16_224", "model name; `beit models` lists them")
    model_kwargs: dict[str, Any] | None = option(None, "more of its arguments, such as patch_size=8 embed_dim=128")
    model_key: str = option("model|module", "where a checkpoint has its weights; the first key found")
    model_prefix: str = option("", "prefix of the names of a checkpoint's weights")
    rel_pos_bias: bool = option(True, "relative position bias", off="--disable_rel_pos_bias")
    abs_pos_emb: bool = option(False, "learned absolute position embeddings")
    layer_scale_init_value: float = option(0.1, "LayerScale: base 0.1, large 1e-5, none 0", within="[0, inf)")


@dataclass(frozen=True)
class TrainedModelOptions(ModelOptions):
    """The backbone, where it is trained."""

    init_from: str = option("", f"checkpoint to start from: {ANY_MODEL}")
    drop_path: float = option(0.1, "stochastic depth rate of the last block, linear in depth", within="[0, 1)")
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass, to save memory")


@dataclass(frozen=True)
class LoadingOptions:
    """How images are read."""

    GROUP: ClassVar[str] = "data"
    num_workers: int = option(10, "data-loading workers per process", within="[0, inf)")
    pin_mem: bool = option(True, "page-locked host memory for faster transfers to a GPU", off="--no_pin_mem")
    max_unreadable: int | None = option(None, "unreadable images to tolerate; 1 %, at least 10", within="[0, inf)")


@dataclass(frozen=True)
class DataOptions(LoadingOptions):
    """Images."""

    data_path: str = option(IMAGENET_FOLDER, IMAGES)
    eval_data_path: str | None = option(None, "held-out images to evaluate on")


@dataclass(frozen=True)
class ChannelOptions:
    """The channels of the images."""

    GROUP: ClassVar[str] = "data"
    in_chans: int = option(3, "channels of the images; others than 3 keep all their bits", within="[1, inf)")
    imagenet_default_mean_and_std: bool = option(False, "normalise with ImageNet's mean and std instead of 0.5")
    mean: tuple[float, ...] | None = option(None, "mean of each channel, or of all, for images in [0, 1]")
    std: tuple[float, ...] | None = option(None, "standard deviation, likewise", within="(0, inf)")


@dataclass(frozen=True)
class LabelledDataOptions(ChannelOptions, DataOptions):
    """Images with classes."""

    data_path: str = option(IMAGENET_FOLDER, "folder of the data, for IMNET the one with train and val; or hf:NAME")
    eval_data_path: str | None = option(None, "folder of validation images, for --data_set image_folder")
    data_set: str = option("IMNET", "kind of data set; CIFAR is CIFAR-100", choices=DATA_SETS)
    nb_classes: int = option(0, "classes that must be found; 0 takes what is there", within="[0, inf)")
    train_interpolation: str = option("bicubic", "interpolation of training images")
    crop_pct: float | None = option(None, "crop at evaluation; 0.875 by default, 1 from 384 pixels", within="(0, inf)")


@dataclass(frozen=True)
class MaskingOptions:
    """Masks of patches."""

    GROUP: ClassVar[str] = "masking"
    mask_strategy: str = option("block", "how patches to mask are chosen", choices=MASK_STRATEGIES)
    num_mask_patches: int = option(
        75, "most patches masked per image; exactly as many with random and block_exact", within="[1, inf)"
    )
    max_mask_patches_per_block: int | None = option(None, "most patches of a block; no limit", within="[1, inf)")
    min_mask_patches_per_block: int = option(16, "smallest masked block, in patches", within="[0, inf)")


@dataclass(frozen=True)
class TargetOptions:
    """What is predicted of a patch."""

    GROUP: ClassVar[str] = "target"
    target: str = option("tokens", "what is predicted of a patch", choices=TARGETS)
    pixel_norm: bool = option(True, "pixels: predict them normalised by their patch's mean and standard deviation")
    teacher: str = option("", f"features: whose; a name of timm's, {ANY_MODEL}")
    predict: str = option("masked", "which patches are predicted in training", choices=("masked", "all"))
    discrete_vae_weight_path: str | None = option(
        None, "folder or file of the tokenizer", aliases=("tokenizer_weight",)
    )
    discrete_vae_type: str = option("dall-e", "kind of tokenizer", choices=TOKENIZERS, aliases=("tokenizer_model",))
    codebook_size: int | None = option(
        None, "tokens that it must have; by default what it has", within="[1, inf)", aliases=("codebook_n_emd",)
    )
    codebook_dim: int | None = option(
        None, "length of a code that it must have, likewise", within="[1, inf)", aliases=("codebook_emd_dim",)
    )
    second_input_size: Size = option(112, "size of the tokenizer's view, in pixels (HEIGHTxWIDTH or one number)")
    second_interpolation: str = option("lanczos", "interpolation of the tokenizer's view")
    tokenizer_dtype: str = option("auto", "number format of the tokenizer's encoder", choices=AMP_CHOICES)
    tokenizer_compile: bool = option(False, "compile the tokenizer's encoder; takes a minute at the start")


@dataclass(frozen=True)
class ClassTokenOptions:
    """A second prediction through the class token."""

    GROUP: ClassVar[str] = "models called ..._cls_pt"
    early_layers: int | None = option(
        None, "block, from 1, whose patches the further blocks see; 9 of 12 and 21 of 24 by default", within="[1, inf)"
    )
    head_layers: int = option(2, "further blocks; 0 for no second prediction", within="[0, inf)")
    shared_lm_head: bool = option(True, "one norm and linear layer for both predictions")


@dataclass(frozen=True)
class TrainedOptions(TrainedModelOptions, BatchOptions, EpochOptions, CosineOptions, ShardingOptions, RunOptions):
    """What jobs that train a backbone share."""


@dataclass(frozen=True)
class PretrainingConfig(ChannelOptions, DataOptions, MaskingOptions, TargetOptions, ClassTokenOptions, TrainedOptions):
    """The settings of ``run_beit_pretraining.py``: every official flag, with its official default."""

    GROUP: ClassVar[str] = "pre-training"
    REMOVED: ClassVar[dict[str, tuple[object, str]]] = {
        "tokenizer_stream": (False, "the tokenizer always runs with the step; --tokenizer_compile makes it faster")
    }

    model: str = option("beit_base_patch16_224_8k_vocab", "model name; `beit models` lists them")
    compile: bool = option(False, "compile the model for training; takes minutes at the start")
    opt_betas: tuple[float, ...] | None = option((0.9, 0.999), "decay rates of Adam", within="[0, 1)")
    input_size: Size = option(224, "size of the model's view, in pixels (HEIGHTxWIDTH or one number)")
    train_interpolation: str = option("bicubic", "interpolation of the model's view")
    color_jitter: float = option(0.4, "strength of brightness, contrast and saturation jitter", within="[0, inf)")
    min_crop: float = option(
        0.08, "smallest crop, as a share of the image's area", within="(0, 1]", aliases=("min_crop_scale",)
    )
    data_set: str = option("image_folder", "unused", no_effect="--data_path says what the images are in")
    decoupling_aug: bool = option(False, "unused", no_effect="the tokenizer sees the model's crop, as in official runs")
    fast_decode: bool = option(False, "decode JPEG files at a reduced scale where that is enough; changes pixels")
    probe_data_path: str = option("", "small labelled set to score features on: train and val, or class folders")
    probe_freq: int = option(1, "epochs between these scores", within="[1, inf)")
    log_images: int = option(0, "reconstructions logged per epoch, of held-out images if any", within="[0, inf)")


@dataclass(frozen=True)
class PretrainingV2Config(PretrainingConfig):
    """The settings of ``run_beitv2_pretraining.py``: the same job, with the official defaults of BEiT v2."""

    mask_strategy: str = option("block_exact", "how patches to mask are chosen", choices=MASK_STRATEGIES)
    discrete_vae_type: str = option("vqkd", "kind of tokenizer", choices=TOKENIZERS, aliases=("tokenizer_model",))
    second_input_size: Size = option(224, "size of the tokenizer's view, in pixels (HEIGHTxWIDTH or one number)")


@dataclass(frozen=True)
class FinetuningConfig(LabelledDataOptions, TrainedOptions):
    """The settings of ``run_class_finetuning.py``: every official flag, with its official default."""

    GROUP: ClassVar[str] = "fine-tuning"
    init_from: str = option("", f"checkpoint to start from: {ANY_MODEL}", aliases=("finetune",))
    input_size: Size = option(224, "size of the images, in pixels (HEIGHTxWIDTH or one number); sets the model's size")
    drop: float = option(0.0, "dropout of tokens and branches", within="[0, 1)")
    attn_drop_rate: float = option(0.0, "dropout of the attention probabilities", within="[0, 1)")
    use_mean_pooling: bool = option(True, "classify the mean of the patch tokens, not the class token", off="--use_cls")
    init_scale: float = option(0.001, "factor on the new head's initial weights", within="[0, inf)")
    compile: bool = option(False, "compile the model for training; takes minutes at the start")
    model_ema: bool = option(False, "keep a moving average of the weights, and evaluate it too")
    model_ema_decay: float = option(0.9999, "decay of the moving average", within="[0, 1]")
    model_ema_force_cpu: bool = option(False, "keep the moving average in host memory")

    download_data: bool = option(False, "fetch CIFAR where it is missing")
    epochs: int = option(30, "passes over the data", within="[1, inf)")
    save_ckpt_freq: int = option(5, "epochs between checkpoint-<epoch>.pth", within="[1, inf)")
    save_ckpt: bool = option(True, "write checkpoints", off="--no_save_ckpt")
    min_lr: float = option(1e-6, "learning rate at the end of the cosine", within="[0, inf)")
    layer_decay: float = option(0.9, "factor on the learning rate from one layer to the one below", within="(0, 1]")
    disable_weight_decay_on_rel_pos_bias: bool = option(False, "no weight decay on relative position bias tables")

    color_jitter: float = option(0.4, "brightness, contrast, saturation jitter; without --aa", within="[0, inf)")
    aa: str = option("rand-m9-mstd0.5-inc1", "augmentation policy, by timm's name; none for none")
    smoothing: float = option(0.1, "label smoothing", within="[0, 1)")
    reprob: float = option(0.25, "probability of random erasing", within="[0, 1]")
    remode: str = option("pixel", "what erased parts are filled with: pixel (noise), rand (a colour) or const")
    recount: int = option(1, "most rectangles erased per image", within="[1, inf)")
    resplit: bool = option(False, "unused", no_effect="random erasing has no clean split of a batch here")
    mixup: float = option(0.0, "alpha of mixup; 0 for none", within="[0, inf)")
    cutmix: float = option(0.0, "alpha of cutmix; 0 for none", within="[0, inf)")
    cutmix_minmax: tuple[float, ...] | None = option(None, "range of the share of a side cut", within="[0, 1]")
    mixup_prob: float = option(1.0, "probability of mixing a batch, where there is mixup or cutmix", within="[0, 1]")
    mixup_switch_prob: float = option(0.5, "probability of cutmix where there is mixup too", within="[0, 1]")
    mixup_mode: str = option("batch", "what shares a mixing ratio", choices=("batch", "pair", "elem"))

    disable_eval_during_finetuning: bool = option(False, "do not evaluate, and need no validation images")
    eval: bool = option(False, "evaluate only: --resume, else the newest checkpoint in --output_dir")
    robust_test: str = option(
        "", "with --eval: the images are those of ImageNet-R or -A, whose 200 classes alone compete", choices=VARIANTS
    )
    dist_eval: bool = option(False, "unused", no_effect="evaluation is always distributed; each image counts once")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


@dataclass(frozen=True)
class LinearProbeConfig(LabelledDataOptions, ModelOptions, BatchOptions, EpochOptions, RunOptions):
    """The settings of ``run_linear_eval.py``: every official flag, with its official default."""

    GROUP: ClassVar[str] = "probe"
    model: str = option("beit_base_patch16_224", "model name, or auto: the architecture of --checkpoint")
    model_key: str = option("model|module|teacher", "where it has its weights", aliases=("checkpoint_key",))
    checkpoint: str = option("", f"backbone to probe: {ANY_MODEL}", aliases=("pretrained_weights",))
    patch_size: int = option(16, "size of a patch, in pixels", within="[1, inf)")
    input_size: Size | None = option(None, "image size in pixels (HEIGHTxWIDTH or one number); the model's own")
    avgpool_patchtokens: bool = option(True, "features: the class token and the mean of the patch tokens, not it alone")
    pool: tuple[str, ...] = option((), "one head for each of these instead: cls, mean, cls_mean")
    layers: tuple[int, ...] = option((), "blocks to probe, from 0; all by default")
    amp_forward: bool = option(True, "run the backbone in mixed precision (--amp_dtype), on a GPU")

    data_path: str = option("/path/to/imagenet/", "folder of the data; for IMNET the one with train and val")
    nb_classes: int = option(
        OFFICIAL_NUM_LABELS, "classes; 0 and the default take what is there", within="[0, inf)", aliases=("num_labels",)
    )
    train_interpolation: str = option("bilinear", "interpolation of training images")
    batch_size: int = option(128, "images per process and batch", within="[1, inf)", aliases=("batch_size_per_gpu",))
    epochs: int = option(100, "passes over the data", within="[1, inf)")
    eval_freq: int = option(1, "epochs between evaluations", within="[1, inf)", aliases=("val_freq",))
    opt: str = option("adamw", "optimizer: any name that timm knows", aliases=("optimizer",))
    lr: float | None = option(None, "peak learning rate; --base_lr scaled by the batch by default", within="[0, inf)")
    base_lr: float = option(0.001, "learning rate for 256 images per step, over all processes", within="[0, inf)")
    weight_decay: float | None = option(None, "weight decay of the heads; 1e-4, with sgd 0", within="[0, inf)")
    min_lr: float = option(0.0, "learning rate at the end of the cosine", within="[0, inf)")
    output_dir: str = option(".", "folder for checkpoints and log.txt; empty writes nothing")
    local_rank: int = option(0, "GPU of this process, as old launchers pass it; LOCAL_RANK wins")


@dataclass(frozen=True)
class DvaeConfig(DataOptions, BatchOptions, EpochOptions, CosineOptions, RunOptions):
    """The settings of ``run_dvae_training.py``."""

    GROUP: ClassVar[str] = "tokenizer"
    data_path: str = option("", IMAGES)
    eval_data_path: str | None = option(None, "held-out images to evaluate on; some training images by default")
    eval_images: int = option(512, "training images to evaluate on without --eval_data_path", within="[1, inf)")
    in_chans: int = option(3, "channels of the images; others than 3 are read with all their bits", within="[1, inf)")
    input_size: Size = option(
        112, "size of the training crops, in pixels (HEIGHTxWIDTH or one number)", within="[8, inf)"
    )
    interpolation: str = option("lanczos", "interpolation of the crops, as of the tokenizer's view in pre-training")
    min_crop: float = option(
        0.08, "smallest crop, as a share of the image's area", within="(0, 1]", aliases=("min_crop_scale",)
    )

    codebook_size: int = option(
        8192, "size of the vocabulary", within="[2, inf)", aliases=("num_tokens", "codebook_n_emd")
    )
    codebook_dim: int = option(512, "length of a code's vector", within="[1, inf)", aliases=("codebook_emd_dim",))
    num_layers: int = option(3, "times the resolution is halved: 3 makes tokens of 8 x 8 pixels", within="[1, inf)")
    hidden_dim: int = option(256, "channels of the encoder and the decoder", within="[1, inf)")

    reconstruction: str = option("mse", "reconstruction loss", choices=("mse", "smooth_l1"))
    quantizer: str = option("vq", "how a code is chosen in training", choices=("vq", "gumbel"))
    quantize_from: float = option(0.15, "share of the run, up to 2000 steps, before vq quantises", within="[0, 1)")
    codebook_decay: float = option(0.95, "decay of the averages that the codes of vq follow", within="[0, 1)")
    commitment: float = option(0.25, "weight in vq of the distance to the code", within="[0, inf)")
    kl_weight: float = option(0.1, "gumbel: weight of the KL divergence to uniform, per pixel value", within="[0, inf)")
    kl_warmup_steps: int = option(-1, "steps from weight 0 to --kl_weight; overrides --kl_warmup_share")
    kl_warmup_share: float = option(0.1, "the same as a share of the run", within="[0, 1]")
    temperature_start: float = option(1.0, "first temperature of the Gumbel-softmax", within="(0, inf)")
    temperature_end: float = option(1 / 16, "last temperature of the Gumbel-softmax", within="(0, inf)")
    temperature_steps: int = option(-1, "steps of its cosine; overrides --temperature_share when positive")
    temperature_share: float = option(0.75, "the same as a share of the run", within="[0, 1]")
    ema_decay: float = option(0.999, "decay of the average of the weights, which is published", within="[0, 1)")

    epochs: int = option(20, "passes over the data", within="[1, inf)")
    save_ckpt_freq: int = option(1, "epochs between checkpoint-<epoch>.pth", within="[1, inf)")
    keep_checkpoints: int = option(2, "numbered checkpoints to keep; 0 keeps all", within="[0, inf)")
    warmup_epochs: int = option(0, "epochs of linear warm-up", within="[0, inf)")
    warmup_steps: int = option(100, "steps of linear warm-up; overrides --warmup_epochs when positive")
    opt: str = option("muon", "optimizer: any name that timm knows, or fusedadamw")
    lr: float = option(4e-3, "peak learning rate; never rescaled to the batch", within="[0, inf)")
    weight_decay: float = option(1e-4, "weight decay", within="[0, inf)")
    clip_grad: float | None = option(1.0, "largest gradient norm", within="(0, inf)")
    opt_betas: tuple[float, ...] | None = option((0.9, 0.999), "decay rates of Adam", within="[0, 1)")


@dataclass(frozen=True)
class VqkdConfig(DataOptions, BatchOptions, EpochOptions, CosineOptions, RunOptions):
    """The settings of ``run_vqkd_training.py``: every official flag, with its official default."""

    GROUP: ClassVar[str] = "tokenizer"
    model: str = option("vqkd_encoder_base_decoder_3x768x12_clip", "model name; its end names the teacher")
    model_kwargs: dict[str, Any] | None = option(None, "more of its arguments, such as embed_dim=384 decoder_depth=1")
    codebook_size: int = option(8192, "number of codes", within="[2, inf)", aliases=("codebook_n_emd",))
    codebook_dim: int = option(32, "length of a code's vector", within="[1, inf)", aliases=("codebook_emd_dim",))
    quantize_kmeans_init: bool = option(False, "start from the k-means of the first batch's vectors")
    ema_decay: float = option(0.99, "share of a code that stays at a step", within="[0, 1)")
    revive_codes: int = option(0, "steps until an unused code becomes a random vector; 0 never", within="[0, inf)")
    rec_loss_type: str = option("cosine", "distance from the teacher's features", choices=("cosine",))
    process_type: str = option(
        "default", "scale of the images: -1 to 1, ImageNet's or 0 to 1", choices=("default", "imagenet_norm", "dall-e")
    )

    teacher: str = option("", f"teacher instead of the model's: a name of timm's, {ANY_MODEL}")
    teacher_model_type: str = option("clip", "unused", choices=("clip", "dino", "None"))
    teacher_input_size: int = option(224, "unused", no_effect="the teacher sees images at its own size")

    input_size: Size = option(224, "size of the images, in pixels (HEIGHTxWIDTH or one number)")
    train_interpolation: str = option("bicubic", "interpolation of the crops")
    min_crop: float = option(
        0.08, "smallest crop, as a share of the image's area", within="(0, 1]", aliases=("min_crop_scale",)
    )
    color_jitter: float = option(0.0, "strength of brightness, contrast and saturation jitter", within="[0, inf)")
    data_set: str = option("image_folder", "kind of data set", choices=("image_folder",))
    imagenet_default_mean_and_std: bool = option(False, "unused", no_effect="--process_type says how images are scaled")
    eval_data_path: str | None = option(None, "held-out images to evaluate on; some training images by default")
    eval_images: int = option(512, "training images to evaluate on without --eval_data_path", within="[1, inf)")
    disable_eval: bool = option(False, "evaluate on no images")
    dist_eval: bool = option(True, "unused", no_effect="evaluation is always distributed; each image counts once")
    eval: bool = option(False, "evaluate only: --resume, else the newest checkpoint in --output_dir")
    calculate_codebook_usage: bool = option(False, "the same: an evaluation counts the codes in use")

    pixels_of: str = option("", "a tokenizer: train a decoder of its codes into pixels instead, for pictures")
    hidden_dim: int = option(256, "channels of that decoder", within="[1, inf)")

    epochs: int = option(100, "passes over the data", within="[1, inf)")
    weight_decay: float = option(1e-4, "weight decay", within="[0, inf)")
    lr: float = option(5e-5, "peak learning rate for 128 images per step; scaled to their number", within="[0, inf)")
