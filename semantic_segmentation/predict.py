"""``python -m semantic_segmentation predict``: writes label maps of images, and pictures of them with a legend."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor
from torchvision.transforms.v2 import functional as F

from beit.checkpoints.formats.segmentation import leaves_zero_out
from beit.data.datasets import UnreadableImageError, read_image
from beit.data.hub import names_hub
from beit.data.index import image_files
from beit.data.shards import names_shards
from beit.errors import InputError
from beit.outputs import check_outputs, is_ours
from beit.training.precision import Precision, resolve_amp_dtype
from beit.visualization.figures import save_figure
from semantic_segmentation.api import classes_of, init_model, settings_of
from semantic_segmentation.config import PredictConfig
from semantic_segmentation.inference import predict_each, statistics_of
from semantic_segmentation.overlays import overlay, result_figure, save_label_map, save_png, writing_thread

logger = logging.getLogger(f"beit.{__name__}")

ENDINGS = (".png", "_overlay.png", "_figure.png")  # of an image's results: label map, overlay, figure with a legend
RECORDED = ("test_mode", "test_ratios", "test_flip", "test_short_at_least_crop")  # by the checkpoint, if not given


def main(config: PredictConfig) -> None:
    """Segments images; raises InputError at once for a missing one, and at the end for those that cannot be read."""
    if not config.checkpoint:
        raise InputError("--checkpoint is missing: a trained segmentor, a file of your own or a released name")
    outputs = find_images(config.images, config.output_dir)
    check_outputs("--output_dir", _results(outputs.values(), config.output_dir), config.overwrite)
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
        label_map, picture, figure = map(Path, _results([outputs[path]], config.output_dir))
        save_label_map(label_map, prediction, add_one, classes.colours)
        save_png(picture, F.to_pil_image(overlay(image, prediction, classes.colours, config.opacity)))
        save_figure(result_figure(image, prediction, classes, opacity=config.opacity), figure)
        logger.info("%s: %s", path, picture)

    predictions = predict_each(segmentor, images(), settings, precision=precision, **statistics)
    with closing(predictions), writing_thread() as write:
        for (path, image), prediction in predictions:
            write(save, path, image, prediction)
    if unreadable:
        raise InputError(f"{len(unreadable)} of {len(outputs)} images could not be read: {', '.join(unreadable[:3])}")


def find_images(given: Sequence[str], output_dir: str) -> Mapping[str, str]:
    """Lists the images of files and folders but for earlier results in ``output_dir``, each with a name for its own.

    That is its path in the folder given, or in the one that all share where results would take the place of others or
    of images. Raises InputError if there is no image, or a path does not exist.
    """
    root, places = os.path.abspath(output_dir), dict[str, str]()
    for place in (path if names_hub(path) else os.path.abspath(path) for path in given):
        if names_shards(place) or names_hub(place):
            raise InputError(f"{place}: results are named after image files; give files or folders of them")
        for path in map(str, image_files([place])):
            if path == place or not (Path(path).is_relative_to(root) and is_ours(path)):
                places.setdefault(path, os.path.dirname(path) if path == place else place)
    if not places:
        raise InputError("no image is given: name image files, or folders with images that are no results")
    shared = os.path.commonpath(list(places.values()))
    stems = {os.path.splitext(path)[0]: folder for path, folder in places.items()}
    namings = [[os.path.relpath(stem, folder) for stem, folder in stems.items()]]
    namings += [[os.path.relpath(path, shared) for path in paths] for paths in (stems, places)]
    distinct = (names for names in namings if len({*_results(names, root)} - {*places}) == len(ENDINGS) * len(places))
    return dict(zip(places, next(distinct, namings[-1]), strict=True))


def _results(names: Iterable[str], folder: str = "") -> list[str]:
    return [os.path.join(folder, name + ending) for name in names for ending in ENDINGS]
