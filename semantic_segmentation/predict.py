"""``python -m semantic_segmentation predict``: writes label maps of images, and pictures of them with a legend."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor
from torchvision.transforms.v2 import functional as F

from beit.checkpoints.formats.segmentation import leaves_zero_out
from beit.data.datasets import UnreadableImageError, read_image
from beit.data.index import image_files
from beit.errors import InputError
from beit.training.precision import Precision, resolve_amp_dtype
from beit.visualization.figures import save_figure
from semantic_segmentation.api import classes_of, init_model, settings_of
from semantic_segmentation.config import PredictConfig
from semantic_segmentation.inference import predict_each, statistics_of
from semantic_segmentation.overlays import WritingThread, check_writable, result_figure, save_label_map

logger = logging.getLogger(f"beit.{__name__}")

LABEL_MAP, PICTURE = ".png", "_overlay.png"  # endings of an image's results
RECORDED = ("test_mode", "test_ratios", "test_flip", "test_short_at_least_crop")  # by the checkpoint, if not given


def main(config: PredictConfig) -> None:
    """Segments images; raises InputError at once for a missing one, and at the end for those that cannot be read."""
    if not config.checkpoint:
        raise InputError("--checkpoint is missing: a trained segmentor, a file of your own or a released name")
    outputs = find_images(config.images)
    for file in (file for name in outputs.values() for file in result_files(config.output_dir, name)):
        if os.path.abspath(file) in outputs:
            raise InputError(f"{file} would be overwritten by a result: choose another --output_dir")
    check_writable("--output_dir", Path(config.output_dir))
    segmentor = init_model(checkpoint=config.checkpoint, device=config.device)
    classes = classes_of(segmentor, config.classes)
    recorded = {name: getattr(config, name) for name in RECORDED}
    settings = settings_of(segmentor, **recorded, test_batch_size=config.test_batch_size)
    device = next(segmentor.parameters()).device
    precision = Precision(resolve_amp_dtype(config.amp_dtype, device), device)
    statistics = statistics_of(segmentor.metadata, segmentor.num_classes)._asdict()
    add_one = leaves_zero_out(segmentor.metadata, segmentor.num_classes)
    unreadable: list[str] = []

    def images() -> Iterator[tuple[tuple[str, Tensor], Tensor]]:
        for path in outputs:
            try:
                image = F.pil_to_tensor(read_image(path))
            except UnreadableImageError as error:
                logger.error("cannot read %s: %s", path, error)
                unreadable.append(path)
            else:
                yield (path, image), image

    def save(path: str, image: Tensor, prediction: Tensor) -> None:
        label_map, picture = result_files(config.output_dir, outputs[path])
        save_label_map(label_map, prediction, add_one=add_one)
        save_figure(result_figure(image, prediction, classes, opacity=config.opacity), picture)
        logger.info("%s: %s", path, picture)

    predictions = predict_each(segmentor, images(), settings, precision=precision, **statistics)
    with closing(predictions), WritingThread() as write:
        for (path, image), prediction in predictions:
            write(save, path, image, prediction)
    if unreadable:
        raise InputError(f"{len(unreadable)} of {len(outputs)} images could not be read: {', '.join(unreadable[:3])}")


def find_images(given: Sequence[str]) -> Mapping[str, str]:
    """Lists the images of files and folders, each with a distinct name for results; raises InputError for none."""
    if not given:
        raise InputError("no image is given: name image files, or folders of images")
    paths = list(dict.fromkeys(image_files(map(os.path.abspath, given))))
    names = [Path(path).stem for path in paths]
    files = [name + end for name in names for end in (LABEL_MAP, PICTURE)]
    if len(set(files)) < len(files):  # then by their paths below the folder they share
        shared = os.path.commonpath([os.path.dirname(path) for path in paths])
        names = [os.path.relpath(path, shared) for path in paths]
    return dict(zip(paths, names, strict=True))


def result_files(folder: str, name: str) -> tuple[Path, Path]:
    """Returns the paths of an image's label map and picture."""
    return Path(folder) / (name + LABEL_MAP), Path(folder) / (name + PICTURE)
