"""Images with classes: where they come from, whether their classes match, and how they are augmented."""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from beit.data.datasets import ImageDataset, Images, Transform
from beit.data.hub import VALIDATION, has_split, names_hub, open_hub
from beit.data.index import index_images
from beit.data.preprocessing import COLOURS, default_crop_pct
from beit.data.transforms import (
    INTERPOLATIONS,
    Size,
    as_pixels,
    cut_out,
    drawn_interpolation,
    known_interpolation,
    normalize,
    random_box,
    resized,
    size_pair,
)
from beit.errors import InputError, listed

logger = logging.getLogger(__name__)

CIFAR = {"CIFAR": datasets.CIFAR100, "CIFAR10": datasets.CIFAR10}
ERASING_MODES = ("pixel", "rand", "const")

NATIVE_SIZE = 32  # up to this input size, images that have it are neither zoomed nor cut (as official; for CIFAR)
NATIVE_PADDING = 4
LONGEST = 16  # times the shorter side: what is cut off is never shown


@dataclass(frozen=True)
class ArrayImages:
    """Images held in memory, with the methods of an ``ImageIndex``."""

    images: NDArray[np.uint8]  # (N, H, W, 3)
    class_ids: NDArray[np.int64]  # (N,), positions in class_names
    class_names: tuple[str, ...]
    root: str  # where the images are from, for messages

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """Returns a hash of the images and their classes in their order."""
        contents = ascii(self.class_names).encode(), self.class_ids.tobytes(), self.images.tobytes()
        return hashlib.sha256(b"".join(contents)).hexdigest()

    def path(self, i: int) -> str:
        """Returns what to call image ``i`` in a message."""
        return f"image {i} of {self.root}"

    def file(self, i: int) -> Image.Image:
        """Returns image ``i``."""
        return Image.fromarray(self.images[i])

    def class_id(self, i: int) -> int:
        """Returns the class of image ``i``."""
        return int(self.class_ids[i])


def labelled_dataset(source: Images, transform: Transform, seed: int, strict: bool = False) -> ImageDataset:
    """Returns samples with their class under ``label``, for an ``EpochLoader``; see :class:`ImageDataset`."""
    return ImageDataset(source, transform, seed, labels=True, strict=strict)


def find_images(
    data_set: str, data_path: str, eval_data_path: str | None = None, *, train: bool, download: bool = False
) -> Images:
    """Finds the training or the validation images of a data set.

    ``IMNET`` is the folders ``train`` and ``val`` in ``data_path``; ``image_folder`` is ``data_path`` and
    ``eval_data_path`` themselves; ``CIFAR`` (which is CIFAR-100) and ``CIFAR10`` are torchvision's archives. Of a
    Hugging Face data set, the splits for training and validation are taken, unless a path names another.

    Raises:
        InputError: The folder is missing, empty, not given, or has images outside class folders.
    """
    if names_hub(data_path) and not (train or eval_data_path):
        if has_split(data_path):
            raise InputError(f"--eval_data_path is missing: {data_path} names the split of the training images alone")
        return _classed(open_hub(data_path, VALIDATION), data_path)
    if names_hub(data_path):
        data_set = "image_folder"
    if data_set in CIFAR:
        return _cifar(data_set, data_path, train, download)
    if data_set == "IMNET":
        folder = data_path and os.path.join(data_path, "train" if train else "val")
    elif not train and not eval_data_path:
        raise InputError("--eval_data_path is missing: --data_set image_folder needs a folder of validation images")
    else:
        folder = data_path if train else str(eval_data_path)
    return _classed(index_images(folder), folder)


def _classed(images: Images, where: str) -> Images:
    if not images.class_names:
        needed = f"each class needs its own folder, which {images.path(0)} has not"
        needed = "every row needs one, and ?label=COLUMN names their column" if names_hub(where) else needed
        raise InputError(f"{where} has images without a class: {needed}")
    return images


def _cifar(data_set: str, root: str, train: bool, download: bool) -> ArrayImages:
    archive = CIFAR[data_set]
    folder = Path(root, archive.base_folder)
    try:
        found = archive(root, train=train, download=download)
    except (RuntimeError, OSError) as error:
        hint = "" if download else "; --download_data downloads it"
        reason = "damaged or of another version" if folder.exists() else "missing"
        raise InputError(f"--data_set {data_set}: {folder} is {reason}{hint}") from error
    return ArrayImages(found.data, np.asarray(found.targets, dtype=np.int64), tuple(found.classes), str(folder))


def check_classes(sources: Sequence[Images], nb_classes: int = 0) -> tuple[str, ...]:
    """Returns the class names, by id.

    Raises :class:`InputError` if the sources, such as the training and the validation images, have different classes,
    or not ``nb_classes`` of them; 0 accepts any number.
    """
    first, *others = sources
    names = first.class_names
    if nb_classes and nb_classes != len(names):
        raise InputError(
            f"--nb_classes {nb_classes}, but {first.root} has {len(names)} classes ({listed(names)}): "
            f"give --nb_classes {len(names)}, or 0 to infer it"
        )
    for other in others:
        parts = []
        for here, there in ((first, other), (other, first)):
            known = set(there.class_names)
            if missing := [name for name in here.class_names if name not in known]:
                parts.append(f"{len(missing)} in {here.root} but not in {there.root} ({listed(missing)})")
        if parts:
            raise InputError(f"training and validation images have different classes: {', '.join(parts)}")
    if len(names) == 1:
        logger.warning("%s has only one class, %s: there is nothing to learn", first.root, names[0])
    return names


@dataclass(eq=False)
class ClassificationTransform:
    """Training images: a random crop, flipped half of the time, augmented, and with parts erased.

    The crop and the flip come first, then the augmentation policy or, without one, colour jitter; then random erasing
    of the normalised image. An image that already has the input's size, of at most 32 pixels, is shifted by up to 4
    pixels instead of cropped, as in the official code.

    Source: the settings of BEiT (arXiv 2106.08254), appendix; RandAugment is arXiv 1909.13719, random erasing
    arXiv 1708.04896.

    Raises:
        InputError: A setting is out of range or unknown.
    """

    input_size: Size = 224  # (H, W) or one number, in pixels
    _: KW_ONLY
    mean: Sequence[float]  # per channel, for images in [0, 1], as std; also the policy's fill colour
    std: Sequence[float]
    interpolation: str = "bicubic"  # or bilinear, nearest, lanczos, random
    auto_augment: str = "rand-m9-mstd0.5-inc1"  # timm's name of a policy; empty or none for none
    color_jitter: float = 0.4  # without a policy: brightness, contrast and saturation change by a factor in 1 ± this
    erasing: float = 0.25  # probability
    erasing_mode: str = "pixel"  # with normal noise; rand: with one random colour, const: with the mean
    erasing_count: int = 1  # most rectangles of an image
    scale: tuple[float, float] = (0.08, 1.0)  # range of the crop's share of the image area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # range of the crop's width over height

    def __post_init__(self) -> None:
        self.size = size_pair(self.input_size)
        known_interpolation(self.interpolation)
        self.augment = build_policy(self.auto_augment, self.size, self.mean, self.interpolation)
        if self.augment is None and self.color_jitter:
            self.augment = v2.ColorJitter(*[self.color_jitter] * 3)
        self.in_chans = len(self.mean)
        if self.augment is not None and self.in_chans != COLOURS:
            logger.warning("no augmentation policy and colour jitter: they are for 3 channels, not %d", self.in_chans)
            self.augment = None
        if self.erasing_mode not in ERASING_MODES:
            raise InputError(f"random erasing knows the modes {', '.join(ERASING_MODES)}, not {self.erasing_mode!r}")
        erase = RandomErasing(self.erasing, mode=self.erasing_mode, max_count=self.erasing_count, device="cpu")
        self.erase = erase if self.erasing else None

    def __call__(self, image: Image.Image | Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        """Returns ``image``: uint8 ``(3, H, W)``, or float32 and normalised where parts may be erased with noise.

        An image of another number of channels, float32 ``(C, h, w)`` in [0, 1], stays in that range.
        """
        image = self._crop(image, rng)
        if rng.random() < 0.5:
            image = F.horizontal_flip(image)
        if self.augment is not None:
            image = self.augment(image)
        pixels, _ = as_pixels(image)
        if self.erase is None:
            return {"image": pixels}
        # Normal noise does not fit into 8 bits, so such an image travels as float32.
        erased = self.erase(normalize(pixels, self.mean, self.std))
        if pixels.is_floating_point():
            mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
            erased = erased * std + mean
        return {"image": erased}

    def _crop(self, image: Image.Image | Tensor, rng: np.random.Generator) -> Image.Image | Tensor:
        if not is_native(image, self.size):
            height, width = F.get_size(image)
            box = random_box((width, height), self.scale, self.ratio, rng)
            if isinstance(image, Tensor):
                return resized(cut_out(image, box), self.size, self.interpolation, rng)
            how = INTERPOLATIONS[drawn_interpolation(self.interpolation, rng)]
            return F.resized_crop(image, *box, list(self.size), how)
        top, left = rng.integers(2 * NATIVE_PADDING + 1, size=2).tolist()
        return F.crop(F.pad(image, [NATIVE_PADDING] * 4), top, left, *self.size)


class ClassificationEvalTransform:
    """Validation images: the shorter side resized, or each side by itself, then a centre crop.

    The input is ``(H, W)`` or one number, in pixels. ``crop_pct`` is the share of the resized shorter side that is
    shown; None is 0.875, and 1 from 384 pixels on. The ``crop_mode`` is ``center``, or ``squash``, which resizes the
    image to the input's aspect ratio: all of it is shown, distorted.

    Raises:
        InputError: A setting that cannot be used.
    """

    def __init__(
        self,
        input_size: Size = 224,
        *,
        interpolation: str = "bicubic",
        crop_pct: float | None = None,
        crop_mode: str = "center",
        in_chans: int = COLOURS,
    ) -> None:
        self.in_chans = in_chans
        if crop_mode not in ("center", "squash"):
            raise InputError(f"crop_mode {crop_mode!r}: must be center or squash")
        if known_interpolation(interpolation) not in INTERPOLATIONS:
            raise InputError(f"evaluation cannot use a random interpolation: choose {', '.join(INTERPOLATIONS)}")
        self.size, self.interpolation, self.crop_mode = size_pair(input_size), interpolation, crop_mode
        self.crop_pct = default_crop_pct(self.size) if crop_pct is None else crop_pct
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"--crop_pct {self.crop_pct}: must be above 0 and at most 1")

    def __call__(self, image: Image.Image | Tensor, _rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        """Returns ``image``, uint8 ``(3, H, W)``; float32 ``(C, H, W)`` of such a tensor."""
        if not is_native(image, self.size):
            height, width = F.get_size(image)
            # The ends of a very long image are cut off first: resized whole, 8000 x 1 pixels would take gigabytes.
            longest = LONGEST * min(height, width) * max(self.size) // min(self.size)
            if max(height, width) > longest and self.crop_mode == "center":
                height, width = min(height, longest), min(width, longest)
                image = F.center_crop(image, [height, width])
            rows, columns = self.resized((width, height))
            if isinstance(image, Tensor):
                image = resized(image, (rows, columns), self.interpolation, np.random.default_rng(0))
            else:
                image = F.resize(image, [rows, columns], INTERPOLATIONS[self.interpolation])
            image = F.center_crop(image, list(self.size))
        return {"image": as_pixels(image)[0]}

    def resized(self, image_size: tuple[int, int]) -> list[int]:
        """Returns ``[H, W]`` that an image of ``(width, height)`` is resized to, in pixels."""
        width, height = image_size
        least_h, least_w = (int(side / self.crop_pct) for side in self.size)
        if self.crop_mode == "squash":
            return [least_h, least_w]
        if height * least_w <= width * least_h:  # the height is the limit
            return [least_h, int(least_h * width / height)]
        return [int(least_w * height / width), least_w]


def is_native(image: Image.Image | Tensor, size: tuple[int, int]) -> bool:
    """Whether an image is small and has the input's size ``(H, W)``, so is not resized or cropped."""
    return max(size) <= NATIVE_SIZE and F.get_size(image) == list(size)


def build_policy(name: str, size: tuple[int, int], mean: Sequence[float], interpolation: str) -> Any:
    """Builds timm's RandAugment, AutoAugment or AugMix policy by name; None without a name.

    Raises :class:`InputError` if timm does not know the name.
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
        known = "timm's are like rand-m9-mstd0.5-inc1, augmix-m3-w3 or original"
        raise InputError(f"unknown augmentation policy {name!r}: {known}") from error
    for entry in policy.ops if hasattr(policy, "ops") else policy.policy:
        for operation in entry if isinstance(entry, list) else [entry]:
            if operation.aug_fn is timm_posterize:
                operation.aug_fn = posterize
    return policy


def posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """Keeps every channel's highest bits; timm's full magnitude keeps none, which Pillow rejects from 13 on."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return timm_posterize(image, bits_to_keep, **options)
