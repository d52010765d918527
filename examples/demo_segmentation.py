"""``python -m semantic_segmentation demo``: segments scenes from the backbone that ``beit demo`` has pre-trained."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit.checkpoints.load import read_weights
from beit.config import option, read_yaml
from beit.errors import InputError
from beit.storage import atomic_write
from beit.training.precision import Precision
from beit.visualization.curves import read_log
from beit.visualization.figures import save_figure, segmentation_figure
from examples.demo import IMAGE_PIXELS, MODEL, STORED_PIXELS, make_once, pretrained_checkpoint
from examples.toy_images import SHAPES, write_segmentation_scenes
from semantic_segmentation import task
from semantic_segmentation.config import TrainConfig
from semantic_segmentation.data import SegmentationClasses, TestImages, find_classes, find_pairs
from semantic_segmentation.inference import Statistics, predict_each
from semantic_segmentation.modeling import segmentor_from
from semantic_segmentation.overlays import overlay
from semantic_segmentation.testing import test_settings

logger = logging.getLogger(f"beit.{__name__}")

BACKGROUND = "background 200 200 200"  # its name and colour
STARTS = {"pretrained": 0.75, "scratch": 1.0}  # with the layer decay that suits each
PICTURE_IMAGES = 4
GAP_PIXELS = 4  # between the images of the picture


@dataclass(frozen=True)
class DemoConfig:
    """The flags of ``python -m semantic_segmentation demo``."""

    output_dir: str = option("demo", "the folder that `beit demo` has filled; the results go there too")
    quick: bool = option(False, "a rehearsal of some seconds that learns next to nothing")
    device: str = option("cpu", "cuda, cpu or mps")
    num_workers: int = option(0, "data-loading processes; training itself uses all cores")
    seed: int = option(0, "seed of images and training")


@dataclass(frozen=True)
class Budget:
    """How much is made and trained: scenes of training and validation, and iterations."""

    training: int
    validation: int
    iterations: int


FULL = Budget(training=800, validation=100, iterations=200)
QUICK = Budget(training=16, validation=4, iterations=2)


def main(config: DemoConfig) -> None:
    """Trains a segmentor from the demo's backbone and one from scratch, and shows what they see.

    Raises:
        InputError: `beit demo` has not run there.
    """
    budget = QUICK if config.quick else FULL
    folder = Path(config.output_dir)
    if not list((folder / "pretrain").glob("checkpoint-[0-9]*.pth")):
        raise InputError(f"{folder} holds no pre-trained backbone: run `beit demo --output_dir {folder}` first")
    scenes = folder / "segmentation" / "scenes"
    logger.info("1/3 scenes with a label for every pixel: %d shapes and background", len(SHAPES))
    make_scenes(scenes, budget, config.seed)
    logger.info("2/3 segmentation: UPerNet on the demo's backbone, and the same from scratch")
    for start in STARTS:
        task.main(training_config(folder, start, budget, config))
    logger.info("3/3 picture")
    draw(folder, training_config(folder, "pretrained", budget, config))
    summary = {start: read_log(run_folder(folder, start))[-1]["test_mIoU"] for start in STARTS}
    with atomic_write(folder / "segmentation.json") as file:
        file.write((json.dumps({"mIoU": summary}, indent=2) + "\n").encode())
    logger.info(
        "mIoU on held-out scenes: %.1f %% from pre-training, %.1f %% from scratch, same budget",
        *(100 * summary[start] for start in STARTS),
    )
    logger.info("see %s", folder / "segmentation.png")


def run_folder(folder: Path, start: str) -> Path:
    """Returns the run folder of one of the two trainings."""
    return folder / "segmentation" / start


def training_config(folder: Path, start: str, budget: Budget, config: DemoConfig) -> TrainConfig:
    """Returns the settings of a training; they differ by where it starts alone."""
    settings: dict[str, Any] = {
        **read_yaml(TrainConfig, "upernet_beit_tiny_64_slide_ade20k"),
        "data_root": str(folder / "segmentation" / "scenes"),
        "reduce_zero_label": False,  # here the background is a class
        "model_kwargs": MODEL,
        "crop_size": IMAGE_PIXELS,
        "pretrained": str(pretrained_checkpoint(folder)) if start == "pretrained" else "",
        "lr": 8e-3,
        "layer_decay": STARTS[start],
        "warmup_iters": budget.iterations // 10,
        "max_iters": budget.iterations,
        "eval_interval": budget.iterations,
        "checkpoint_interval": budget.iterations,
        "work_dir": str(run_folder(folder, start)),
        "device": config.device,
        "num_workers": config.num_workers,
        "seed": config.seed,
        "pin_mem": False,
    }
    return TrainConfig(**settings)


def make_scenes(folder: Path, budget: Budget, seed: int) -> None:
    """Makes the scenes, unless they are there already.

    Raises:
        InputError: The folder holds scenes that were made with other settings.
    """

    def write(made: Path) -> None:
        count = budget.validation
        write_segmentation_scenes(made, budget.training, STORED_PIXELS, seed, validation_count=count, coloured=True)
        (made / "classes.txt").write_text("\n".join((BACKGROUND, *SHAPES)) + "\n", encoding="utf-8")

    make_once(folder, {"budget": asdict(budget), "seed": seed}, write)


def draw(folder: Path, config: TrainConfig) -> None:
    """Draws ``segmentation.png``: some held-out scenes, their labels, and what both segmentors make of them."""
    root = Path(config.data_root)
    classes = find_classes(root, config.classes, config.reduce_zero_label)
    pairs = find_pairs(root / config.val_images, root / config.val_annotations)
    images = TestImages(pairs, num_classes=len(classes), reduce_zero_label=config.reduce_zero_label)
    shown = [images[number] for number in range(min(PICTURE_IMAGES, len(images)))]
    scenes = [image for _, image, _ in shown]
    panels = {
        "image": column(scenes),
        "label": column([overlay(image, label, classes.colours) for _, image, label in shown if label is not None]),
    }
    for start, title in zip(STARTS, ("from pre-training", "from scratch"), strict=True):
        panels[title] = column(segmented(scenes, run_folder(folder, start), config, classes))
    legend = list(zip(classes.names, classes.colours, strict=True))
    save_figure(segmentation_figure(panels, legend, "Held-out scenes"), folder / "segmentation.png")


def segmented(images: list[Tensor], run: Path, config: TrainConfig, classes: SegmentationClasses) -> list[Tensor]:
    """Returns images with what a run's segmentor sees painted over."""
    segmentor = segmentor_from(*read_weights(run / f"checkpoint-{config.max_iters}.pth"))
    precision = Precision(torch.float32, torch.device("cpu"))
    settings = test_settings(config)
    how: dict[str, Any] = {**Statistics()._asdict(), "precision": precision}
    predictions = predict_each(segmentor, ((image, image) for image in images), settings, **how)
    return [overlay(image, prediction, classes.colours) for image, prediction in predictions]


def column(images: list[Tensor]) -> Tensor:
    """Puts images uint8 ``(3, H, W)`` of one size below each other, with white between them."""
    gap = torch.full((3, GAP_PIXELS, images[0].shape[2]), 255, dtype=torch.uint8)
    return torch.cat([part for image in images for part in (image, gap)][:-1], dim=1)
