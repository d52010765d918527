"""A segmentor put to use, by the names of ``mmseg.apis``: train it, open it, segment images, look at the result.

model = init_model(checkpoint="beit_base_patch16_640_pt22k_ft22ktoade20k")
result = inference_model(model, "street.jpg")  # (H, W)
show_result_pyplot(model, "street.jpg", result, out_file="street.png")
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from beit.checkpoints.read import read_weights
from beit.config import read_command_line
from beit.errors import InputError, counted
from beit.inference import OneImage, decoded, images_of
from beit.jobs import as_function
from beit.training.distributed import select_device
from beit.training.precision import Precision, resolve_amp_dtype
from beit.visualization.figures import Legend, save_figure
from semantic_segmentation.__main__ import COMMANDS
from semantic_segmentation.config import TestConfig, segmentor_arguments
from semantic_segmentation.data import SegmentationClasses, ade20k_classes, find_classes, named_classes, read_classes
from semantic_segmentation.inference import TestSettings, predict_each, statistics_of
from semantic_segmentation.modeling import Segmentor, build_segmentor, heads_in, load_segmentor, segmentor_from
from semantic_segmentation.overlays import OPACITY, occurring, overlay, result_figure

logger = logging.getLogger(f"beit.{__name__}")

if TYPE_CHECKING:
    from beit.visualization.figures import Figure

PathLike = str | os.PathLike[str]

train_segmentor = as_function(COMMANDS["train"], "train_segmentor")


def init_model(
    config: PathLike | None = None, checkpoint: PathLike | None = None, device: str | torch.device = "cuda"
) -> Segmentor:
    """Opens a segmentor in evaluation mode.

    ``.segment(images)`` returns logits ``(B, K, H, W)`` for normalised images of the model's size; ``.metadata`` holds
    what the checkpoint records.

    Args:
        config: A settings file or the name of one of the package's; None: the checkpoint describes itself.
        checkpoint: A path, a released name, a URL or a hub id; None, with a config: initialised from scratch.
        device: Device of the model; the CPU is used if there is no CUDA.

    Raises:
        InputError: Neither is given, a file does not exist, or the checkpoint is no segmentor or not the config's.
    """
    opened = None if checkpoint is None else read_weights(os.fspath(checkpoint))
    if config is not None:
        settings = read_command_line(TestConfig, [os.fspath(config), "-"], "test.py", "")
        if opened is None:
            count = len(find_classes(settings.data_path, settings.classes, settings.reduce_zero_label))
        else:
            count = heads_in(opened[0], str(checkpoint)).num_classes
        segmentor = build_segmentor(**segmentor_arguments(settings, count))
        if opened is not None:
            load_segmentor(segmentor, *opened, str(checkpoint))
    elif opened is not None:
        segmentor = segmentor_from(*opened)
    else:
        raise InputError("init_model needs a checkpoint or a config")
    return segmentor.to(select_device(str(device), 0)).eval()


def inference_model(
    model: Segmentor,
    image_or_images: OneImage | Sequence[OneImage],
    *,
    settings: TestSettings | None = None,
    amp_dtype: str = "fp32",
) -> Tensor | list[Tensor]:
    """Segments images of any size: integers ``(H, W)`` on the model's device, and for several images a list.

    Args:
        model: From :func:`init_model`.
        image_or_images: One or several paths, Pillow images, arrays or tensors, as for :func:`beit.inference_model`.
        settings: Windows, sizes and flip; by default as the checkpoint's run tested, see :func:`settings_of`.
        amp_dtype: Dtype of the forward pass: ``fp32``, as the published numbers were measured, ``bf16`` or ``fp16``.

    Raises:
        InputError: An image cannot be read.
    """
    device = next(model.parameters()).device
    images, several = images_of(image_or_images)
    pixels = ((None, F.pil_to_tensor(decoded(image))) for image in images)
    statistics = statistics_of(model.metadata, model.num_classes)._asdict()
    precision = Precision(resolve_amp_dtype(amp_dtype, device), device)
    predictions = predict_each(model, pixels, settings or settings_of(model), precision=precision, **statistics)
    results = [classes for _, classes in predictions]
    return results if several else results[0]


def show_result_pyplot(
    model: Segmentor,
    image: OneImage,
    result: Tensor,
    *,
    opacity: float = OPACITY,
    title: str = "",
    out_file: PathLike | None = None,
) -> "Figure":
    """Returns a matplotlib figure of an image, its segmentation and a legend; notebooks show it, no window is opened.

    The result is that of :func:`inference_model`, perhaps as an array; ``out_file`` is a PNG or SVG file to write.

    Raises:
        InputError: Image and result differ in size, or the file cannot be written.
    """
    shown, classes = F.pil_to_tensor(decoded(image)), classes_of(model)
    figure = result_figure(shown, torch.as_tensor(result), classes, opacity=opacity, title=title)
    if out_file is not None:
        save_figure(figure, Path(out_file))
    return figure


def painter_of(checkpoint: PathLike, device: str) -> Callable[[Image.Image], tuple[Image.Image, Legend]]:
    """Opens a segmentor; returns what paints its classes over an 8-bit RGB image and tells their colours.

    It is what ``beit app`` shows.
    """
    model = init_model(checkpoint=checkpoint, device=device)
    classes = classes_of(model)

    def paint(image: Image.Image) -> tuple[Image.Image, Legend]:
        result = inference_model(model, [image])[0]
        legend = [(classes.names[number], classes.colours[number]) for number in occurring([result], len(classes))]
        return F.to_pil_image(overlay(F.pil_to_tensor(image), result, classes.colours)), legend

    return paint


def classes_of(segmentor: Segmentor, file: PathLike = "") -> SegmentationClasses:
    """Returns names and colours: from a file, or as recorded, or ADE20K's for 150 classes, or numbers.

    Raises InputError for a file of another number of classes.
    """
    count = segmentor.num_classes
    if file:
        classes = read_classes(file)
        if len(classes) != count:
            raise InputError(f"{file} has {len(classes)} classes and the checkpoint {count}")
        return classes
    names = segmentor.metadata.get("labels")
    if names is None or len(names) != count:
        if names is not None:
            told = counted(len(names), "name"), counted(count, "class")
            logger.warning("%s in the checkpoint, which has %s: left out", *told)
        if count == len(ade20k := ade20k_classes()):
            return ade20k
        names = [f"class {number}" for number in range(count)]
    return named_classes([str(name) for name in names], segmentor.metadata.get("palette") or ())


def settings_of(
    segmentor: Segmentor,
    *,
    test_mode: str | None = None,
    test_ratios: tuple[float, ...] | None = None,
    test_flip: bool | None = None,
    test_short_at_least_crop: bool | None = None,
    test_batch_size: int = 4,
) -> TestSettings:
    """Returns how to test images: as the checkpoint's run did, else as the published ones, at the model's size.

    With several sizes the short side is never below a window, as in the published tests. The arguments, in place of
    the recorded settings, are explained in :class:`TestSettings`; ``test_ratios`` are factors on the image's size, and
    ``test_batch_size`` counts windows.
    """
    if test_ratios is not None and test_short_at_least_crop is None:
        test_short_at_least_crop = len(test_ratios) > 1
    given: dict[str, object] = {"test_mode": test_mode, "test_ratios": test_ratios, "test_flip": test_flip}
    given["test_short_at_least_crop"] = test_short_at_least_crop
    recorded: dict[str, Any] = {**segmentor.metadata.get("args", {})}
    recorded |= {name: value for name, value in given.items() if value is not None}
    return TestSettings.of(recorded, segmentor.img_size, test_batch_size)
