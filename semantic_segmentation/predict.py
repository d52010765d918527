"""``python -m semantic_segmentation predict``: label maps of images, and pictures of them with a legend."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.transforms.v2 import functional as F

from beit.checkpoints.formats.segmentation import leaves_zero_out
from beit.checkpoints.load import read_weights
from beit.config import option
from beit.data.datasets import UnreadableImageError, read_image
from beit.data.index import image_files
from beit.data.transforms import size_pair
from beit.errors import InputError
from beit.tasks.settings import AMP_CHOICES
from beit.training.distributed import select_device
from beit.training.precision import Precision, resolve_amp_dtype
from semantic_segmentation.data import SegmentationClasses, ade20k_classes, named_classes, read_classes
from semantic_segmentation.inference import TEST_MODES, TestSettings, predict_each, statistics_of
from semantic_segmentation.modeling import Segmentor, segmentor_from
from semantic_segmentation.overlays import WritingThread, check_writable, save_figure, save_label_map

logger = logging.getLogger(f"beit.{__name__}")

LABEL_MAP, PICTURE = ".png", "_overlay.png"  # what the files of a result end in, after its name


@dataclass(frozen=True)
class PredictConfig:
    """The arguments of ``predict``; what is left out is as the checkpoint was trained."""

    images: tuple[str, ...] = option((), "image files, and folders of images", positional=True)
    checkpoint: str = option("", "a segmentor: a path, a released name, a URL or a hub id")
    output_dir: str = option("segmentation", "folder for NAME.png, the label map, and NAME_overlay.png")
    classes: str = option("", "file with a class a line, where the checkpoint does not name them")
    test_mode: str | None = option(
        None, "slide: windows of the size of the training crops; whole: the image at once", choices=TEST_MODES
    )
    test_ratios: tuple[float, ...] | None = option(None, "factors on the image's size whose results are averaged")
    test_flip: bool | None = option(None, "average over the mirrored image too", off="--no_test_flip")
    test_short_at_least_crop: bool | None = option(
        None,
        "never resize the short side below a window, whatever the ratio; so it is with several --test_ratios",
        off="--no_test_short_at_least_crop",
    )
    test_batch_size: int = option(4, "windows at once; changes speed and memory, not the result")
    opacity: float = option(0.5, "of the colours over the image, above 0 and at most 1")
    device: str = option("cuda", "cuda, cpu or mps; the CPU where there is no CUDA")
    amp_dtype: str = option("auto", "number format", choices=AMP_CHOICES)


def main(config: PredictConfig) -> None:
    """Segments images; one that cannot be read is named at the end, when the others are done.

    Raises:
        InputError: There is no such checkpoint or image, or it cannot be read.
    """
    if not config.checkpoint:
        raise InputError("--checkpoint is missing: a trained segmentor, a file of your own or a released name")
    if not 0 < config.opacity <= 1:
        raise InputError(f"--opacity {config.opacity}: must be above 0 and at most 1")
    outputs = find_images(config.images)
    check_files(outputs, config.output_dir)
    check_writable("--output_dir", Path(config.output_dir))
    weights, metadata = read_weights(config.checkpoint)
    segmentor = segmentor_from(weights, metadata)
    classes = classes_of(segmentor, metadata, config.classes)
    settings = settings_of(segmentor, metadata, config)
    device = select_device(config.device, 0)
    precision = Precision(resolve_amp_dtype(config.amp_dtype, device), device)
    statistics = statistics_of(metadata, segmentor.num_classes)._asdict()
    add_one = leaves_zero_out(metadata, segmentor.num_classes)
    segmentor.to(device)
    unreadable: list[str] = []
    predictions = predict_each(segmentor, read_each(outputs, unreadable), settings, precision=precision, **statistics)

    def save(path: str, image: Tensor, prediction: Tensor) -> None:
        label_map, picture = result_files(config.output_dir, outputs[path])
        save_label_map(label_map, prediction, add_one=add_one)
        save_figure(picture, image, prediction, classes, opacity=config.opacity)
        logger.info("%s: %s", path, picture)

    with closing(predictions), WritingThread() as write:
        for (path, image), prediction in predictions:
            write(save, path, image, prediction)
    if unreadable:
        raise InputError(f"{len(unreadable)} of {len(outputs)} images could not be read: {', '.join(unreadable[:3])}")


def read_each(paths: Iterable[str], unreadable: list[str]) -> Iterator[tuple[tuple[str, Tensor], Tensor]]:
    """Yields path and image, uint8 ``(3, H, W)``, as what an image is known by, and the image again.

    Args:
        paths: The files.
        unreadable: Takes those that cannot be read.
    """
    for path in paths:
        try:
            image = F.pil_to_tensor(read_image(path))
        except UnreadableImageError as error:
            logger.error("cannot read %s: %s", path, error)
            unreadable.append(path)
        else:
            yield (path, image), image


def find_images(given: Sequence[str]) -> dict[str, str]:
    """Returns the images of files and folders, and what to call the results of each, all different.

    Raises:
        InputError: There is no such file, or a folder without images, or nothing at all.
    """
    if not given:
        raise InputError("no image is given: name image files, or folders of images")
    paths = list(dict.fromkeys(image_files(map(os.path.abspath, given))))
    stems = [Path(path).stem for path in paths]
    files = [stem + end for stem in stems for end in (LABEL_MAP, PICTURE)]
    if len(set(files)) < len(files):  # as they lie below the folder that they share
        shared = os.path.commonpath([os.path.dirname(path) for path in paths])
        stems = [os.path.relpath(path, shared) for path in paths]
    return dict(zip(paths, stems, strict=True))


def result_files(folder: str, name: str) -> tuple[Path, Path]:
    """Returns where the label map and the picture of an image go."""
    return Path(folder) / (name + LABEL_MAP), Path(folder) / (name + PICTURE)


def check_files(outputs: Mapping[str, str], folder: str) -> None:
    """Looks whether a result would take the place of an image.

    Raises:
        InputError: One would.
    """
    for name in outputs.values():
        for path in result_files(folder, name):
            if os.path.abspath(path) in outputs:
                raise InputError(f"{path} would be overwritten by a result: choose another --output_dir")


def classes_of(segmentor: Segmentor, metadata: Mapping[str, Any], file: str) -> SegmentationClasses:
    """Returns names and colours: of a file, or as recorded, or ADE20K's for 150 classes, or numbers.

    Raises:
        InputError: The file is of another number of classes.
    """
    count = segmentor.num_classes
    if file:
        classes = read_classes(file)
        if len(classes) != count:
            raise InputError(f"{file} has {len(classes)} classes and the checkpoint {count}")
        return classes
    names = metadata.get("labels")
    if names is None or len(names) != count:
        if count == len(ade20k := ade20k_classes()):
            return ade20k
        names = [f"class {number}" for number in range(count)]
    return named_classes([str(name) for name in names], metadata.get("palette") or ())


def settings_of(segmentor: Segmentor, metadata: Mapping[str, Any], config: PredictConfig) -> TestSettings:
    """Returns how images are tested: as the checkpoint's run did, else as the published ones, at the model's size.

    Flags are stronger. With sizes of their own the short side is never below a window, as in the published tests.
    """
    recorded = metadata.get("args", {})

    def setting(name: str, otherwise: Any) -> Any:
        given = getattr(config, name)
        return recorded.get(name, otherwise) if given is None else given

    ratios = tuple(setting("test_ratios", (1.0,)))
    several = len(ratios) > 1
    bounded = setting("test_short_at_least_crop", several)
    if config.test_ratios is not None and config.test_short_at_least_crop is None:
        bounded = several
    crop = segmentor.img_size
    stride = size_pair(recorded["slide_stride"]) if "slide_stride" in recorded else (crop[0] * 2 // 3, crop[1] * 2 // 3)
    long, short = recorded.get("image_scale", (4 * min(crop), min(crop)))
    return TestSettings(
        mode=setting("test_mode", "slide"),
        crop=crop,
        stride=(min(stride[0], crop[0]), min(stride[1], crop[1])),
        image_scale=(long, short),
        ratios=ratios,
        flip=setting("test_flip", False),
        short_at_least=min(crop) if bounded else 0,
        batch_size=config.test_batch_size,
    )
