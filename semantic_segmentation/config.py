"""The settings of segmentation, and the command lines of training and testing around them. Imports no torch.

Settings have the names that they have in every job; mmsegmentation's flags and earlier versions' names are aliases, and
its keys are in ``official_keys.py``. Its iterations count batches: with ``update_freq`` 2, every second one ends in an
optimizer step.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from beit.config import SettingsFiles, Size, option
from beit.errors import InputError, did_you_mean
from beit.tasks.settings import AMP_CHOICES, ANY_MODEL, BatchOptions, LoadingOptions, OptimizerOptions, RunOptions
from beit.zoo import MODELS
from semantic_segmentation.official_keys import KEYS, KEYS_WITHOUT_EFFECT, MODEL_SIZES

logger = logging.getLogger(f"beit.{__name__}")

MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
EVAL_OPTIONS = ("imgfile_prefix", "to_label_id", "efficient_test")
SETTINGS = SettingsFiles(
    folder=Path(__file__).parent / "configs" / "beit" / "upernet",
    overrides=("options", "cfg_options"),
    keys=KEYS,
    without_effect=KEYS_WITHOUT_EFFECT,
)
_SPREAD = "mmsegmentation needs it; here counts are summed over the processes"


@dataclass(frozen=True)
class PairsOptions(LoadingOptions):
    """Images and label maps."""

    GROUP: ClassVar[str] = "data"

    data_path: str = option("data/ade/ADEChallengeData2016", "folder of the data", aliases=("data_root",))
    train_images: str = option("images/training", "training images, in data_path")
    train_annotations: str = option("annotations/training", "their label maps")
    val_images: str = option("images/validation", "validation images, in data_path")
    val_annotations: str = option("annotations/validation", "their label maps")
    classes: str = option("", "file with one class per line; data_path/classes.txt or ADE20K's by default")
    reduce_zero_label: bool = option(True, "ignore label 0, lower the others by 1")
    num_workers: int = option(4, "loading workers per process", within="[0, inf)")
    image_scale: tuple[int, ...] = option((2048, 512), "most pixels of the long and the short side", within="[1, inf)")
    ratio_range: tuple[float, ...] = option((0.5, 2.0), "range of the random factor on image_scale", within="(0, inf)")
    crop_size: Size = option(512, "training crops and test windows, in pixels (HEIGHTxWIDTH or one number)")
    cat_max_ratio: float = option(0.75, "share of a crop that one class should stay below", within="(0, 1]")
    flip: float = option(0.5, "probability of a horizontal flip", within="[0, 1]")
    photometric_distortion: bool = option(True, "change brightness, contrast, saturation and hue")


@dataclass(frozen=True)
class SegmentorOptions:
    """The backbone and the heads."""

    GROUP: ClassVar[str] = "model"

    model: str = option("beit_base_patch16_224", "model whose sizes the backbone has; `beit models` lists them")
    model_kwargs: dict[str, Any] | None = option(None, "more of its arguments, such as patch_size=8 embed_dim=128")
    init_from: str = option("", f"checkpoint to start from: {ANY_MODEL}", aliases=("load_from", "pretrained"))
    decode_head: str = option("uper", "head: UPerNet or SETR-PUP", choices=("uper", "setr_pup"))
    out_indices: tuple[int, ...] = option((3, 5, 7, 11), "blocks to tap, from 0")
    head_channels: int = option(768, "channels of the head", within="[1, inf)")
    head_dropout: float = option(0.1, "dropout before both classifiers", within="[0, 1)")
    auxiliary_channels: int = option(256, "channels of the auxiliary head; 0: none", within="[0, inf)")
    auxiliary_index: int = option(2, "its tap, from 0", within="[0, inf)")
    auxiliary_weight: float = option(0.4, "weight of its loss", within="[0, inf)")
    loss_average: str = option("all", "pixels that the loss averages over", choices=("all", "valid"))
    drop_path: float = option(0.1, "stochastic depth rate of the last block", within="[0, 1)")
    layer_scale_init_value: float = option(0.1, "initial LayerScale; 0 for none", within="[0, inf)")
    rel_pos_bias: bool = option(True, "relative position bias", off="--disable_rel_pos_bias")
    abs_pos_emb: bool = option(False, "absolute position embeddings")
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass")


@dataclass(frozen=True)
class StepOptions(BatchOptions, OptimizerOptions):
    """How long a run is, in optimizer steps, and the schedule of its learning rate."""

    GROUP: ClassVar[str] = "schedule"

    batch_size: int = option(2, "images per process and batch", within="[1, inf)", aliases=("samples_per_gpu",))
    max_steps: int = option(
        160000, "length of the run, in steps", within="[1, inf)", counts_batches=("max_iters", "runner.max_iters")
    )
    warmup_steps: int = option(
        1500, "steps of linear warm-up", within="[0, inf)", counts_batches=("warmup_iters", "lr_config.warmup_iters")
    )
    warmup_ratio: float = option(1e-6, "share of lr that the warm-up begins with", within="[0, 1]")
    power: float = option(1.0, "exponent of the learning rate's decay", within="[0, inf)")
    eval_freq: int = option(
        16000, "steps between evaluations", within="[1, inf)", counts_batches=("eval_interval", "evaluation.interval")
    )
    save_ckpt_freq: int = option(
        16000,
        "steps between checkpoints that are kept",
        within="[1, inf)",
        counts_batches=("checkpoint_interval", "checkpoint_config.interval"),
    )
    opt_betas: tuple[float, ...] | None = option((0.9, 0.999), "betas of Adam", within="[0, 1)")
    lr: float = option(7e-4, "peak learning rate of the heads", within="[0, inf)")
    layer_decay: float = option(0.65, "factor on lr per layer, from the top", within="(0, 1]")
    min_lr: float = option(0.0, "learning rate at the end", within="[0, inf)")


@dataclass(frozen=True)
class TestOptions:
    """How images are tested."""

    GROUP: ClassVar[str] = "test"
    __test__: ClassVar[bool] = False  # its name would make pytest take it for a test

    test_mode: str = option("slide", "windows of crop_size, or whole images", choices=("slide", "whole"))
    slide_stride: Size = option(341, "step between windows, in pixels (DOWNxRIGHT or one number)")
    test_ratios: tuple[float, ...] = option((1.0,), "factors on image_scale to average over", within="(0, inf)")
    test_flip: bool = option(False, "average over the mirrored image too")
    test_short_at_least_crop: bool = option(False, "never resize the short side below the crop, whatever the ratio")
    test_batch_size: int = option(4, "windows per batch; changes speed and memory, not the result", within="[1, inf)")


@dataclass(frozen=True)
class SegmentationConfig(TestOptions, PairsOptions, SegmentorOptions, StepOptions, RunOptions):
    """Data, model, training and test of a segmentor; every field is a flag and a key of the YAML files."""

    SETTINGS: ClassVar[SettingsFiles] = SETTINGS
    REMOVED: ClassVar[dict[str, tuple[object, str]]] = {
        "recipe_batch": (16, "--total_batch_size sets the images per step")
    }
    GROUP: ClassVar[str] = "run"

    output_dir: str = option("", "run folder; work_dirs/CONFIG in training", aliases=("work_dir",))
    log_every: int = option(50, "steps between console lines", within="[1, inf)")
    launcher: str = option("none", "mpi for mpirun; others are detected", choices=("none", "pytorch", "slurm", "mpi"))


@dataclass(frozen=True)
class TrainConfig(SegmentationConfig):
    """The command line of ``tools/train.py``: mmsegmentation's flags, and every setting."""

    GROUP: ClassVar[str] = "training"

    config: str = option("", "settings file: a path, or the name of one of the package's", positional=True)
    resume: str = option("", "checkpoint of a run to resume", aliases=("resume_from",))
    disable_eval: bool = option(False, "do not evaluate, and need no validation images", aliases=("no_validate",))
    gpus: int | None = option(None, "number of GPUs", no_effect="the launcher sets the number of processes")
    gpu_ids: tuple[int, ...] = option((), "GPUs to use", no_effect="CUDA_VISIBLE_DEVICES chooses them")


@dataclass(frozen=True)
class TestConfig(SegmentationConfig):
    """The command line of ``tools/test.py``: mmsegmentation's flags, and every setting."""

    # A run's own config.yaml is good for testing it.
    SETTINGS: ClassVar[SettingsFiles] = dataclasses.replace(SETTINGS, shared_with=TrainConfig)
    GROUP: ClassVar[str] = "testing"

    amp_dtype: str = option("auto", "number format of the forward pass; auto is fp32 in testing", choices=AMP_CHOICES)
    config: str = option("", "settings file: a path, or the name of one of the package's", positional=True)
    checkpoint: str = option("", f"segmentor: {ANY_MODEL}", positional=True)
    aug_test: bool = option(False, "average over six scales, 0.5 to 1.75, and the mirrored image")
    eval: tuple[str, ...] = option((), "measured too where nothing else is asked for", choices=("mIoU",))
    out: str = option("", "file for the scores and the confusion matrix, as JSON")
    format_only: bool = option(False, "write label maps for the ADE20K server, and measure nothing")
    show: bool = option(False, "show the results", no_effect="no window is opened; --show_dir writes the pictures")
    show_dir: str = option("", "folder for images with their segmentation painted over")
    overwrite: bool = option(False, "replace files that were not written by beit")
    opacity: float = option(0.5, "opacity of what is painted over", within="(0, 1]")
    gpu_collect: bool = option(False, "unused", no_effect=_SPREAD)
    tmpdir: str = option("", "unused", no_effect=_SPREAD)
    eval_options: dict[str, Any] | None = option(None, "for --format_only: imgfile_prefix=FOLDER, to_label_id=False")


@dataclass(frozen=True)
class PredictConfig:
    """The settings of ``predict``; those left out default to what the checkpoint records."""

    images: tuple[str, ...] = option((), "image files and folders of images", positional=True)
    checkpoint: str = option("", f"segmentor: {ANY_MODEL}")
    output_dir: str = option("segmentation", "folder for label maps, overlays and figures of the images")
    overwrite: bool = option(False, "replace files that were not written by beit")
    classes: str = option("", "file with one class per line, if the checkpoint does not name them")
    test_mode: str | None = option(None, "windows of the training size, or whole images", choices=("slide", "whole"))
    test_ratios: tuple[float, ...] | None = option(None, "factors on the image size to average over", within="(0, inf)")
    test_flip: bool | None = option(None, "average over the mirrored image too", off="--no_test_flip")
    test_short_at_least_crop: bool | None = option(
        None,
        "never resize the short side below a window; the default with several --test_ratios",
        off="--no_test_short_at_least_crop",
    )
    test_batch_size: int = option(4, "windows per batch; changes speed and memory, not the result", within="[1, inf)")
    opacity: float = option(0.5, "opacity of the colours over the image", within="(0, 1]")
    device: str = option("cuda", "cuda, cpu or mps; the CPU where there is no CUDA")
    amp_dtype: str = option("auto", "number format of the forward pass", choices=AMP_CHOICES)


ConfigT = TypeVar("ConfigT", bound=SegmentationConfig)


def completed(config: ConfigT) -> ConfigT:
    """Returns the settings with what follows from others: a run folder, the engine's launcher, the scales to test."""
    output_dir = config.output_dir
    if isinstance(config, TrainConfig):
        output_dir = output_dir or str(Path("work_dirs") / Path(config.config).stem)
    open_mpi = config.dist_on_itp or config.launcher == "mpi"
    config = dataclasses.replace(config, output_dir=output_dir, dist_on_itp=open_mpi)
    augmented = isinstance(config, TestConfig) and config.aug_test
    return dataclasses.replace(config, test_ratios=MULTI_SCALE, test_flip=True) if augmented else config


def label_map_folder(config: TestConfig) -> Path:
    """Returns where ``--format-only`` writes: ``--eval-options imgfile_prefix=…``, or ``format_results``."""
    prefix = (config.eval_options or {}).get("imgfile_prefix")
    return Path(prefix or Path(config.output_dir) / "format_results")


def adds_one(config: TestConfig) -> bool:
    """Whether ``--format-only`` writes class 0 as 1, as ADE20K numbers it; ``to_label_id=False`` writes it as 0."""
    return config.reduce_zero_label and bool((config.eval_options or {}).get("to_label_id", True))


def sizes(config: SegmentationConfig) -> dict[str, Any]:
    """Returns the backbone's sizes, ``model_kwargs`` over the model's; raises InputError for an unknown model."""
    if config.model not in MODELS:
        raise InputError(f"model {config.model}: no such model{did_you_mean(config.model, MODELS)}")
    published = MODELS[config.model].arguments
    sized = {name: published[name] for name in MODEL_SIZES if name in published}
    return {"patch_size": 16, **sized, **(config.model_kwargs or {})}


def segmentor_arguments(config: SegmentationConfig, num_classes: int) -> dict[str, Any]:
    """Returns the keywords of :func:`semantic_segmentation.modeling.build_segmentor`, for the size of the crops."""
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


def check(config: SegmentationConfig) -> None:
    """Raises InputError for the first settings that do not fit each other; each on its own is checked by its field."""
    built, taps, ratios = sizes(config), config.out_indices, config.ratio_range
    depth, crop, stride = built["depth"], _pair(config.crop_size), _pair(config.slide_stride)
    patch = _pair(built["patch_size"])
    rising = list(taps) == sorted(set(taps)) and 0 <= taps[0] <= taps[-1] < depth if taps else False
    mistakes: dict[str, object] = {
        f"--image_scale {_spaced(config.image_scale)}: must be two numbers of pixels": len(config.image_scale) != 2,
        f"--ratio_range {_spaced(ratios)}: must be two factors, the lower one first": (
            len(ratios) != 2 or ratios[0] > ratios[1]
        ),
        "--test_ratios: must be one or more factors": not config.test_ratios,
        f"--out_indices {_spaced(taps)}: UPerNet takes four blocks": config.decode_head == "uper" and len(taps) != 4,
        f"--out_indices {_spaced(taps)}: takes blocks from 0 to {depth - 1}, in rising order": not rising,
        f"--auxiliary_index {config.auxiliary_index}: there are {len(taps)} taps, counted from 0": (
            config.auxiliary_channels > 0 and config.auxiliary_index >= len(taps)
        ),
        f"--crop_size {config.crop_size}: must be a multiple of the model's patches, {_spaced(patch)} pixels": (
            crop[0] % patch[0] or crop[1] % patch[1]
        ),
        f"--slide_stride {config.slide_stride}: must be at most the window, --crop_size {config.crop_size}, or pixels "
        "between the windows would be left out": stride[0] > crop[0] or stride[1] > crop[1],
    }
    if isinstance(config, TestConfig):
        options = config.eval_options or {}
        odd, to_label_id = sorted({*options} - {*EVAL_OPTIONS}), options.get("to_label_id", True)
        mistakes |= {
            "--eval and --format_only: choose one; --format_only measures nothing": config.eval and config.format_only,
            f"--eval_options {_spaced(odd)}: no such option, there are {', '.join(EVAL_OPTIONS)}": odd,
            f"--eval_options to_label_id={to_label_id}: must be True or False": not isinstance(to_label_id, bool),
        }
        if "efficient_test" in options:
            logger.warning("--eval_options efficient_test has no effect: no results are kept but counts")
    for message, applies in mistakes.items():
        if applies:
            raise InputError(message)


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _spaced(values: Sequence[object]) -> str:
    return " ".join(map(str, values))
