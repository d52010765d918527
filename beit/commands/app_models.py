"""What ``beit app`` shows of a checkpoint, as pictures and numbers; knows nothing of pages."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from beit.checkpoints.formats import UNKNOWN, recognise
from beit.checkpoints.read import STATE_KEYS, read_weights
from beit.checkpoints.released import resolve
from beit.commands.settings import ViewerOptions
from beit.commands.visualize import open_pretrained
from beit.commands.visualize_attention import attention_rows, mask_generator, parse_heads
from beit.commands.visualize_inputs import open_viewer
from beit.data.datasets import Transform, sample_randomness
from beit.data.transforms import normalize, to_unit_range
from beit.errors import InputError
from beit.inference import inference_model
from beit.modeling import Backbone
from beit.registry import SEGMENTATION, locate
from beit.storage import load_checkpoint
from beit.targets import MaskedPrediction, PredictionTarget
from beit.tasks.base import image_statistics
from beit.tasks.pretraining import build_mask_generator, evaluation_transform
from beit.training.distributed import select_device
from beit.visualization.attention import Query, query_maps
from beit.visualization.figures import Legend, Picture, figure_image, pictures_figure
from beit.visualization.reconstructions import fill_in, hide_patches, versions

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
PRETRAINED, SEGMENTOR, CLASSIFIER = "pre-trained", "segmentor", "classifier"
KINDS = {"lm_head.": PRETRAINED, "decode_head.": SEGMENTOR, "head.": CLASSIFIER, "classifier.": CLASSIFIER}
LARGE = 1024  # pixels of a side: to segment more takes minutes on a CPU
CANVAS = 448  # least pixels of a side, so that a finger meets a patch

Mask = NDArray[np.bool_]  # (h, w)


def find_checkpoints(given: str) -> dict[str, str]:
    """Returns the models' checkpoints in and below a folder, by path in it and kind; or the one that is given.

    What a link leads to outside the folder is left out. Raises :class:`InputError` if there is none, or what is given
    is of no model.
    """
    root = Path(given)
    if not root.is_dir() or (root / "config.json").is_file():
        read_weights(given)
        return {given: str(resolve(given))}
    files = sorted(file for file in root.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    inside = [file for file in files if file.resolve().is_relative_to(root.resolve())]
    found = {f"{file.relative_to(root)} · {kind}": str(file) for file in inside if (kind := kind_of(file))}
    if not found:
        raise InputError(f"{given} has no checkpoint of a model in or below it: give a run folder, or a file")
    return found


def kind_of(file: Path) -> str:
    """Returns what a file's model is for, without reading its tensors; empty if it holds none."""
    try:
        content = load_checkpoint(file, mmap=True)
        state = next((content[key] for key in STATE_KEYS if isinstance(content.get(key), Mapping)), content)
        if recognise(state) == UNKNOWN:
            return ""
    except (InputError, AttributeError):
        return ""
    return next((kind for part, kind in KINDS.items() if any(name.startswith(part) for name in state)), "backbone")


@dataclass(frozen=True)
class Exhibit:
    """An opened checkpoint: how its model, without gradients, sees an image, and what the kind has besides."""

    model: Backbone
    transform: Transform  # whole images along the shorter side, to views of :mod:`beit.targets`
    mean: tuple[float, ...]
    std: tuple[float, ...]
    target: PredictionTarget | None = None  # of a pre-trained one
    segment: Callable[[Image.Image], tuple[Image.Image, Legend]] | None = None
    missing: str = ""  # why a pre-trained one has no target

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.model.patch_embed.grid_size

    @property
    def zoom(self) -> int:
        """How much larger the canvas is than the image."""
        return math.ceil(CANVAS / min(self.model.img_size))

    def patch_at(self, x: int, y: int) -> Query:
        """Returns row and column of the patch at a pixel of the canvas."""
        (height, width), (rows, columns) = self.model.patch_embed.patch_size, self.grid
        return min(y // (height * self.zoom), rows - 1), min(x // (width * self.zoom), columns - 1)

    def batch(self, image: Image.Image, mask: Mask) -> dict[str, Tensor]:
        """Returns the views of an image as a batch of one with this mask."""
        with sample_randomness(0, 0, 0) as rng:
            views = {**self.transform(image, rng), "mask": torch.from_numpy(mask)}
        return {name: view[None].to(self.model.cls_token.device) for name, view in views.items()}

    def blocks(self, patches: int, seed: int) -> Mask:
        """Draws a mask of blocks; :class:`InputError` where so many patches cannot be masked."""
        generator = mask_generator(patches, self.model)
        with sample_randomness(seed, 0, 0) as rng:
            return np.zeros(self.grid, dtype=bool) if generator is None else generator(rng)

    def canvas(self, image: Image.Image, mask: Mask, query: Query) -> Image.Image:
        """Draws what the model sees, large, with the masked patches grey and the query patch framed."""
        batch = self.batch(image, mask)
        picture = hide_patches(to_unit_range(batch["image"]), batch["mask"])[0].cpu()
        large = picture.repeat_interleave(self.zoom, 1).repeat_interleave(self.zoom, 2)
        (height, width), frame = (side * self.zoom for side in self.model.patch_embed.patch_size), large.clone()
        top, left = query[0] * height, query[1] * width
        frame[:, top : top + height, left : left + width] = torch.tensor([0.84, 0.37, 0.0]).view(3, 1, 1)
        inner = (..., slice(top + 3, top + height - 3), slice(left + 3, left + width - 3))
        frame[inner] = large[inner]
        return F.to_pil_image(frame)

    def classify(self, image: Image.Image) -> dict[str, float] | None:
        """Returns the five likeliest classes with their probabilities, None where there are no classes of images."""
        if self.segment is not None or not getattr(self.model, "num_classes", 0):
            return None
        return dict(inference_model(self.model, image)["top5"])

    def segmentation(self, image: Image.Image) -> tuple[Image.Image, Legend] | None:
        """Returns the image, a large one smaller, with its classes painted over it, and their colours."""
        return None if self.segment is None else self.segment(shrunk(image, LARGE))

    @torch.no_grad()
    def predict(self, image: Image.Image, mask: Mask, steps: int) -> tuple[list[tuple[Image.Image, str]], str]:
        """Fills in the masked patches; returns pictures with titles, and the score in words."""
        if self.target is None or not mask.any():
            return [], ""
        batch, objective = self.batch(image, mask), MaskedPrediction(self.target, self.mean, self.std)
        outputs = fill_in(partial(objective.outputs_of_all, self.model), self.target, batch, steps)
        panels, scores = versions(outputs, self.target, batch)
        pictures = [(F.to_pil_image(images[0].clamp(0, 1)), title) for title, images in panels.items()]
        try:
            sure = self.target.confidence(outputs)[0].exp().view(self.grid).cpu()
        except InputError:  # what is predicted has none
            return pictures, scores[0]
        heat = sure.masked_fill(~torch.from_numpy(mask), torch.nan)
        figure = pictures_figure([[Picture(panels["image"][0], heat, limits=(0.0, 1.0))]], bar=True)
        return [*pictures, (figure_image(figure), "confidence")], scores[0]

    @torch.no_grad()
    def attend(self, image: Image.Image, mask: Mask, query: Query, block: int, head: str) -> Image.Image:
        """Draws where a patch attends to in a block: in one head, their ``mean``, or ``all`` side by side."""
        batch = self.batch(image, mask)
        inputs = normalize(batch["image"], self.mean, self.std)
        probabilities = self.model.get_attention_maps(inputs, block, batch["mask"] if mask.any() else None)
        maps = query_maps(probabilities.float(), [query], self.grid)[0].cpu()
        shown, heads = to_unit_range(batch["image"])[0].cpu(), parse_heads([head], self.model.num_heads)
        return figure_image(pictures_figure(attention_rows(shown, maps, [query], heads), f"Attention in block {block}"))


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """Returns a copy of an image with no side longer than ``side`` pixels."""
    image = image.copy()
    image.thumbnail((side, side))
    return image


def open_exhibit(source: str, device: str, tokenizer: str = "") -> Exhibit:
    """Opens a checkpoint; ``tokenizer`` is the one of a pre-trained model, empty for the one that it records.

    Raises :class:`InputError` if it cannot be opened.
    """
    kind, missing = kind_of(resolve(source)), ""
    if kind == PRETRAINED:
        try:
            run, model, target = open_pretrained(source, tokenizer, select_device(device, 0))
        except InputError as error:
            missing = str(error)
        else:
            masks = build_mask_generator(run, model.patch_embed.grid_size)
            transform = evaluation_transform(run, target, masks)
            transform.crop_fraction = 1.0
            look = image_statistics(run)
            return Exhibit(model.eval().requires_grad_(False), transform, *look, target)
    viewer = open_viewer(ViewerOptions(checkpoint=source, device=device))
    segment = locate(SEGMENTATION)(source, device) if kind == SEGMENTOR else None
    return Exhibit(viewer.model, viewer.transform, viewer.mean, viewer.std, None, segment, missing)
