"""Inputs of the pictures: images from files, folders and shards, and a model of any checkpoint at any image size."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from beit.commands.settings import ViewerOptions
from beit.data.classification import ClassificationEvalTransform
from beit.data.datasets import ImageIndex, UnreadableImageError, index_images, read_image
from beit.data.shards import names_shards
from beit.errors import InputError
from beit.inference import Preprocessing, decoded, preprocessing_of
from beit.modeling import Backbone
from beit.training.distributed import select_device
from beit.zoo import open_model


@dataclass(frozen=True)
class ShardImage:
    """An image in a tar shard, named after the shard's path and read on demand."""

    index: ImageIndex
    number: int

    def __str__(self) -> str:
        return self.index.path(self.number)


Shown = str | Path | ShardImage


@dataclass(frozen=True)
class Viewer(Preprocessing):
    """A model in evaluation mode, without gradients, set to the requested image size, and its preprocessing."""

    model: Backbone

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.cls_token.device

    def view(self, image: Shown) -> Tensor:
        """Returns an image, not normalised, uint8 ``(1, 3, H, W)`` on the device; raises InputError if unreadable."""
        return self.transform(read_shown(image))["image"][None].to(self.device)


def open_viewer(config: ViewerOptions, device: str, *, whole: bool = True) -> Viewer:
    """Opens a checkpoint of any format; raises InputError if it is no BEiT, or for a size that patches do not fill.

    With ``whole`` images keep all of their shorter side, as a picture should show, where evaluation crops its border.
    """
    place = select_device(device, 0)
    model, metadata = open_model(config.checkpoint, **config.weights)
    if config.input_size is not None:
        model.set_input_size(config.input_size)
    prepared = preprocessing_of(model, metadata)
    transform = prepared.transform
    if whole:
        transform = ClassificationEvalTransform(model.img_size, interpolation=transform.interpolation, crop_pct=1)
    return Viewer(transform, prepared.mean, prepared.std, model.requires_grad_(False).to(place))


def image_files(given: Sequence[str], limit: int) -> list[str | ShardImage]:
    """Returns at most ``limit`` images; of folders and shards those at even distances, so that all classes appear."""
    found: list[str | ShardImage] = []
    for path in given:
        if names_shards(path) or Path(path).is_dir():
            index = index_images(path)
            images = [ShardImage(index, number) for number in spread(len(index), limit)]
            found += images if names_shards(path) else map(str, images)
        else:
            found.append(path)
    return found[:limit]


def read_shown(image: Shown) -> Image.Image:
    """Returns an image as 8-bit RGB, upright; raises InputError if it cannot be read."""
    if not isinstance(image, ShardImage):
        return decoded(str(image))
    try:
        return read_image(image.index.file(image.number))
    except (OSError, UnreadableImageError) as error:
        raise InputError(f"cannot read the image {image}: {error}") from error


def spread(count: int, limit: int) -> list[int]:
    """Returns at most ``limit`` of the numbers below ``count``, evenly spaced."""
    taken = min(count, limit)
    return [number * count // taken for number in range(taken)]
