"""The settings of segmentation: one flat dataclass, and the command lines of training and testing around it.

Settings have short names of our own; ``--options`` takes mmsegmentation's dotted ones too. An **iteration** is what it
is there: one batch of every process, so that with ``update_freq`` 2 every second one ends in an optimizer step.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from beit import zoo
from beit.config import SettingsFiles, Size, option, read_command_line
from beit.data.transforms import size_pair
from beit.errors import InputError, did_you_mean
from beit.tasks.options import AMP_CHOICES, check_positive
from beit.training import distributed
from semantic_segmentation.inference import TEST_MODES
from semantic_segmentation.official_keys import KEYS_WITHOUT_EFFECT, MODEL_SIZES, OFFICIAL_KEYS

logger = logging.getLogger(f"beit.{__name__}")

DECODE_HEADS = ("uper", "setr_pup")
LOSS_AVERAGES = ("all", "valid")
LAUNCHERS = ("none", "pytorch", "slurm", "mpi")
METRICS = ("mIoU",)
MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
EVAL_OPTIONS = ("imgfile_prefix", "to_label_id", "efficient_test")
SETTINGS = SettingsFiles(
    folder=Path(__file__).parent / "configs" / "beit" / "upernet",
    overrides=("options", "cfg_options"),
    keys=OFFICIAL_KEYS,
    without_effect=KEYS_WITHOUT_EFFECT,
)
_SPREAD = "mmsegmentation needs it; counts are added up over the processes here"
_PROCESSES = "the launcher says how many processes there are: tools/dist_train.sh CONFIG GPUS"


@dataclass(frozen=True)
class SegmentationConfig:
    """Data, model, training and test of a segmentor; every field is a flag and a key of the YAML files."""

    SETTINGS: ClassVar[SettingsFiles] = SETTINGS

    data_root: str = option("data/ade/ADEChallengeData2016", "folder of the data")
    train_images: str = option("images/training", "training images, in data_root")
    train_annotations: str = option("annotations/training", "their label maps, in data_root")
    val_images: str = option("images/validation", "validation images, in data_root")
    val_annotations: str = option("annotations/validation", "their label maps, in data_root")
    classes: str = option("", "file with a class a line; data_root/classes.txt or ADE20K's by default")
    reduce_zero_label: bool = option(True, "label 0 is no class: 0 becomes ignored, k becomes k - 1")
    samples_per_gpu: int = option(2, "images per process and batch")
    num_workers: int = option(4, "data-loading processes per process")

    model: str = option("beit_base_patch16_224", "model whose sizes the backbone has; `beit models` lists them")
    model_kwargs: dict[str, Any] | None = option(None, "more of the backbone, such as patch_size=8 embed_dim=128")
    pretrained: str = option("", "backbone to start from: a path, a released name, a URL or a hub id")
    decode_head: str = option("uper", "head: UPerNet or SETR-PUP", choices=DECODE_HEADS)
    out_indices: tuple[int, ...] = option((3, 5, 7, 11), "blocks that are tapped, from 0")
    head_channels: int = option(768, "channels of the head's convolutions")
    head_dropout: float = option(0.1, "dropout before the classifiers of both heads")
    auxiliary_channels: int = option(256, "channels of the auxiliary head; 0 for none")
    auxiliary_index: int = option(2, "tap that the auxiliary head reads, from 0")
    auxiliary_weight: float = option(0.4, "weight of the auxiliary loss")
    drop_path: float = option(0.1, "stochastic depth rate of the last block; grows linearly with depth")
    layer_scale_init_value: float = option(0.1, "initial LayerScale; 0 for none")
    rel_pos_bias: bool = option(True, "relative position bias in every block", off="--disable_rel_pos_bias")
    abs_pos_emb: bool = option(False, "learned absolute position embeddings")
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass, to save memory")

    crop_size: Size = option(512, "size of training crops and test windows, in pixels (HEIGHTxWIDTH or one number)")
    image_scale: tuple[int, ...] = option((2048, 512), "most pixels of the long and of the short side after resizing")
    ratio_range: tuple[float, ...] = option((0.5, 2.0), "least and largest factor on image_scale in training")
    cat_max_ratio: float = option(0.75, "share of a crop that one class should stay below")
    flip: float = option(0.5, "probability of a horizontal flip")
    photometric_distortion: bool = option(True, "change brightness, contrast, saturation and hue")

    max_iters: int = option(160000, "iterations: batches of every process")
    update_freq: int = option(1, "batches whose gradients are added up for one optimizer step")
    lr: float = option(7e-4, "peak learning rate of the heads; never rescaled to the batch")
    layer_decay: float = option(0.65, "factor on the learning rate from one layer to the one below")
    weight_decay: float = option(0.05, "weight decay")
    opt: str = option("adamw", "optimizer: any name that timm knows, or fusedadamw")
    opt_eps: float = option(1e-8, "epsilon of Adam")
    opt_betas: tuple[float, ...] = option((0.9, 0.999), "decay rates of Adam")
    momentum: float = option(0.9, "momentum of SGD")
    clip_grad: float | None = option(None, "largest gradient norm; no clipping by default")
    warmup_iters: int = option(1500, "iterations of linear warm-up")
    warmup_ratio: float = option(1e-6, "share of the learning rate that the warm-up begins with")
    power: float = option(1.0, "exponent of the learning rate's decay")
    min_lr: float = option(0.0, "learning rate at the end")
    loss_average: str = option(
        "all", "pixels of a process's batch that its loss is the mean of: all, or valid ones", choices=LOSS_AVERAGES
    )
    recipe_batch: int = option(
        16, "images of an optimizer step that lr is tuned for; another batch is said at the start"
    )
    eval_interval: int = option(16000, "iterations between two evaluations")
    checkpoint_interval: int = option(16000, "iterations between two checkpoints that are kept")
    log_every: int = option(50, "optimizer steps between two console lines")

    test_mode: str = option("slide", "windows of the crop's size, or whole images", choices=TEST_MODES)
    slide_stride: Size = option(341, "from a window to the next, in pixels (DOWNxRIGHT or one number)")
    test_ratios: tuple[float, ...] = option((1.0,), "factors on image_scale whose results are averaged")
    test_flip: bool = option(False, "average over the mirrored image too")
    test_short_at_least_crop: bool = option(False, "never resize the short side below the crop, whatever the ratio")
    test_batch_size: int = option(4, "windows at once; changes speed and memory, not the result")

    work_dir: str = option("", "folder of the run; work_dirs/<name of the config> for training by default")
    log_dir: str | None = option(None, "folder for TensorBoard")
    device: str = option("cuda", "cuda, cpu or mps; the CPU where there is no CUDA")
    seed: int = option(0, "seed of everything random")
    deterministic: bool = option(False, "deterministic GPU kernels where there are any (slower)")
    amp_dtype: str = option("auto", "number format of forward and backward", choices=AMP_CHOICES)
    pin_mem: bool = option(True, "page-locked host memory for faster transfers to a GPU", off="--no_pin_mem")
    keep_checkpoints: int = option(0, "newest checkpoint-<steps>.pth to keep; 0 keeps all")
    save_ckpt_steps: int = option(1000, "optimizer steps between two writes of checkpoint-last.pth; 0 for none")
    launcher: str = option("none", "mpi for mpirun; any other launcher is found without it", choices=LAUNCHERS)
    local_rank: int = option(-1, "GPU of this process, as old launchers pass it; LOCAL_RANK wins")
    dist_url: str = option("env://", "where the processes meet")
    dist_timeout: float = option(distributed.PATIENCE, "minutes that processes wait for one that does not answer")

    @property
    def output_dir(self) -> str:
        """The run folder, under the name that the engine's options have for it."""
        return self.work_dir

    @property
    def data_path(self) -> str:
        """The folder of the data."""
        return self.data_root

    @property
    def dist_on_itp(self) -> bool:
        """Whether Open MPI's ``mpirun`` started the processes, under the name that the engine's options have for it."""
        return self.launcher == "mpi"


@dataclass(frozen=True)
class TrainConfig(SegmentationConfig):
    """The command line of ``tools/train.py``: mmsegmentation's flags, and every setting."""

    config: str = option("", "settings file: a path, or the name of one of the package's", positional=True)
    load_from: str = option("", "segmentor to start from: weights only, a new run")
    resume_from: str = option("", "checkpoint of a run to continue")
    auto_resume: bool = option(True, "continue from the newest checkpoint in --work_dir", off="--no_auto_resume")
    no_validate: bool = option(False, "do not evaluate, and need no validation images")
    gpus: int | None = option(None, "number of GPUs", no_effect=_PROCESSES)
    gpu_ids: tuple[int, ...] = option((), "GPUs to use", no_effect="CUDA_VISIBLE_DEVICES chooses them")

    @property
    def output_dir(self) -> str:
        """The run folder."""
        return self.work_dir or str(Path("work_dirs") / Path(self.config).stem)


@dataclass(frozen=True)
class TestConfig(SegmentationConfig):
    """The command line of ``tools/test.py``: mmsegmentation's flags, and every setting."""

    # A run's own config.yaml is good for testing it.
    SETTINGS: ClassVar[SettingsFiles] = dataclasses.replace(SETTINGS, shared_with=TrainConfig)
    __test__: ClassVar[bool] = False  # its name would make pytest take it for a test

    amp_dtype: str = option("auto", "number format of the forward pass; auto is fp32 in testing", choices=AMP_CHOICES)

    config: str = option("", "settings file: a path, or the name of one of the package's", positional=True)
    checkpoint: str = option("", "segmentor: a path, a released name, a URL or a hub id", positional=True)
    aug_test: bool = option(False, "average over six scales, 0.5 to 1.75, and the mirrored image")
    eval: tuple[str, ...] = option((), "metrics; they are measured too where nothing else is asked for")
    out: str = option("", "file for the scores and the confusion matrix, as JSON")
    format_only: bool = option(False, "write label maps for the ADE20K server, and measure nothing")
    show: bool = option(False, "show the results", no_effect="no window is opened; --show_dir writes the pictures")
    show_dir: str = option("", "folder for images with their segmentation painted over")
    opacity: float = option(0.5, "of what is painted over, above 0 and at most 1")
    gpu_collect: bool = option(False, "unused", no_effect=_SPREAD)
    tmpdir: str = option("", "unused", no_effect=_SPREAD)
    eval_options: dict[str, Any] | None = option(
        None, "of --format_only: imgfile_prefix=FOLDER, to_label_id=False for classes from 0"
    )


def read_train(argv: Sequence[str], prog: str = "train.py", description: str = "") -> TrainConfig:
    """Reads the command line of ``tools/train.py``."""
    return read_command_line(TrainConfig, argv, prog, description)


def read_test(argv: Sequence[str], prog: str = "test.py", description: str = "") -> TestConfig:
    """Reads the command line of ``tools/test.py``."""
    return read_command_line(TestConfig, argv, prog, description)


def intervals(config: SegmentationConfig) -> tuple[int, int]:
    """Returns the iterations between evaluations and between checkpoints; a run shorter than these has one at its end.

    Raises:
        InputError: The last iteration would be without one, or one would fall between two optimizer steps.
    """
    if config.max_iters % config.update_freq:
        raise InputError(
            f"max_iters {config.max_iters}: must be a multiple of update_freq, {config.update_freq}, "
            "or the last batches would change nothing"
        )
    for name in ("eval_interval", "checkpoint_interval"):
        interval = min(getattr(config, name), config.max_iters)
        if config.max_iters % interval:
            raise InputError(f"{name} {interval}: max_iters, {config.max_iters}, must be a multiple of it")
        if interval % config.update_freq:
            raise InputError(f"{name} {interval}: must be a multiple of update_freq, {config.update_freq}")
    return min(config.eval_interval, config.max_iters), min(config.checkpoint_interval, config.max_iters)


def scales(config: SegmentationConfig) -> tuple[tuple[float, ...], bool]:
    """Returns the factors on the image's size at test, and whether the mirrored image counts too."""
    augmented = isinstance(config, TestConfig) and config.aug_test
    return (MULTI_SCALE, True) if augmented else (config.test_ratios, config.test_flip)


def label_map_folder(config: TestConfig) -> Path:
    """Returns where ``--format-only`` writes: what ``--eval-options imgfile_prefix=…`` says, or ``format_results``."""
    return Path((config.eval_options or {}).get("imgfile_prefix") or Path(config.work_dir) / "format_results")


def adds_one(config: TestConfig) -> bool:
    """Whether ``--format-only`` writes class 0 as 1, as ADE20K numbers it; ``to_label_id=False`` writes it as 0."""
    return config.reduce_zero_label and (config.eval_options or {}).get("to_label_id", True)


def sizes(config: SegmentationConfig) -> dict[str, Any]:
    """Returns the backbone's keywords that say how large it is: the model's, with ``model_kwargs`` over them.

    Raises:
        InputError: There is no such model.
    """
    if config.model not in zoo.list_models():
        raise InputError(f"model {config.model}: no such model{did_you_mean(config.model, zoo.list_models())}")
    published = zoo.MODELS[config.model].arguments
    sized = {name: published[name] for name in MODEL_SIZES if name in published}
    return {"patch_size": 16, **sized, **(config.model_kwargs or {})}


def segmentor_arguments(config: SegmentationConfig, num_classes: int) -> dict[str, Any]:
    """Returns the keywords of :func:`semantic_segmentation.modeling.build_segmentor`, for the size of the crops.

    Raises:
        InputError: There is no model of that name.
    """
    return {
        "img_size": config.crop_size,
        "drop_path_rate": config.drop_path,
        "init_values": config.layer_scale_init_value,
        "use_rel_pos_bias": config.rel_pos_bias,
        "use_abs_pos_emb": config.abs_pos_emb,
        **sizes(config),
        "num_classes": num_classes,
        "decode_head": config.decode_head,
        "out_indices": config.out_indices,
        "channels": config.head_channels,
        "dropout": config.head_dropout,
        "auxiliary_channels": config.auxiliary_channels,
        "auxiliary_index": config.auxiliary_index,
    }


# What numbers have to be: the first row says "above 0 and at most 1".
_RANGES: dict[str, tuple[tuple[str, ...], Any]] = {
    "above 0 and at most 1": (("layer_decay", "cat_max_ratio", "opacity"), lambda value: 0 < value <= 1),
    "from 0 to 1": (("flip", "warmup_ratio"), lambda value: 0 <= value <= 1),
    "at least 0 and below 1": (("head_dropout", "drop_path"), lambda value: 0 <= value < 1),
    "a number of 0 or more": (
        (
            *("lr", "min_lr", "weight_decay", "opt_eps", "momentum", "power", "auxiliary_weight"),
            *("layer_scale_init_value", "warmup_iters", "num_workers", "auxiliary_channels", "auxiliary_index"),
            *("seed", "keep_checkpoints", "save_ckpt_steps"),
        ),
        lambda value: math.isfinite(value) and value >= 0,
    ),
    "above 0; leave it out for no clipping": (("clip_grad",), lambda value: value is None or value > 0),
    "two numbers from 0 to below 1": (
        ("opt_betas",),
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
    ),
    "two numbers of pixels, at least 1": (("image_scale",), lambda value: len(value) == 2 and min(value) >= 1),
    "two factors above 0, the lower one first": (
        ("ratio_range",),
        lambda value: len(value) == 2 and 0 < value[0] <= value[1] < math.inf,
    ),
    "one or more factors above 0": (
        ("test_ratios",),
        lambda value: value and all(0 < ratio < math.inf for ratio in value),
    ),
}
_COUNTS = ("samples_per_gpu", "head_channels", "max_iters", "update_freq", "recipe_batch", "eval_interval")


def check_settings(config: SegmentationConfig) -> None:
    """Raises :class:`InputError` for the first setting that cannot be used."""
    check_positive(config, *_COUNTS, "checkpoint_interval", "log_every", "test_batch_size")
    for what, (names, holds) in _RANGES.items():
        for name in names:
            value = getattr(config, name, None)
            if hasattr(config, name) and not holds(value):
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise InputError(f"--{name} {shown}: must be {what}")
    _check_model(config)
    _check_windows(config)
    if isinstance(config, TrainConfig):
        intervals(config)
    if isinstance(config, TestConfig):
        _check_test(config)


def _check_model(config: SegmentationConfig) -> None:
    depth, taps = sizes(config)["depth"], config.out_indices
    if config.decode_head == "uper" and len(taps) != 4:
        raise InputError(f"--out_indices {_spaced(taps)}: UPerNet takes four blocks")
    if not taps or list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < depth:
        raise InputError(f"--out_indices {_spaced(taps)}: takes blocks from 0 to {depth - 1}, in rising order")
    if config.auxiliary_channels and config.auxiliary_index >= len(taps):
        raise InputError(f"--auxiliary_index {config.auxiliary_index}: there are {len(taps)} taps, counted from 0")


def _check_windows(config: SegmentationConfig) -> None:
    crop, stride = size_pair(config.crop_size), size_pair(config.slide_stride)
    patch = size_pair(sizes(config)["patch_size"])
    if any(side % piece for side, piece in zip(crop, patch, strict=True)):
        raise InputError(
            f"--crop_size {config.crop_size}: must be a multiple of the model's patches, {_spaced(patch)} pixels"
        )
    if any(step > side for step, side in zip(stride, crop, strict=True)):
        raise InputError(
            f"--slide_stride {config.slide_stride}: must be at most the window, --crop_size {config.crop_size}, "
            "or pixels between the windows would be left out"
        )


def _check_test(config: TestConfig) -> None:
    if config.eval and config.format_only:
        raise InputError("--eval and --format_only: choose one; --format_only measures nothing")
    for name in config.eval:
        if name not in METRICS:
            raise InputError(f"--eval {name}: no such metric{did_you_mean(name, METRICS)}; there is {METRICS[0]}")
    for name in config.eval_options or {}:
        if name not in EVAL_OPTIONS:
            raise InputError(f"--eval_options {name}: no such option{did_you_mean(name, EVAL_OPTIONS)}")
    to_label_id = (config.eval_options or {}).get("to_label_id", True)
    if not isinstance(to_label_id, bool):
        raise InputError(f"--eval_options to_label_id={to_label_id}: must be True or False")
    if "efficient_test" in (config.eval_options or {}):
        logger.warning("--eval_options efficient_test has no effect: no results are kept but counts")


def _spaced(values: Sequence[object]) -> str:
    return " ".join(map(str, values))


@dataclass(frozen=True)
class PredictConfig:
    """The arguments of ``predict``; those left out default to what the checkpoint records."""

    images: tuple[str, ...] = option((), "image files and folders of images", positional=True)
    checkpoint: str = option("", "segmentor: a path, a released name, a URL or a hub id")
    output_dir: str = option("segmentation", "folder for NAME.png, the label map, and NAME_overlay.png")
    classes: str = option("", "file with one class per line, if the checkpoint does not name them")
    test_mode: str | None = option(
        None, "slide: windows of the size of the training crops; whole: the image at once", choices=("slide", "whole")
    )
    test_ratios: tuple[float, ...] | None = option(None, "factors on the image size whose results are averaged")
    test_flip: bool | None = option(None, "average over the mirrored image too", off="--no_test_flip")
    test_short_at_least_crop: bool | None = option(
        None,
        "never resize the short side below a window, whatever the ratio; the default with several --test_ratios",
        off="--no_test_short_at_least_crop",
    )
    test_batch_size: int = option(4, "windows per batch; changes speed and memory, not the result")
    opacity: float = option(0.5, "opacity of the colours over the image, above 0 and at most 1")
    device: str = option("cuda", "cuda, cpu or mps; falls back to the CPU without CUDA")
    amp_dtype: str = option("auto", "number format of the forward pass", choices=AMP_CHOICES)
