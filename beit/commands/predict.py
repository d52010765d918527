"""``beit predict``: classifies images on the console."""

import json
import math
import sys

from beit.commands.settings import PredictConfig
from beit.data.datasets import ImageDataset
from beit.data.index import index_files
from beit.errors import printable
from beit.inference import Classifier, leave_out, reader, require_all_read
from beit.training.distributed import select_device
from beit.training.precision import Precision, resolve_amp_dtype
from beit.zoo import open_model


def main(config: PredictConfig) -> None:
    """Writes the most probable classes of each image; raises InputError at the end if some could not be read."""
    images, device = index_files(config.images), select_device(config.device, 0)
    model, metadata = open_model(config.checkpoint, **config.weights)
    classify = Classifier(model.to(device), metadata, config.topk)
    precision = Precision(resolve_amp_dtype(config.amp_dtype, device), device)
    dataset = ImageDataset(images, classify.preprocessing.transform, strict=True)
    loader = reader(dataset, model, config.batch_size, config.num_workers, max_unreadable=len(images))
    for numbers, batch in loader.once():
        with precision.autocast():
            predictions = classify(batch["image"])
        for number, prediction in zip(numbers.tolist(), predictions, strict=True):
            if not math.isfinite(prediction["score"]):
                leave_out(loader, number)
            if number in loader.unreadable:
                continue
            if config.json:
                sys.stdout.write(json.dumps({"image": images.path(number), **prediction}) + "\n")
            else:
                ranked = (f"  {score:6.1%}  {name}\n" for name, score in prediction[f"top{config.topk}"])
                sys.stdout.write("".join([f"{printable(images.path(number))}\n", *ranked]))
    require_all_read(loader)
