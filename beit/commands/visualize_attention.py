"""Pictures of attention: where patches look, how far heads look, and the biases for places that they have learnt."""

import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from beit.commands.visualize_inputs import Shown, Viewer, check_block, image_files, open_viewer
from beit.config import Size, option
from beit.data.datasets import sample_randomness
from beit.data.transforms import normalize, to_unit_range
from beit.errors import InputError
from beit.masking import BlockwiseMaskGenerator
from beit.modeling import Backbone
from beit.visualization.attention import (
    Query,
    attention_by_block,
    check_queries,
    default_queries,
    mean_distances,
    patch_distances,
    query_maps,
)
from beit.visualization.bias import bias_images_of
from beit.visualization.figures import SIGNED, Picture, check_picture_name, draw_pictures
from beit.visualization.plots import draw_heads
from beit.visualization.reconstructions import hide_patches

logger = logging.getLogger(__name__)

MOST_COLUMNS = 8
SMALLEST_BLOCK = 16  # of hidden patches, as in pre-training
NOTE = "Each map: probability of a ring's patch to attend to each other one, dark = 0, bright = its highest."
CLASS_TOKEN_ENTRIES = ("c→p", "p→c", "c→c")
BIAS_NOTE = (
    "The patch that looks is in the middle of each square; one scale of colours for all. Below each: the bias from the "
    "class token to patches (c→p), from patches to the class token (p→c) and from the class token to itself (c→c)."
)


@dataclass(frozen=True)
class AttentionConfig:
    """The arguments of ``beit visualize attention``."""

    images: tuple[str, ...] = option((), "image files, folders of images, or shards-{000..127}.tar", positional=True)
    checkpoint: str = option("", "any BEiT: a path, a released name, a URL or a hub id")
    block: int = option(-1, "the block, from 0 on, or from the end if negative")
    heads: tuple[str, ...] = option(("mean", "all"), "numbers of heads from 0 on, all, or mean for their mean")
    query: tuple[str, ...] = option((), "patches that look, ROW,COLUMN from 0 on; three of them by default")
    size: Size | None = option(None, "size of the images, in pixels (HEIGHTxWIDTH or one number); the model's own")
    mask_patches: int = option(0, "patches to hide from a pre-trained model, in blocks")
    limit: int = option(4, "most images to draw")
    seed: int = option(0, "seed of the masks")
    output: str = option("attention.png", "the picture to write, .png or .svg", short="-o")
    device: str = option("cpu", "cuda, cpu or mps")


@torch.no_grad()
def attention(config: AttentionConfig) -> None:
    """Draws where chosen patches look, head by head.

    Raises:
        InputError: A block, head, patch, image or checkpoint that there is not.
    """
    check_picture_name(config.output)
    if config.mask_patches < 0:
        raise InputError(f"--mask_patches {config.mask_patches}: must be 0 or more")
    asked = [parse_query(text) for text in config.query]
    paths = image_files(config.images, config.limit)
    viewer = open_viewer(config.checkpoint, config.size, config.device)
    model, grid = viewer.model, viewer.model.patch_embed.grid_size
    block = check_block(config.block, model)
    heads = parse_heads(config.heads, model.num_heads)
    check_queries(asked, grid)
    queries, masks = asked or default_queries(grid), mask_generator(config.mask_patches, model)
    rows: list[list[Picture]] = []
    headings = {}
    for number, path in enumerate(paths):
        view, mask = viewer.view(path)[None].to(viewer.device), None
        if masks is not None:
            with sample_randomness(config.seed, 0, number) as rng:
                mask = torch.from_numpy(masks(rng))[None].to(viewer.device)
        probabilities = model.get_attention_maps(normalize(view, viewer.mean, viewer.std), block, mask)
        maps = query_maps(probabilities.float(), queries, grid)[0].cpu()  # (queries, heads, h, w)
        shown = to_unit_range(view)
        headings[len(rows)] = "/".join(Path(str(path)).parts[-2:])  # of a folder of classes the name alone says little
        rows += attention_rows((shown if mask is None else hide_patches(shown, mask))[0].cpu(), maps, queries, heads)
    kind = f"Block {block} of {model.get_num_layers()} (from 0 on), {model.img_size[0]} x {model.img_size[1]} pixels"
    title = f"Where patches look: {Path(config.checkpoint).name}"
    draw_pictures(config.output, rows, title, note=f"{kind}. {NOTE}", headings=headings)
    logger.info("%s written", config.output)


def attention_rows(
    image: Tensor, maps: Tensor, queries: Sequence[Query], heads: Sequence[int | None]
) -> list[list[Picture]]:
    """Arranges the maps of an image: beside the image, a row a query; or all in one row where each has one map.

    Args:
        image: ``(3, H, W)`` in [0, 1].
        maps: ``(queries, heads of the model, h, w)``.
        queries: The patches that look.
        heads: Which heads to show; None for their mean.
    """
    grid = (maps.shape[-2], maps.shape[-1])
    marks = tuple(_mark(query, grid, number) for number, query in enumerate(queries))
    cells = [
        [_map_of(image, maps[number], mark, head, queries[number], len(heads) == 1) for head in heads]
        for number, mark in enumerate(marks)
    ]
    if len(heads) == 1:
        return _lines([Picture(image, marks=marks, title="image"), *(row[0] for row in cells)])
    rows = []
    for number, (row, column) in enumerate(queries):
        rows += _lines(
            [Picture(image, marks=marks[number : number + 1], title=f"patch {row},{column}"), *cells[number]]
        )
    return rows


def _map_of(
    image: Tensor, maps: Tensor, mark: tuple[float, float, int], head: int | None, query: Query, name_query: bool
) -> Picture:
    heat = maps.mean(dim=0) if head is None else maps[head]
    name = f"patch {query[0]},{query[1]}" if name_query else "mean of heads" if head is None else f"head {head}"
    return Picture(image, heat, marks=(mark,), title=f"{name}, max {heat.max().item():.1%}")


def _mark(query: Query, grid: tuple[int, int], number: int) -> tuple[float, float, int]:
    return (query[1] + 0.5) / grid[1], (query[0] + 0.5) / grid[0], number


def _lines(pictures: list[Picture]) -> list[list[Picture]]:
    """Breaks a row that is too long into rows of nearly the same length."""
    lines = -(-len(pictures) // MOST_COLUMNS)
    length = -(-len(pictures) // lines)
    return [pictures[start : start + length] for start in range(0, len(pictures), length)]


def parse_query(text: str) -> Query:
    """Reads ``3,5`` as the patch in row 3 and column 5.

    Raises:
        InputError: It is written otherwise.
    """
    if not re.fullmatch(r"\d+,\d+", text):
        raise InputError(f"--query {text}: give patches as ROW,COLUMN, counted from 0, such as --query 3,5 7,7")
    row, column = text.split(",")
    return int(row), int(column)


def parse_heads(words: Sequence[str], heads: int) -> list[int | None]:
    """Reads numbers of heads, ``all`` and ``mean``; the mean is None.

    Raises:
        InputError: There is no such head.
    """
    found: list[int | None] = []
    for word in words:
        if word == "all":
            found += range(heads)
        elif word == "mean":
            found.append(None)
        elif word.isdecimal() and int(word) < heads:
            found.append(int(word))
        else:
            raise InputError(
                f"--heads {word}: the model has heads 0 to {heads - 1}; all and mean stand for all of them"
            )
    return list(dict.fromkeys(found))


def mask_generator(patches: int, model: Backbone) -> BlockwiseMaskGenerator | None:
    """Returns what draws so many patches to hide from a model's images; None for no patches.

    Raises:
        InputError: The model has never seen a mask, or so many patches cannot be hidden.
    """
    if not patches:
        return None
    if not model.has_mask_token:
        raise InputError("--mask_patches needs a pre-trained model: a classifier has no token for hidden patches")
    height, width = model.patch_embed.grid_size
    if patches > height * width:
        raise InputError(f"--mask_patches {patches}: the image has {height} x {width} = {height * width} patches")
    try:
        smallest = min(SMALLEST_BLOCK, max(1, patches // 4))
        return BlockwiseMaskGenerator((height, width), patches, smallest)
    except InputError as error:
        raise InputError(f"--mask_patches {patches}: {error}") from error


@dataclass(frozen=True)
class DistanceConfig:
    """The arguments of ``beit visualize distance``."""

    images: tuple[str, ...] = option((), "image files, folders of images, or shards-{000..127}.tar", positional=True)
    checkpoint: str = option("", "any BEiT: a path, a released name, a URL or a hub id")
    size: Size | None = option(None, "size of the images, in pixels (HEIGHTxWIDTH or one number); the model's own")
    limit: int = option(32, "most images to take the mean over")
    output: str = option("distance.png", "the picture to write, .png or .svg", short="-o")
    device: str = option("cpu", "cuda, cpu or mps")


def distance(config: DistanceConfig) -> None:
    """Draws how far each head of each block looks; writes the numbers to standard output.

    Raises:
        InputError: A checkpoint or an image that there is not.
    """
    check_picture_name(config.output)
    paths = image_files(config.images, config.limit)
    viewer = open_viewer(config.checkpoint, config.size, config.device)
    found = distances_of(viewer, paths)
    for number, heads in enumerate(found.tolist()):
        listed = " ".join(f"{head:6.1f}" for head in heads)
        sys.stdout.write(f"block {number:2}  mean {sum(heads) / len(heads):6.1f} pixels  heads {listed}\n")
    grid, patch = viewer.model.patch_embed.grid_size, viewer.model.patch_embed.patch_size
    everywhere = patch_distances(grid, patch).mean().item()
    height, width = viewer.model.img_size
    draw_heads(
        config.output,
        found,
        "mean attention distance (pixels)",
        f"How far heads look: {Path(config.checkpoint).name}, {len(paths)} images of {height} x {width}",
        ("attention to all patches alike", everywhere),
    )
    logger.info("%s written", config.output)


@torch.no_grad()
def distances_of(viewer: Viewer, images: Sequence[Shown]) -> Tensor:
    """Returns the mean attention distance over some images, in pixels, float64 ``(blocks, heads)``."""
    embedding = viewer.model.patch_embed
    distances = patch_distances(embedding.grid_size, embedding.patch_size).to(viewer.device)
    summed = torch.zeros(viewer.model.get_num_layers(), viewer.model.num_heads, dtype=torch.float64)
    for image in images:  # one by one: at a high resolution the probabilities of one image fill the memory
        inputs = normalize(viewer.view(image)[None].to(viewer.device), viewer.mean, viewer.std)
        blocks = [mean_distances(maps, distances)[0].cpu() for maps in attention_by_block(viewer.model, inputs)]
        summed += torch.stack(blocks)
    return summed / len(images)


@dataclass(frozen=True)
class BiasConfig:
    """The arguments of ``beit visualize bias``."""

    checkpoint: str = option("", "any BEiT: a path, a released name, a URL or a hub id")
    size: Size | None = option(None, "resize the tables to images of this size, in pixels (HEIGHTxWIDTH or one number)")
    output: str = option("bias.png", "the picture to write, .png or .svg", short="-o")


def bias(config: BiasConfig) -> None:
    """Draws the relative position bias of each head as an image, for each table that the model has.

    Raises:
        InputError: There is no such checkpoint, or it has no tables.
    """
    check_picture_name(config.output)
    viewer = open_viewer(config.checkpoint, config.size, "cpu")
    tables = bias_images_of(viewer.model)
    if not tables:
        raise InputError(
            f"{config.checkpoint} has no relative position bias: it knows places by its position embedding"
        )
    most = max(max(table.grids.abs().max().item() for table in tables), 1e-6)
    rows: list[list[Picture]] = []
    for table in tables:
        titles = [f"head {head}" if not rows else "" for head in range(len(table.grids))]
        captions = map(class_token_caption, table.class_token.tolist())
        pictures = zip(table.grids, titles, captions, strict=True)
        rows.append([Picture(heat=grid, limits=(-most, most), title=t, caption=c) for grid, t, c in pictures])
    draw_pictures(
        config.output,
        rows,
        f"Relative position bias: {Path(config.checkpoint).name}",
        note=BIAS_NOTE,
        row_names=[table.name for table in tables],
        colours=SIGNED,
        bar=True,
    )
    logger.info("%s written", config.output)


def class_token_caption(entries: Sequence[float]) -> str:
    """Returns the three entries of the class token, each under what it is."""
    numbers = "   ".join(f"{value:+.2f}".replace("-", "−") for value in entries)  # a minus as wide as a plus
    return f"{(' ' * 6).join(CLASS_TOKEN_ENTRIES)}\n{numbers}"
