"""Images with classes: where they come from, whether their classes fit together, and how they are augmented."""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.auto_augment import (
    AugmentOp,
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from beit.data.datasets import LABEL, ImageDataset, ImageIndex, Key, Transform, index_images, sample_randomness
from beit.data.loaders import EpochDataset
from beit.data.transforms import (
    INTERPOLATIONS,
    crop_and_resize,
    known_interpolation,
    normalize,
    random_box,
    size_pair,
)
from beit.errors import InputError

logger = logging.getLogger(__name__)

DATA_SETS = ("CIFAR", "IMNET", "image_folder", "CIFAR10")  # the first three have their official names
CIFAR = {"CIFAR": datasets.CIFAR100, "CIFAR10": datasets.CIFAR10}
ERASING_MODES = ("pixel", "rand", "const")

NATIVE_SIZE = 32  # inputs up to this size are made of images that have it, not of crops (as official; CIFAR)
NATIVE_PADDING = 4
FULL_CROP_FROM = 384  # inputs from this size on show the whole shorter side at evaluation
CROP_PCT = 224 / 256
_SHOWN_NAMES = 3


# ------------------------------------------------------------------------------------------------------- the images
@dataclass(frozen=True)
class ArrayImages:
    """Images that are held in memory.

    Args:
        images: uint8 ``(N, H, W, 3)``.
        class_ids: int64 ``(N,)``, positions in ``class_names``.
        class_names: The names of the classes.
        root: Where the images are from, for messages.
    """

    images: NDArray[np.uint8]
    class_ids: NDArray[np.int64]
    class_names: tuple[str, ...]
    root: str

    def __len__(self) -> int:
        return len(self.images)


LabelledImages = ImageIndex | ArrayImages


class ArrayDataset(Dataset[dict[str, Any]]):
    """What :class:`ImageDataset` is for files, for images in memory: addressed by ``(epoch, index)``, with labels.

    Args:
        source: The images.
        transform: Called with an RGB image and a NumPy generator; returns a dict of tensors.
        seed: Of the run.
    """

    def __init__(self, source: ArrayImages, transform: Transform, seed: int = 0) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Returns what to call image ``index`` in a message."""
        return f"image {index} of {self.source.root}"

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Returns the sample ``(epoch, index)``."""
        epoch, index = key
        with sample_randomness(self.seed, epoch, index) as rng:
            sample: dict[str, Any] = dict(self.transform(Image.fromarray(self.source.images[index]), rng))
        sample[LABEL] = torch.tensor(int(self.source.class_ids[index]))
        return sample


def labelled_dataset(source: LabelledImages, transform: Transform, seed: int, strict: bool = False) -> EpochDataset:
    """Returns the samples of images, each with its class under ``label``, for an ``EpochLoader``.

    With ``strict`` the label of an image that cannot be read is -1; the picture is then another's.
    """
    if isinstance(source, ArrayImages):
        return ArrayDataset(source, transform, seed)
    return ImageDataset(source, transform, seed, labels=True, strict=strict)


def find_images(
    data_set: str, data_path: str, eval_data_path: str | None = None, *, train: bool, download: bool = False
) -> LabelledImages:
    """Finds the training or the validation images of a data set.

    Args:
        data_set: ``IMNET``: the folders ``train`` and ``val`` in ``data_path``; ``image_folder``: ``data_path`` and
            ``eval_data_path`` themselves; ``CIFAR`` (which is CIFAR-100) and ``CIFAR10``: torchvision's archives.
        data_path: The folder.
        eval_data_path: The validation images of an ``image_folder``.
        train: Whether the training images are wanted.
        download: Whether a missing CIFAR archive may be fetched.

    Raises:
        InputError: The folder is missing, empty, not given, or without one folder for each class.
    """
    if data_set in CIFAR:
        return _cifar(data_set, data_path, train, download)
    if data_set == "IMNET":
        folder = os.path.join(data_path, "train" if train else "val")
    elif not train and not eval_data_path:
        raise InputError(
            "--eval_data_path is missing: with --data_set image_folder it is the folder of validation images; to train "
            "without them add --disable_eval_during_finetuning"
        )
    else:
        folder = data_path if train else str(eval_data_path)
    index = index_images(folder)
    if not index.class_names:
        raise InputError(
            f"{folder} has images that are in no class: each class needs a folder of its own, {folder}/CLASS"
        )
    return index


def _cifar(data_set: str, root: str, train: bool, download: bool) -> ArrayImages:
    archive = CIFAR[data_set]
    folder = Path(root, archive.base_folder)
    try:
        found = archive(root, train=train, download=download)
    except (RuntimeError, OSError) as error:
        hint = "" if download else "; --download_data fetches it"
        reason = "damaged or of another version" if folder.exists() else "missing"
        raise InputError(f"--data_set {data_set}: {folder} is {reason}{hint}") from error
    return ArrayImages(found.data, np.asarray(found.targets, dtype=np.int64), tuple(found.classes), str(folder))


# ------------------------------------------------------------------------------------------------------ the classes
def check_classes(sources: Sequence[LabelledImages], nb_classes: int = 0) -> tuple[str, ...]:
    """Returns the names of the classes, by id.

    Args:
        sources: What must have the same classes, such as the training and the validation images.
        nb_classes: How many there should be; 0 takes as many as there are.

    Raises:
        InputError: Another number of classes was found, or the sources do not have the same ones.
    """
    first, *others = sources
    names = first.class_names
    if nb_classes and nb_classes != len(names):
        raise InputError(
            f"--nb_classes {nb_classes}, but {first.root} has {len(names)} classes ({_listed(names)}): "
            f"give --nb_classes {len(names)}, or 0 to take what is there"
        )
    for other in others:
        _require_same(first, other)
    if len(names) == 1:
        logger.warning("%s has one class, %s: every answer is right, and nothing can be learned", first.root, names[0])
    return names


def _require_same(train: LabelledImages, val: LabelledImages) -> None:
    only_train = [name for name in train.class_names if name not in set(val.class_names)]
    only_val = [name for name in val.class_names if name not in set(train.class_names)]
    if not only_train and not only_val:
        return
    parts = [
        f"{len(names)} in {source.root} but not in {other.root} ({_listed(names)})"
        for names, source, other in ((only_train, train, val), (only_val, val, train))
        if names
    ]
    raise InputError(f"training and validation images have different classes: {', '.join(parts)}")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    return f"{shown}, …" if len(names) > _SHOWN_NAMES else shown


# --------------------------------------------------------------------------------------------------- the transforms
class ClassificationTransform:
    """Training images: a random crop, flipped half of the time, augmented, and with parts erased.

    The crop and the flip come first, then the augmentation policy or, without one, colour jitter; then random erasing
    of the normalised image. An image that has the input's size, of at most 32 pixels, is not zoomed into but shifted
    by up to 4 pixels, as official.

    Source: the settings of BEiT (arXiv 2106.08254), appendix; RandAugment is arXiv 1909.13719, random erasing
    arXiv 1708.04896.

    Args:
        input_size: ``(H, W)`` or one number, in pixels.
        mean: Per channel, for images in [0, 1]; the policy fills with it.
        std: Per channel, for images in [0, 1].
        interpolation: How the crop is resized: bicubic, bilinear, nearest, lanczos, or random.
        auto_augment: timm's name of a policy, such as ``rand-m9-mstd0.5-inc1``; empty or ``none`` for none.
        color_jitter: Brightness, contrast and saturation change by a factor in ``1 ± color_jitter``; only without a
            policy.
        erasing: Probability that parts of an image are erased.
        erasing_mode: ``pixel``: with normal noise, ``rand``: with one random colour, ``const``: with the mean.
        erasing_count: Most rectangles erased in an image.
        scale: Range of the crop's share of the image area.
        ratio: Range of the crop's width over height.

    Raises:
        InputError: A setting that cannot be used.
    """

    def __init__(
        self,
        input_size: int | Sequence[int] = 224,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        auto_augment: str = "rand-m9-mstd0.5-inc1",
        color_jitter: float = 0.4,
        erasing: float = 0.25,
        erasing_mode: str = "pixel",
        erasing_count: int = 1,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        self.size = size_pair(input_size)
        self.mean, self.std = tuple(mean), tuple(std)
        self.interpolation = known_interpolation(interpolation)
        self.scale, self.ratio = scale, ratio
        if color_jitter < 0:
            raise InputError(f"--color_jitter must be 0 or more, got {color_jitter}")
        self.augment = build_policy(auto_augment, self.size, self.mean, self.interpolation)
        if self.augment is None and color_jitter:
            self.augment = v2.ColorJitter(color_jitter, color_jitter, color_jitter)
        self.erase = build_erasing(erasing, erasing_mode, erasing_count)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        """Returns ``image``: uint8 ``(3, H, W)``, or float32 and normalised where parts may be erased with noise."""
        image = self._crop(image, rng)
        if rng.random() < 0.5:
            image = F.horizontal_flip(image)
        if self.augment is not None:
            image = self.augment(image)
        pixels = F.pil_to_tensor(image)
        if self.erase is None:
            return {"image": pixels}
        # Noise of the normalised image has no place among 256 values, so such an image travels as float32.
        return {"image": self.erase(normalize(pixels, self.mean, self.std))}

    def _crop(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if not is_native(image, self.size):
            box = random_box(image.size, self.scale, self.ratio, rng)
            return crop_and_resize(image, box, self.size, self.interpolation, rng)
        top, left = rng.integers(2 * NATIVE_PADDING + 1, size=2).tolist()
        return F.crop(F.pad(image, [NATIVE_PADDING] * 4), top, left, *self.size)


class ClassificationEvalTransform:
    """Validation images: the shorter side resized, then the centre cut out.

    Args:
        input_size: ``(H, W)`` or one number, in pixels.
        interpolation: How the image is resized.
        crop_pct: Share of the resized image's shorter side that is cut out; None is 0.875, and 1 from 384 pixels on.

    Raises:
        InputError: A setting that cannot be used.
    """

    def __init__(
        self, input_size: int | Sequence[int] = 224, *, interpolation: str = "bicubic", crop_pct: float | None = None
    ) -> None:
        self.size = size_pair(input_size)
        if interpolation not in INTERPOLATIONS:
            known_interpolation(interpolation)
            raise InputError(f"evaluation is not random: give one of {', '.join(INTERPOLATIONS)} as its interpolation")
        self.interpolation = interpolation
        self.crop_pct = default_crop_pct(self.size) if crop_pct is None else crop_pct
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"--crop_pct {self.crop_pct}: must be above 0 and at most 1")

    def __call__(self, image: Image.Image, _rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        """Returns ``image``, uint8 ``(3, H, W)``."""
        if not is_native(image, self.size):
            image = F.resize(image, self.resized(image.size), INTERPOLATIONS[self.interpolation])
            image = F.center_crop(image, list(self.size))
        return {"image": F.pil_to_tensor(image)}

    def resized(self, image_size: tuple[int, int]) -> list[int]:
        """Returns ``[H, W]`` that an image of ``(width, height)`` is resized to, in pixels."""
        width, height = image_size
        least_h, least_w = (int(side / self.crop_pct) for side in self.size)
        if height * least_w <= width * least_h:  # the height is what is scarce
            return [least_h, int(least_h * width / height)]
        return [int(least_w * height / width), least_w]


def default_crop_pct(size: tuple[int, int]) -> float:
    """Returns the share of the shorter side shown at evaluation: 224 of 256, all from 384 pixels on."""
    return CROP_PCT if min(size) < FULL_CROP_FROM else 1.0


def is_native(image: Image.Image, size: tuple[int, int]) -> bool:
    """Whether an image is small and already has the input's size ``(H, W)``, so that it is neither zoomed nor cut."""
    return max(size) <= NATIVE_SIZE and image.size == (size[1], size[0])


def build_policy(name: str, size: tuple[int, int], mean: Sequence[float], interpolation: str) -> Any:
    """Builds timm's augmentation policy of a name: RandAugment, AutoAugment or AugMix; None without a name.

    Raises:
        InputError: timm does not know it.
    """
    if name in ("", "none"):
        return None
    fill = tuple(min(255, round(255 * value)) for value in mean)
    settings: dict[str, Any] = {"translate_const": int(min(size) * 0.45), "img_mean": fill}
    if interpolation != "random":
        settings["interpolation"] = str_to_pil_interp(interpolation)
    try:
        if name.startswith("rand"):
            policy = rand_augment_transform(name, settings)
        elif name.startswith("augmix"):
            policy = augment_and_mix_transform(name, {**settings, "translate_pct": 0.3})
        else:
            policy = auto_augment_transform(name, settings)
    except (AssertionError, KeyError, ValueError) as error:  # timm asserts what it does not know
        raise InputError(
            f"--aa {name!r} is no policy that timm knows, such as rand-m9-mstd0.5-inc1, augmix-m3-w3 or original"
        ) from error
    for operation in _operations(policy):
        if operation.aug_fn is timm_posterize:
            operation.aug_fn = posterize
    return policy


def _operations(policy: Any) -> Iterator[AugmentOp]:
    """Yields the operations of any of timm's policies."""
    entries: Any = policy.ops if hasattr(policy, "ops") else policy.policy
    for entry in entries:
        yield from entry if isinstance(entry, list) else [entry]


def posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """Keeps the highest bits of every channel, as timm's operation does, down to none of them.

    At its full magnitude timm asks for no bits, which gave black in older Pillow and is an error from version 13 on.
    """
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return timm_posterize(image, bits_to_keep, **options)


def build_erasing(probability: float, mode: str, count: int) -> RandomErasing | None:
    """Builds timm's random erasing; None where it never happens.

    Raises:
        InputError: A setting that cannot be used.
    """
    if not 0 <= probability <= 1:
        raise InputError(f"--reprob {probability}: a probability is between 0 and 1")
    if mode not in ERASING_MODES:
        raise InputError(f"--remode {mode}: choose {', '.join(ERASING_MODES)}")
    if count < 1:
        raise InputError(f"--recount {count}: must be at least 1")
    if math.isclose(probability, 0):
        return None
    return RandomErasing(probability, mode=mode, max_count=count, device="cpu")
