"""``beit predict``: classifies images on the console."""

import json
import logging
import sys

from beit.commands.settings import PredictConfig
from beit.data.datasets import UnreadableImageError, read_image
from beit.data.index import image_files
from beit.errors import InputError, listed, printable
from beit.inference import inference_model
from beit.training.distributed import select_device
from beit.zoo import open_model

logger = logging.getLogger(__name__)


def main(config: PredictConfig) -> None:
    """Writes the most probable classes of each image; raises InputError at the end if some could not be read."""
    paths = image_files(config.images)
    model, metadata = open_model(config.checkpoint, **config.weights)
    model.to(select_device(config.device, 0))
    unreadable: list[str] = []
    for path in paths:  # one by one, so that each answer appears at once
        try:
            image = read_image(path)
        except UnreadableImageError as error:
            logger.error("cannot read the image %s: %s", path, error)
            unreadable.append(path)
            continue
        prediction = inference_model(model, image, topk=config.topk, metadata=metadata)
        if config.json:
            sys.stdout.write(json.dumps({"image": path, **prediction}) + "\n")
        else:
            ranked = (f"  {score:6.1%}  {name}\n" for name, score in prediction[f"top{config.topk}"])
            sys.stdout.write("".join([f"{printable(path)}\n", *ranked]))
    if unreadable:
        raise InputError(f"{len(unreadable)} of {len(paths)} images could not be read: {listed(unreadable)}")
