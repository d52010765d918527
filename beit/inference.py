"""Using a model: classifying images, and extracting their features.

model = beit.get_model("beit_base_patch16_224_pt22k_ft22kto1k")
beit.inference_model(model, "cat.jpg")["name"]
beit.extract_feat(model, ["cat.jpg", "dog.jpg"], layer=8)  # (2, 768)
"""

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from beit.checkpoints.formats.recorded import RECORDED
from beit.checkpoints.read import Metadata, class_names, preparation_of
from beit.data.classification import ClassificationEvalTransform
from beit.data.datasets import UnreadableImageError, read_channels, read_image, to_rgb, upright
from beit.data.index import IndexedImage
from beit.data.loaders import EpochDataset, EpochLoader
from beit.data.preprocessing import COLOURS
from beit.data.transforms import normalize
from beit.errors import InputError, did_you_mean, listed
from beit.modeling import Backbone, VisionTransformer
from beit.zoo import open_model

logger = logging.getLogger(__name__)

AnyModel = Backbone | str | Path
OneImage = str | os.PathLike[str] | IndexedImage | Image.Image | NDArray | Tensor
Prediction = dict[str, Any]

POOLS = ("mean", "cls", "cls_mean", "map")
TOKENS_AT_ONCE = 32 * 197  # in a batch, however large the images are: of 32 in 224 pixels
MOST_WORKERS = 10
NOT_FINITE = "the model's output is NaN or infinite; give images whose values are as large as those of its training"


@overload
def inference_model(  # type: ignore[overload-overlap]  # a str is one path
    model: AnyModel, image_or_paths: OneImage, *, topk: int = 5, metadata: Metadata | None = None
) -> Prediction: ...
@overload
def inference_model(
    model: AnyModel, image_or_paths: Sequence[OneImage], *, topk: int = 5, metadata: Metadata | None = None
) -> list[Prediction]: ...
def inference_model(
    model: AnyModel, image_or_paths: OneImage | Sequence[OneImage], *, topk: int = 5, metadata: Metadata | None = None
) -> Prediction | list[Prediction]:
    """Classifies images, prepared as the model's checkpoint records.

    Args:
        model: From :func:`beit.get_model`, or anything that function opens; other models get images normalised with
            mean and standard deviation 0.5.
        image_or_paths: One or more images: paths, Pillow images, arrays ``(H, W, 3)`` or tensors ``(3, H, W)``, uint8
            or floating point in [0, 1]; an array or tensor with one more axis holds several.
        topk: Number of classes to return per image.
        metadata: From :func:`beit.zoo.open_model`, or what differs from the model's own, such as ``mean`` and ``std``.

    Returns:
        A dict for one image, a list of dicts for several: ``class`` (index of the top class), ``name``, ``score``
        (its probability) and ``top5`` (named after ``topk``), pairs of name and score in descending order.

    Raises:
        InputError: The model is no classifier, the metadata do not fit it, or an image cannot be read or has values
            that it cannot take.
    """
    opened, known = _opened(model)
    classify = Classifier(opened, _completed(metadata or {}, known, opened), topk)
    images, several = images_of(image_or_paths)
    batches = _batches(opened, images, classify.preprocessing.transform)
    predictions = [prediction for batch in batches for prediction in classify(batch)]
    for number, prediction in enumerate(predictions):
        if not math.isfinite(prediction["score"]):
            raise InputError(f"image {number}: {NOT_FINITE}")
    return predictions if several else predictions[0]


def extract_feat(
    model: AnyModel, image_or_paths: OneImage | Sequence[OneImage], layer: int = -1, pool: str = "mean"
) -> Tensor:
    """Returns features of images as float32 on the model's device: the output of a block, before any norm.

    Args:
        model: As for :func:`inference_model`; may be a pre-training model.
        image_or_paths: As for :func:`inference_model`; one image is a batch of 1.
        layer: The block, from 0 or, if negative, from the end. After pre-training alone, middle blocks are best.
        pool: ``mean`` over the patch tokens or ``cls`` for the class token, ``(B, D)``; ``cls_mean`` for both
            concatenated, ``(B, 2 D)``; ``map`` for the patch tokens as a grid, ``(B, D, h, w)``.

    Raises:
        InputError: There is no such block or pool, or an image cannot be read.
    """
    opened, metadata = _opened(model)
    known_pool(pool)
    number = block_number(opened, layer)
    images, _ = images_of(image_or_paths)
    prepared = preprocessing_of(opened, metadata)
    with _evaluating(opened):
        batches = (prepared.inputs(batch, opened) for batch in _batches(opened, images, prepared.transform))
        outputs = (opened.get_intermediate_layers(batch, n=[number])[0] for batch in batches)
        return torch.cat([pool_tokens(tokens, pool, opened.patch_embed.grid_size).float() for tokens in outputs])


class Classifier:
    """Classifies batches of images that its ``preprocessing`` has prepared, as :func:`inference_model` describes.

    Raises:
        InputError: The model is no classifier.
    """

    def __init__(self, model: Backbone, metadata: Metadata, topk: int = 5) -> None:
        if topk < 1:
            raise InputError(f"topk must be at least 1, got {topk}")
        self.model, self.topk = _classifier(model), topk
        count = self.model.num_classes
        self.names = class_names(dict(metadata), count) or tuple(f"class {number}" for number in range(count))
        self.preprocessing = preprocessing_of(model, metadata)

    def __call__(self, images: Tensor) -> list[Prediction]:
        """Returns what is in images, uint8 ``(B, 3, H, W)``."""
        with _evaluating(self.model):
            logits = self.model(self.preprocessing.inputs(images, self.model))
        likeliest = logits.float().softmax(dim=-1).topk(min(self.topk, len(self.names)))
        predictions = []
        for scores, classes in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
            ranked = [(self.names[number], score) for number, score in zip(classes, scores, strict=True)]
            best = {"class": classes[0], "name": ranked[0][0], "score": scores[0]}
            predictions.append({**best, f"top{self.topk}": ranked})
        return predictions


def pool_tokens(tokens: Tensor, pool: str, grid_size: tuple[int, int]) -> Tensor:
    """Pools the tokens ``(B, 1 + h * w, D)`` of a block as :func:`extract_feat` describes."""
    patches = tokens[:, 1:]
    if pool == "map":
        return rearrange(patches, "b (h w) d -> b d h w", h=grid_size[0])
    pooled = {"cls": lambda: tokens[:, 0], "mean": lambda: patches.mean(dim=1)}
    return torch.cat([pooled[part]() for part in pool.split("_")], dim=-1)


def known_pool(pool: str) -> str:
    """Returns the name of a pooling method; raises :class:`InputError` if there is no such method."""
    if pool not in POOLS:
        raise InputError(f"unknown pool {pool!r}{did_you_mean(pool, POOLS)}: choose {', '.join(POOLS)}")
    return pool


def block_number(model: Backbone, layer: int) -> int:
    """Returns a block's index, counting from the end if negative; raises :class:`InputError` if there is none."""
    depth = model.get_num_layers()
    if not -depth <= layer < depth:
        raise InputError(f"layer {layer}: the model has {depth} blocks, numbered from 0")
    return layer % depth


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input."""

    transform: ClassificationEvalTransform  # resizes and crops
    mean: tuple[float, ...]  # per channel, for images in [0, 1]
    std: tuple[float, ...]  # per channel, for images in [0, 1]

    def inputs(self, images: Tensor, model: Backbone) -> Tensor:
        """Returns images, uint8 ``(B, 3, H, W)``, as a model's input: normalised, on its device, in its format."""
        place = model.cls_token
        return normalize(images.to(place.device, non_blocking=True), self.mean, self.std).to(place.dtype)


def preprocessing_of(model: Backbone, metadata: Metadata) -> Preprocessing:
    """Returns how images become a model's input, at the model's size: as its checkpoint records, or as published."""
    in_chans = model.patch_embed.proj.in_channels
    known = preparation_of(metadata, model.img_size, in_chans)
    resize = {key: known[key] for key in ("interpolation", "crop_pct", "crop_mode")}
    transform = ClassificationEvalTransform(model.img_size, **resize, in_chans=in_chans)
    return Preprocessing(transform, tuple(known["mean"]), tuple(known["std"]))


def batch_size_of(model: Backbone) -> int:
    """Returns how many images to give a model at once: as many as have :data:`TOKENS_AT_ONCE`."""
    height, width = model.patch_embed.grid_size
    return max(1, TOKENS_AT_ONCE // (height * width + 1))


def reader(
    dataset: EpochDataset,
    model: Backbone,
    batch_size: int | None,
    num_workers: int | None,
    *,
    rank: int = 0,
    world_size: int = 1,
    max_unreadable: int | None = None,
) -> EpochLoader:
    """Returns a loader of all images for a model, in order.

    By default in batches of :func:`batch_size_of`, by a worker for each core, and none if there is one batch. See
    :class:`beit.data.loaders.EpochLoader` for the rest.
    """
    size = batch_size_of(model) if batch_size is None else batch_size
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return EpochLoader(
        dataset,
        size,
        rank=rank,
        world_size=world_size,
        num_workers=min((len(dataset) - 1) // size, cores, MOST_WORKERS) if num_workers is None else num_workers,
        pin_memory=model.cls_token.device.type == "cuda",
        shuffle=False,
        drop_last=False,
        max_unreadable=max_unreadable,
    )


def require_all_read(loader: EpochLoader) -> None:
    """Raises :class:`InputError` if some of a loader's images could not be read, or their output was not finite."""
    if found := [loader.dataset.name(number) for number in loader.unreadable]:
        done = "used" if NOT_FINITE in loader.unreadable.values() else "read"
        raise InputError(f"{len(found)} of {len(loader.dataset)} images could not be {done}: {listed(found)}")


def leave_out(loader: EpochLoader, number: int) -> None:
    """Counts an image whose output is NaN or infinite among a loader's unreadable ones."""
    loader.unreadable[number] = NOT_FINITE
    logger.error("%s: %s", loader.dataset.name(number), NOT_FINITE)


def _batches(model: Backbone, images: Sequence[OneImage], transform: ClassificationEvalTransform) -> Iterator[Tensor]:
    size = batch_size_of(model)
    for start in range(0, len(images), size):
        views = (transform(as_input(image, transform.in_chans)) for image in images[start : start + size])
        yield torch.stack([view["image"] for view in views])


def decoded(image: OneImage) -> Image.Image:
    """Returns any image :func:`inference_model` accepts as upright 8-bit RGB; raises :class:`InputError` for others."""
    if isinstance(image, Image.Image):
        return to_rgb(upright(image))
    if isinstance(image, Tensor):
        return to_rgb(F.to_pil_image(_bytes_of(image)))
    if isinstance(image, np.ndarray):
        array = torch.from_numpy(np.array(image))
        return decoded(array.movedim(-1, 0) if image.ndim == 3 else array[None])
    if not isinstance(image, (str, os.PathLike, IndexedImage)):
        kind = type(image).__name__
        raise InputError(f"an image is a path, an image of Pillow's, an array or a tensor, not of type {kind}")
    if not isinstance(image, IndexedImage) and os.path.isdir(image):
        raise InputError(f"{os.fspath(image)} is a folder: give the images in it")
    try:
        return read_image(image)
    except UnreadableImageError as error:
        raise InputError(f"cannot read the image {image}: {error}") from error


def as_input(image: OneImage, in_chans: int) -> Image.Image | Tensor:
    """Returns an image for a transform: as :func:`decoded` does or, unless ``in_chans`` is 3, float32 ``(C, h, w)``.

    See :func:`beit.data.datasets.read_channels`; a tensor or array of floating point has the range [0, 1].
    """
    if in_chans == COLOURS:
        return decoded(image)
    if isinstance(image, Tensor):
        image = (image.movedim(0, -1) if image.ndim == 3 else image).detach().cpu().numpy()
    try:
        return read_channels(image, in_chans)
    except UnreadableImageError as error:
        raise InputError(
            f"cannot read the image {'given' if isinstance(image, np.ndarray) else image}: {error}"
        ) from error


def _bytes_of(image: Tensor) -> Tensor:
    """Converts an image ``(1 or 3, H, W)``, uint8 or in [0, 1], to uint8 on the CPU."""
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        shape = f"in an array (height, width, 3); this one has, as a tensor, {tuple(image.shape)}"
        raise InputError(f"an image in a tensor has shape (3, height, width), {shape}")
    if image.dtype == torch.uint8:
        return image.cpu()
    if not image.is_floating_point() or not 0 <= image.min() <= image.max() <= 1:
        advice = "to give a model images that are normalised already, call it: model(images)"
        raise InputError(f"an image in a tensor or an array is uint8, or floating point from 0 to 1; {advice}")
    return (image.detach().cpu().float() * 255).round().to(torch.uint8)


def images_of(images: OneImage | Sequence[OneImage]) -> tuple[Sequence[OneImage], bool]:
    """Returns a list of images, and whether more than one could have been given."""
    if isinstance(images, (Tensor, np.ndarray)):
        several = images.ndim == 4
    else:
        several = isinstance(images, Sequence) and not isinstance(images, (str, bytes))
    listed: Sequence[OneImage] = list(images) if several else [images]  # type: ignore[arg-type, list-item]
    if not listed:
        raise InputError("there is no image to look at")
    return listed, several


def _opened(model: AnyModel) -> tuple[Backbone, Metadata]:
    if isinstance(model, Backbone):
        return model, getattr(model, "metadata", None) or {}
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(f"a {type(model).__name__} is no model of this library, nor the name of a checkpoint")
    return open_model(model)


def _completed(given: Metadata, known: Metadata, model: Backbone) -> Metadata:
    """Returns what a model records with what is given instead; raises :class:`InputError` if that does not fit it."""
    lengths = dict.fromkeys(("mean", "std"), model.patch_embed.proj.in_channels)
    lengths["labels"] = getattr(model, "num_classes", 0)
    found = {**known, **given}
    for key in [key for key in given if key in RECORDED and given[key] is not known.get(key)]:
        value = found[key] = RECORDED[key](given[key])
        if value is None or (key in lengths and len(value) != lengths[key]):
            raise InputError(f"metadata: {key} {given[key]!r:.60} does not fit the model")
    return found


def _classifier(model: Backbone) -> VisionTransformer:
    if isinstance(model, VisionTransformer) and model.num_classes > 0:
        return model
    if getattr(model, "metadata", {}).get("segmentation"):
        raise InputError("the checkpoint classifies pixels: use `python -m semantic_segmentation predict`")
    problem = "the model has no classes to choose from: it was pre-trained and not fine-tuned"
    raise InputError(f"{problem} (run_class_finetuning.py does that); extract_feat gives its features")


@contextlib.contextmanager
def _evaluating(model: Backbone) -> Iterator[None]:
    """Evaluation mode without gradients, inside the block."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before.items():
            module.training = training
