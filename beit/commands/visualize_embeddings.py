"""``beit visualize embeddings``: features of a folder of images in the plane, coloured by class."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from beit.commands.visualize_inputs import Viewer, check_block, open_viewer, spread
from beit.config import Size, option
from beit.data.datasets import ImageIndex, UnreadableImageError, index_images, read_image
from beit.errors import InputError
from beit.features import FrozenFeatures
from beit.tasks.settings import AMP_CHOICES
from beit.training.precision import Precision, resolve_amp_dtype
from beit.visualization.embeddings import METHODS, check_embedding, embed, group_by_class
from beit.visualization.figures import check_picture_name
from beit.visualization.plots import draw_points

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddingsConfig:
    """The arguments of ``beit visualize embeddings``."""

    data_path: str = option("", "folder with a folder of images for each class, or shards-{000..127}.tar with classes")
    checkpoint: str = option("", "any BEiT: a path, a released name, a URL or a hub id")
    block: int = option(-1, "the block whose output is taken, from 0 on, or from the end if negative")
    pool: str = option("mean", "what is taken of it", choices=("mean", "cls", "cls_mean"))
    method: str = option("pca", "how features come into the plane", choices=tuple(METHODS))
    size: Size | None = option(None, "size of the images, in pixels (HEIGHTxWIDTH or one number); the model's own")
    limit: int = option(2000, "most images, taken evenly from all classes")
    batch_size: int = option(64, "images per batch")
    seed: int = option(0, "seed of t-SNE")
    output: str = option("embeddings.png", "the picture to write, .png or .svg", short="-o")
    device: str = option("cpu", "cuda, cpu or mps")
    amp_dtype: str = option("auto", "number format of the forward pass", choices=AMP_CHOICES)


def embeddings(config: EmbeddingsConfig) -> None:
    """Draws features of images as points, coloured by class.

    Raises:
        InputError: A folder without classes, or a checkpoint or block that there is not.
    """
    check_picture_name(config.output)
    if not 0 <= config.seed < 2**32:  # scikit-learn takes no other
        raise InputError(f"--seed {config.seed}: must be from 0 to {2**32 - 1}")
    index = find_classes(config.data_path)
    check_embedding(min(len(index), config.limit), config.method)
    viewer = open_viewer(config.checkpoint, config.size, config.device)
    precision = Precision(resolve_amp_dtype(config.amp_dtype, viewer.device), viewer.device)
    frozen = FrozenFeatures(
        viewer.model,
        layers=(check_block(config.block, viewer.model),),
        pools=(config.pool,),
        mean=viewer.mean,
        std=viewer.std,
        precision=precision,
    )
    features, labels = compute(index, spread(len(index), config.limit), viewer, frozen, config.batch_size)
    embedding = embed(features, config.method, config.seed)
    groups = [(name, embedding.points[where]) for name, where in group_by_class(labels, index.class_names)]
    others = None
    if not groups[-1][0]:
        shown = len(groups) - 1
        rest = len(labels.unique()) - shown
        others = (f"{rest} other class{'es' if rest > 1 else ''}", groups.pop()[1])
    layer, pool = frozen.layers[0], {"mean": "mean of the patches", "cls": "class token"}.get(config.pool, config.pool)
    title = f"{len(labels)} images, block {layer}, {pool}: {Path(config.checkpoint).name}"
    draw_points(config.output, groups, embedding.axes, title, others)
    logger.info("%s written", config.output)


def find_classes(folder: str) -> ImageIndex:
    """Lists a folder of class folders, or shards of images with classes.

    Raises:
        InputError: There is no such folder or shard, or no class in it.
    """
    if not folder:
        raise InputError("--data_path is missing: a folder with a folder of images for each class, or shards")
    index = index_images(folder)
    if not index.class_names:
        raise InputError(
            f"{folder} has no classes: put the images of each class into a folder of its own below it (in shards every "
            "image needs its class in a .cls)"
        )
    return index


def compute(
    index: ImageIndex, numbers: Sequence[int], viewer: Viewer, frozen: FrozenFeatures, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Returns one feature, float32 ``(N, D)``, of the images of an index that can be read, and their classes ``(N,)``.

    Raises:
        InputError: None of them can be read.
    """
    features, labels = [], []
    for views, classes in _batches(index, numbers, viewer, batch_size):
        (found,) = frozen(views.to(viewer.device)).values()
        features.append(found.cpu())
        labels.append(classes)
    if not features:
        raise InputError(f"none of the {len(numbers)} images of {index.root} can be read")
    return torch.cat(features), torch.cat(labels)


def _batches(
    index: ImageIndex, numbers: Sequence[int], viewer: Viewer, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(numbers), batch_size):
        views, classes = [], []
        for number in numbers[start : start + batch_size]:
            try:
                views.append(viewer.transform(read_image(index.file(number)))["image"])
                classes.append(index.class_id(number))
            except (OSError, UnreadableImageError) as error:
                logger.warning("left out %s: %s", index.path(number), error)
        if views:
            yield torch.stack(views), torch.tensor(classes)
