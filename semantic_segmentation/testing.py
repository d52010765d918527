"""Testing of a segmentor: the scores over a data set, label maps for a server, pictures to look at."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit.checkpoints.heads import comparable, match_classes
from beit.checkpoints.read import read_weights
from beit.config import read_settings
from beit.data.loaders import EpochLoader
from beit.data.transforms import size_pair
from beit.errors import InputError
from beit.outputs import JSON_MARK, check_outputs
from beit.storage import atomic_write
from beit.tasks.base import EVALUATION_WORKERS, session_of
from beit.training import distributed
from beit.training.logging import Progress
from beit.training.precision import Precision, resolve_amp_dtype
from beit.training.session import Session
from beit.visualization.figures import save_figure
from semantic_segmentation.api import classes_of
from semantic_segmentation.config import (
    SegmentationConfig,
    TestConfig,
    adds_one,
    check,
    completed,
    label_map_folder,
    segmentor_arguments,
)
from semantic_segmentation.data import (
    CLASSES_FILE,
    ImagePairs,
    SegmentationClasses,
    SegmentationDataset,
    check_labels,
    pairs_of,
)
from semantic_segmentation.inference import Statistics, TestSettings, predict_each, statistics_of
from semantic_segmentation.metrics import Confusion, SegmentationScores, scores
from semantic_segmentation.modeling import Segmentor, build_segmentor, heads_in, load_segmentor
from semantic_segmentation.overlays import result_figure, save_label_map, writing_thread

logger = logging.getLogger(f"beit.{__name__}")

LOG_EVERY = 100  # images between two lines while testing

# What is done with an image's segmentation, beside the work: called with its place in the data set, the image, the
# prediction and the label map, which says 255 everywhere where there is none.
Visitor = Callable[[int, Tensor, Tensor, Tensor], None]


def main(config: TestConfig) -> None:
    """Tests a checkpoint as the settings say."""
    config = read_settings(completed(config))
    check(config)
    with session_of(config, writes=False) as session:
        root = Path(config.data_path)
        annotations = None if config.format_only else config.val_annotations
        pairs = pairs_of(config.data_path, config.val_images, annotations)
        for flag, files in outputs(config, pairs).items():
            distributed.on_main(partial(check_outputs, flag, files, config.overwrite))
        weights, metadata = read_weights(config.checkpoint)
        segmentor = build_model(config, heads_in(weights, config.checkpoint).num_classes)
        load_segmentor(segmentor, weights, metadata, config.checkpoint)
        classes = classes_of(segmentor, config.classes or next(root.glob(CLASSES_FILE), ""))
        check_data(config, [pairs], classes)
        learnt, given = comparable(metadata.get("labels") or (), classes.names)
        if learnt != given and sorted(learnt) == sorted(given):  # the same ones in another order
            weights, metadata, _ = match_classes(weights, metadata, segmentor.state_dict(), classes.names)
            load_segmentor(segmentor, weights, metadata, config.checkpoint)
        compare_with_record(segmentor.metadata, config, classes)
        precision = precision_of(config, session.device)
        logger.info("testing %s on the %d images in %s", config.checkpoint, len(pairs), pairs.root)
        statistics, visit = statistics_of(segmentor.metadata, len(classes)), visitor(config, pairs, classes)
        run = build_test(config, pairs, classes, session, precision, statistics, visit)
        confusion = run(segmentor.to(session.device))
        if config.format_only:
            logger.info("label maps written to %s", label_map_folder(config))
            return
        results = scores(confusion)
        logger.info("per class, in percent:\n%s", results.table(classes.names))
        logger.info("%s", results.summary())
        if config.out and distributed.is_main():
            write_scores(Path(config.out), results, confusion, config, classes)


def outputs(config: TestConfig, pairs: ImagePairs) -> dict[str, list[Path]]:
    """Returns the files that are asked for, by the setting that asks for them."""
    names = [f"{pairs.name(number)}.png" for number in range(len(pairs))]
    return {
        "--out": [Path(config.out)] * bool(config.out),
        "--eval_options imgfile_prefix": [label_map_folder(config) / name for name in names * config.format_only],
        "--show_dir": [Path(config.show_dir, name) for name in names * bool(config.show_dir)],
    }


def check_data(config: SegmentationConfig, found: Sequence[ImagePairs], classes: SegmentationClasses) -> None:
    """Raises InputError if the processes have found different data, or what they have found cannot be used."""
    if not distributed.all_equal(ascii([*(pairs.fingerprint() for pairs in found), classes.names])):
        counts = " and ".join(f"{len(pairs)} images in {pairs.root}" for pairs in found)
        raise InputError(
            f"the processes see different data; process {distributed.rank()} sees {counts}, and {len(classes)} "
            "classes: every machine needs the same files"
        )
    for pairs in found:
        if pairs.labels:
            distributed.on_main(partial(check_labels, pairs, classes, config.reduce_zero_label))


def compare_with_record(metadata: Mapping[str, Any], config: TestConfig, classes: SegmentationClasses) -> None:
    """Warns where a checkpoint records other classes than the data have, or in another order."""
    learnt, given = comparable(metadata.get("labels") or (), classes.names)
    different = [number for number, pair in enumerate(zip(learnt, given, strict=False)) if len({*pair}) > 1]
    if different and len(learnt) == len(given):
        logger.warning(
            "%s has learnt other classes than the data have: %d of %d names differ; number %d is %r there and %r here",
            *(config.checkpoint, len(different), len(given), number := different[0], learnt[number], given[number]),
        )
    zero = metadata.get("reduce_zero_label")
    if zero is not None and zero != config.reduce_zero_label:
        logger.warning(
            "%s has learnt with reduce_zero_label=%s, and this is a test with %s: its labels may be one off",
            *(config.checkpoint, zero, config.reduce_zero_label),
        )


def precision_of(config: TestConfig, device: torch.device) -> Precision:
    """Returns the number format of a test: float32 unless another one is asked for, as for the published numbers."""
    name = "fp32" if config.amp_dtype == "auto" else config.amp_dtype
    return Precision(resolve_amp_dtype(name, device), device)


def build_model(config: SegmentationConfig, num_classes: int) -> Segmentor:
    """Creates the segmentor of the settings, at the size of the crops; raises InputError if they do not fit."""
    try:
        segmentor = build_segmentor(**segmentor_arguments(config, num_classes))
    except (TypeError, ValueError) as error:
        raise InputError(f"model {config.model} cannot be built: {error}") from error
    segmentor.backbone.set_grad_checkpointing(config.grad_checkpointing)
    return segmentor


def build_test(
    config: SegmentationConfig,
    pairs: ImagePairs,
    classes: SegmentationClasses,
    session: Session,
    precision: Precision,
    statistics: Statistics,
    visit: Visitor | None = None,
) -> Callable[[Segmentor], Tensor]:
    """Returns what tests a segmentor on images, and returns the counts of :class:`Confusion` over all processes.

    Each image is taken by one of the processes, so their number changes nothing. The host decodes ahead, a thread
    writes behind, and only the end waits for the device. Images are normalised with ``statistics``; ``visit`` is called
    with each segmentation.
    """
    loader = EpochLoader(
        SegmentationDataset(pairs, num_classes=len(classes), reduce_zero_label=config.reduce_zero_label),
        1,  # they differ in size
        rank=session.rank,
        world_size=session.world_size,
        num_workers=min(config.num_workers, EVALUATION_WORKERS),
        pin_memory=config.pin_mem and session.device.type == "cuda",
        shuffle=False,
        drop_last=False,
    )
    settings = TestSettings.of(vars(config), size_pair(config.crop_size), config.test_batch_size)

    def test(segmentor: Segmentor) -> Tensor:
        confusion = Confusion(len(classes), precision.device)
        progress = Progress("Testing", loader.batches_per_epoch, 0)
        samples = ((batch, batch["image"][0]) for batch in loader.epoch(0))
        predictions = predict_each(segmentor, samples, settings, **statistics._asdict(), precision=precision)
        with closing(predictions), writing_thread() as write:
            for number, (batch, prediction) in enumerate(predictions, 1):
                confusion.update(prediction, batch["label"][0])
                if visit is not None:
                    write(visit, int(batch["index"]), batch["image"][0], prediction, batch["label"][0])
                if number % LOG_EVERY == 0:
                    progress.update(number, "images on this process")
        progress.close()
        return distributed.sum_over_ranks(confusion.matrix.clone())

    return test


def visitor(config: TestConfig, pairs: ImagePairs, classes: SegmentationClasses) -> Visitor | None:
    """Returns what writes the files that are asked for: label maps, pictures."""
    _, label_maps, pictures = outputs(config, pairs).values()
    if not (label_maps or pictures):
        return None

    def visit(index: int, image: Tensor, prediction: Tensor, label: Tensor) -> None:
        if label_maps:
            save_label_map(label_maps[index], prediction, add_one=adds_one(config))
        if pictures:
            labels = label if pairs.labels else None
            save_figure(result_figure(image, prediction, classes, labels, opacity=config.opacity), pictures[index])

    return visit


def write_scores(
    path: Path, results: SegmentationScores, confusion: Tensor, config: TestConfig, classes: SegmentationClasses
) -> None:
    """Writes the scores, as fractions, with null for those of absent classes, and the pixels that they rest on."""

    def known(value: float) -> float | None:
        return None if math.isnan(value) else value

    content = {
        **JSON_MARK,
        "checkpoint": config.checkpoint,
        **{name: known(value) for name, value in results.means().items()},
        "IoU": dict(zip(classes.names, map(known, results.iou), strict=True)),
        "Acc": dict(zip(classes.names, map(known, results.accuracy), strict=True)),
        "confusion": confusion.tolist(),  # a row for each class, a column for each that is predicted
    }
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
    logger.info("scores written to %s", path)
