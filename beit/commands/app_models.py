"""What ``beit app`` shows of a checkpoint, as pictures and numbers; knows nothing of pages."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from beit.checkpoints.formats import UNKNOWN, recognise
from beit.checkpoints.read import STATE_KEYS
from beit.checkpoints.released import resolve
from beit.commands.settings import ViewerOptions
from beit.commands.visualize import open_pretrained
from beit.commands.visualize_attention import attention_rows, mask_generator, parse_heads
from beit.commands.visualize_inputs import Viewer, open_viewer
from beit.data.classification import ClassificationEvalTransform
from beit.data.datasets import sample_randomness
from beit.data.preprocessing import normalization
from beit.data.transforms import normalize, to_unit_range
from beit.errors import InputError
from beit.inference import inference_model
from beit.registry import SEGMENTATION_FIGURES, locate
from beit.storage import load_checkpoint, settings_in
from beit.targets import MaskedPrediction, PredictionTarget
from beit.tasks.pretraining import build_mask_generator, evaluation_transform
from beit.tasks.settings import PretrainingConfig
from beit.training.distributed import select_device
from beit.visualization.attention import Query, query_maps
from beit.visualization.figures import Picture, figure_image, pictures_figure
from beit.visualization.reconstructions import fill_in, hide_patches, versions

if TYPE_CHECKING:
    from beit.visualization.figures import Figure

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
PRETRAINED, SEGMENTOR, CLASSIFIER = "pre-trained", "segmentor", "classifier"
KINDS = {"lm_head.": PRETRAINED, "decode_head.": SEGMENTOR, "head.": CLASSIFIER, "classifier.": CLASSIFIER}
LONGEST = 1024  # pixels of an image that is segmented: windows of larger ones take minutes on a CPU
CANVAS = 448  # least pixels of a side, so that a finger meets a patch

Mask = NDArray[np.bool_]  # (h, w)


def find_checkpoints(given: str) -> dict[str, str]:
    """Returns the models' checkpoints in and below a folder, by path in it and kind; or the one that is given.

    What a link leads to outside the folder is left out. Raises :class:`InputError` if there is none.
    """
    root = Path(given)
    if not root.is_dir() or (root / "config.json").is_file():
        return {given: given}
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
    """An opened checkpoint: its model as a viewer, and what the kind has besides."""

    viewer: Viewer
    pretrained: tuple[PretrainingConfig, PredictionTarget] | None = None
    segment: "Callable[[Image.Image], Figure] | None" = None
    missing: str = ""  # why there are no predictions of a pre-trained one, such as no tokenizer

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.viewer.model.patch_embed.grid_size

    @property
    def zoom(self) -> int:
        """How much larger the canvas is than the image."""
        return math.ceil(CANVAS / min(self.viewer.model.img_size))

    def patch_at(self, x: int, y: int) -> Query:
        """Returns row and column of the patch at a pixel of the canvas."""
        (height, width), (rows, columns) = self.viewer.model.patch_embed.patch_size, self.grid
        return min(y // (height * self.zoom), rows - 1), min(x // (width * self.zoom), columns - 1)

    @property
    def classifies(self) -> bool:
        """Whether it has classes for images."""
        return self.segment is None and self.pretrained is None and getattr(self.viewer.model, "num_classes", 0) > 0

    def batch(self, image: Image.Image, mask: Mask) -> dict[str, Tensor]:
        """Returns the views of an image, whole along its shorter side, as a batch of one with the given mask."""
        if self.pretrained is None:
            views = self.viewer.transform(image)
        else:
            run, target = self.pretrained
            transform = evaluation_transform(run, target, build_mask_generator(run, self.grid))
            transform.crop_fraction = 1.0
            with sample_randomness(0, 0, 0) as rng:
                views = transform(image, rng)
        views["mask"] = torch.from_numpy(mask)
        return {name: view[None].to(self.viewer.device) for name, view in views.items()}

    def blocks(self, patches: int, seed: int) -> Mask:
        """Draws a mask of blocks; :class:`InputError` for more patches than blocks can cover."""
        generator = mask_generator(patches, self.viewer.model)
        if generator is None:
            return np.zeros(self.grid, dtype=bool)
        with sample_randomness(seed, 0, 0) as rng:
            return generator(rng)

    def canvas(self, image: Image.Image, mask: Mask, query: Query) -> Image.Image:
        """Draws what the model sees, large, with the masked patches grey and the query patch framed."""
        batch = self.batch(image, mask)
        picture = F.to_pil_image(hide_patches(to_unit_range(batch["image"]), batch["mask"])[0].cpu())
        picture = picture.resize((picture.width * self.zoom, picture.height * self.zoom), Image.Resampling.NEAREST)
        height, width = picture.height // self.grid[0], picture.width // self.grid[1]
        frame = Image.new("RGB", (width, height), "#D55E00")
        inner = (query[1] * width + 3, query[0] * height + 3)
        patch = picture.crop((*inner, inner[0] + width - 6, inner[1] + height - 6))
        picture.paste(frame, (query[1] * width, query[0] * height))
        picture.paste(patch, inner)
        return picture

    @torch.no_grad()
    def predict(self, image: Image.Image, mask: Mask, steps: int) -> tuple[list[tuple[Image.Image, str]], str]:
        """Fills in the masked patches; returns pictures with titles, and the score in words."""
        if self.pretrained is None or not mask.any():
            return [], ""
        (run, target), batch = self.pretrained, self.batch(image, mask)
        objective = MaskedPrediction(target, *normalization(run.imagenet_default_mean_and_std))
        outputs = fill_in(partial(objective.outputs_of_all, self.viewer.model), target, batch, steps)
        panels, scores = versions(outputs, target, batch)
        pictures = [(F.to_pil_image(images[0].clamp(0, 1)), title) for title, images in panels.items()]
        try:
            sure = target.confidence(outputs)[0].exp().view(self.grid).cpu()
        except InputError:  # of what has none
            return pictures, scores[0]
        heat = sure.masked_fill(~torch.from_numpy(mask), torch.nan)
        figure = pictures_figure([[Picture(panels["image"][0], heat, limits=(0.0, 1.0))]], bar=True)
        return [*pictures, (figure_image(figure), "confidence")], scores[0]

    @torch.no_grad()
    def attend(self, image: Image.Image, mask: Mask, query: Query, block: int, head: str) -> Image.Image:
        """Draws where a patch attends to in a block: in one head, their ``mean``, or ``all`` side by side."""
        model, batch = self.viewer.model, self.batch(image, mask)
        inputs = normalize(batch["image"], self.viewer.mean, self.viewer.std)
        probabilities = model.get_attention_maps(inputs, block, batch["mask"] if mask.any() else None)
        maps = query_maps(probabilities.float(), [query], self.grid)[0].cpu()
        heads = parse_heads([head], model.num_heads)
        rows = attention_rows(to_unit_range(batch["image"])[0].cpu(), maps, [query], heads)
        return figure_image(pictures_figure(rows, f"Attention in block {block}"))

    def classify(self, image: Image.Image) -> dict[str, float]:
        """Returns the five likeliest classes with their probabilities."""
        return dict(inference_model(self.viewer.model, image)["top5"])

    def segmentation(self, image: Image.Image) -> Image.Image:
        """Draws the segmentation with its legend, of a smaller copy of a large image."""
        assert self.segment is not None
        image.thumbnail((LONGEST, LONGEST))
        return figure_image(self.segment(image))


def open_exhibit(source: str, device: str, tokenizer: str = "", folder: str = "") -> Exhibit:
    """Opens a checkpoint; the tokenizer of a pre-trained one is the given, the recorded, or that of ``folder``.

    Raises :class:`InputError` if it cannot be opened.
    """
    kind, missing = kind_of(resolve(source)), ""
    if kind == PRETRAINED:
        place = select_device(device, 0)
        try:
            run, model, target = open_pretrained(source, tokenizer or moved_tokenizer(source, folder), place)
        except InputError as error:
            missing = f"No predictions: {error}"
        else:
            mean, std = normalization(run.imagenet_default_mean_and_std)
            transform = ClassificationEvalTransform(model.img_size, crop_pct=1)
            return Exhibit(Viewer(transform, mean, std, model.eval().requires_grad_(False)), (run, target))
    viewer = open_viewer(ViewerOptions(checkpoint=source), device)
    return Exhibit(viewer, None, locate(SEGMENTATION_FIGURES)(source, device) if kind == SEGMENTOR else None, missing)


def moved_tokenizer(source: str, folder: str) -> str:
    """Returns the tokenizer of a run where ``folder`` holds it under its name, as of a demo that was moved."""
    recorded = str(settings_in(load_checkpoint(resolve(source), mmap=True)).get("discrete_vae_weight_path") or "")
    if not recorded or Path(recorded).exists() or not Path(folder).is_dir():
        return ""
    return next((str(path) for path in sorted(Path(folder).rglob(Path(recorded).name))), "")
