"""``beit predict``: what images show, on the console."""

import json
import logging
import sys
from dataclasses import dataclass
from typing import Any

from beit.config import option
from beit.data.datasets import UnreadableImageError, read_image
from beit.data.index import image_files
from beit.errors import InputError
from beit.inference import inference_model
from beit.training.distributed import select_device
from beit.zoo import open_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictConfig:
    """The arguments of ``beit predict``."""

    images: tuple[str, ...] = option((), "image files, and folders of images", positional=True)
    model: str = option("", "a checkpoint with classes: a path, a released name, a URL or a hub id")
    topk: int = option(5, "how many of the likeliest classes to name")
    json: bool = option(False, "write one JSON object an image")
    device: str = option("cpu", "cuda, cpu or mps")


def main(config: PredictConfig) -> None:
    """Writes the likeliest classes of each image to standard output.

    An image that cannot be read is named at once, and again at the end, when the others are done.

    Raises:
        InputError: There is no such model, it has no classes, or an image is not there or cannot be read.
    """
    if not config.model:
        raise InputError("--model is missing: a fine-tuned checkpoint, or the name of a released one (`beit models`)")
    paths = image_files(config.images)
    model, metadata = open_model(config.model)
    model.to(select_device(config.device, 0))
    unreadable: list[str] = []
    for path in paths:  # one by one: each answer appears when it is there
        try:
            image = read_image(path)
        except UnreadableImageError as error:
            logger.error("cannot read the image %s: %s", path, error)
            unreadable.append(path)
            continue
        prediction: Any = inference_model(model, image, topk=config.topk, metadata=metadata)
        sys.stdout.write(_as_json(path, prediction) if config.json else _as_text(path, prediction[f"top{config.topk}"]))
    if unreadable:
        raise InputError(f"{len(unreadable)} of {len(paths)} images could not be read: {', '.join(unreadable[:3])}")


def _as_json(path: str, prediction: dict[str, Any]) -> str:
    return json.dumps({"image": path, **prediction}) + "\n"


def _as_text(path: str, ranked: list[tuple[str, float]]) -> str:
    lines = (f"  {score:6.1%}  {name}\n" for name, score in ranked)
    return "".join([f"{path}\n", *lines])
