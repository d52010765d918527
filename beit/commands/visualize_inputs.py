"""What pictures are made of: images from files, folders and shards, a model of any checkpoint at any resolution."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from beit.data.classification import ClassificationEvalTransform
from beit.data.datasets import ImageIndex, UnreadableImageError, index_images, read_image
from beit.data.shards import names_shards
from beit.errors import InputError
from beit.inference import decoded, preprocessing_of
from beit.modeling import Backbone, Size
from beit.training.distributed import select_device
from beit.zoo import open_model


@dataclass(frozen=True)
class ShardImage:
    """An image in a tar shard, read when its turn comes; its name begins with the shard's path."""

    index: ImageIndex
    number: int

    def __str__(self) -> str:
        return self.index.path(self.number)


Shown = str | Path | ShardImage


@dataclass(frozen=True)
class Viewer:
    """A model with the way to show it images.

    Attributes:
        model: In evaluation mode, without gradients, set to the resolution asked for.
        transform: Resizes and crops to that.
        mean: Of the model's input, per channel.
        std: Of the model's input, per channel.
    """

    model: Backbone
    transform: ClassificationEvalTransform
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.cls_token.device

    def view(self, image: Shown) -> Tensor:
        """Returns what the model gets to see of an image, uint8 ``(3, H, W)``.

        Raises:
            InputError: It cannot be read.
        """
        return self.transform(read_shown(image))["image"]


def open_viewer(checkpoint: str, size: Size | None, device: str) -> Viewer:
    """Opens a checkpoint of any dialect.

    Args:
        checkpoint: A path, a released name, an address or a hub id.
        size: Height and width of the images in pixels; None for the model's own.
        device: cuda, cpu or mps.

    Raises:
        InputError: There is no such checkpoint, it is no BEiT, or images of that size cannot be cut into its patches.
    """
    if not checkpoint:
        raise InputError("--checkpoint is missing: a path, a released name, a URL or a hub id")
    _check_is_no_tokenizer(checkpoint)
    place = select_device(device, 0)
    model, metadata = open_model(checkpoint)
    if size is not None:
        _check_size(size, model.patch_embed.patch_size)
        model.set_input_size(size)
    model = model.requires_grad_(False).to(place)
    prepared = preprocessing_of(model, metadata)
    # All of the shorter side: a picture of a photograph should show it, where an evaluation cuts its rim away.
    transform = ClassificationEvalTransform(model.img_size, interpolation=prepared.transform.interpolation, crop_pct=1)
    return Viewer(model, transform, prepared.mean, prepared.std)


def _check_is_no_tokenizer(checkpoint: str) -> None:
    """Refuses a tokenizer's folder by name: it lies beside the run folders, and has weights of its own."""
    try:
        described = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(described, dict) and {"num_tokens", "codebook_dim"} <= set(described):
        raise InputError(
            f"{checkpoint} holds no BEiT but a tokenizer: give a checkpoint of pre-training or fine-tuning, "
            "such as checkpoint-last.pth of a run"
        )


def check_block(block: int, model: Backbone) -> int:
    """Returns the number from 0 on of the block that ``--block`` means, which may count from the end.

    Raises:
        InputError: There is no such block.
    """
    depth = model.get_num_layers()
    if not -depth <= block < depth:
        raise InputError(
            f"--block {block}: the model has {depth} blocks, numbered from 0 to {depth - 1}, "
            f"or from the end -1 to {-depth}"
        )
    return block % depth


def _check_size(size: Size, patch_size: tuple[int, int]) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    if height % patch_size[0] or width % patch_size[1]:
        near = "x".join(str(max(1, round(a / p)) * p) for a, p in zip((height, width), patch_size, strict=True))
        raise InputError(
            f"--size {height}x{width}: the model cuts images into patches of {patch_size[0]} x {patch_size[1]} pixels; "
            f"give a multiple of that, such as {near}"
        )


def image_files(given: Sequence[str], limit: int) -> list[str | ShardImage]:
    """Returns images, at most so many; of a folder and of shards those at even distances, so that all classes show.

    Raises:
        InputError: A folder has no images, or there is no such file.
    """
    paths: list[str | ShardImage] = []
    for path in given:
        if names_shards(path):
            index = index_images(path)
            paths += [ShardImage(index, number) for number in spread(len(index), limit)]
        elif Path(path).is_dir():
            index = index_images(path)
            paths += [index.path(number) for number in spread(len(index), limit)]
        elif not Path(path).exists():
            raise InputError(f"there is no image {path}")
        else:
            paths.append(path)
    return paths[:limit]


def read_shown(image: Shown) -> Image.Image:
    """Returns an image as 8-bit RGB, upright.

    Raises:
        InputError: It cannot be read.
    """
    if not isinstance(image, ShardImage):
        return decoded(str(image))
    try:
        return read_image(image.index.file(image.number))
    except (OSError, UnreadableImageError) as error:
        raise InputError(f"cannot read the image {image}: {error}") from error


def spread(count: int, limit: int) -> list[int]:
    """Returns at most ``limit`` of the numbers below ``count``, at even distances."""
    taken = min(count, limit)
    return [number * count // taken for number in range(taken)]
