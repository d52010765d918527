"""``beit visualize attention``, ``distance`` and ``bias``: where patches look, how far, and their position biases."""

import logging
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from beit.commands.settings import AttentionConfig, BiasConfig, DistanceConfig
from beit.commands.visualize_inputs import Viewer, open_viewer
from beit.data.datasets import sample_randomness
from beit.data.index import image_files
from beit.data.transforms import normalize, to_unit_range
from beit.errors import InputError
from beit.inference import OneImage, block_number
from beit.masking import BlockwiseMaskGenerator
from beit.modeling import Backbone
from beit.visualization.attention import (
    Query,
    attention_by_block,
    bias_images_of,
    check_queries,
    default_queries,
    mean_distances,
    patch_distances,
    query_maps,
)
from beit.visualization.figures import SIGNED, Picture, check_picture, draw_pictures
from beit.visualization.plots import draw_heads
from beit.visualization.reconstructions import hide_patches, in_colours

logger = logging.getLogger(__name__)

MAX_COLUMNS = 8
MIN_MASK_BLOCK = 16  # patches, as in pre-training
NOTE = "Each map: attention probabilities of the patch marked by a ring, dark = 0, bright = the map's maximum."
CLASS_TOKEN_ENTRIES = "c→p      p→c      c→c"
BIAS_NOTE = (
    "The query patch is at the centre of each square; all share one colour scale. Below each: the bias from the class "
    "token to patches (c→p), from patches to the class token (p→c) and from the class token to itself (c→c)."
)


@torch.no_grad()
def attention(config: AttentionConfig) -> None:
    """Draws the attention maps of chosen patches; raises InputError for what is missing: block, head, patch, image."""
    check_picture(config.output, config.overwrite)
    asked = [parse_query(text) for text in config.query]
    paths = image_files(config.images, config.limit)
    viewer = open_viewer(config)
    model, grid = viewer.model, viewer.model.patch_embed.grid_size
    block, heads = block_number(model, config.block), parse_heads(config.heads, model.num_heads)
    check_queries(asked, grid)
    queries, masks = asked or default_queries(grid), mask_generator(config.mask_patches, model)
    rows: list[list[Picture]] = []
    headings = {}
    for number, path in enumerate(paths):
        view = viewer.view(path)
        with sample_randomness(config.seed, 0, number) as rng:
            mask = None if masks is None else torch.from_numpy(masks(rng))[None].to(viewer.device)
        probabilities = model.get_attention_maps(normalize(view, viewer.mean, viewer.std), block, mask)
        maps = query_maps(probabilities.float(), queries, grid)[0].cpu()  # (queries, heads, h, w)
        shown = in_colours(to_unit_range(view))
        headings[len(rows)] = "/".join(Path(str(path)).parts[-2:])  # file names alone can repeat in class folders
        rows += attention_rows((shown if mask is None else hide_patches(shown, mask))[0].cpu(), maps, queries, heads)
    kind = f"Block {block} of {model.get_num_layers()} (from 0), {model.img_size[0]} x {model.img_size[1]} pixels"
    title = f"Attention maps: {Path(config.checkpoint).name}"
    draw_pictures(config.output, rows, title, note=f"{kind}. {NOTE}", headings=headings)
    logger.info("%s written", config.output)


def attention_rows(
    image: Tensor, maps: Tensor, queries: Sequence[Query], heads: Sequence[int | None]
) -> list[list[Picture]]:
    """Arranges the maps ``(queries, heads of the model, h, w)`` of an image ``(3, H, W)`` in [0, 1].

    There is a row per query, or a single row if there is one map per query. A head of None is the mean of all.
    """
    height, width = maps.shape[-2:]
    rows = []
    for number, (row, column) in enumerate(queries):
        name, mark = f"patch {row},{column}", ((column + 0.5) / width, (row + 0.5) / height, number)
        titles = ["mean of heads" if head is None else f"head {head}" for head in heads] if len(heads) > 1 else [name]
        pictures = [Picture(image, marks=(mark,), title=name)]
        for head, title in zip(heads, titles, strict=True):
            heat = maps[number].mean(dim=0) if head is None else maps[number, head]
            pictures.append(Picture(image, heat, marks=(mark,), title=f"{title}, max {heat.max().item():.1%}"))
        rows.append(pictures)
    if len(heads) == 1:
        marks = tuple(mark for row in rows for mark in row[0].marks)
        rows = [[Picture(image, marks=marks, title="image"), *(row[1] for row in rows)]]
    lines = []
    for pictures in rows:  # a long row becomes several of nearly equal length
        length = math.ceil(len(pictures) / math.ceil(len(pictures) / MAX_COLUMNS))
        lines += [pictures[start : start + length] for start in range(0, len(pictures), length)]
    return lines


def parse_query(text: str) -> Query:
    """Reads ``3,5`` as the patch in row 3 and column 5; raises InputError for any other form."""
    if not re.fullmatch(r"\d+,\d+", text):
        raise InputError(f"--query {text}: give patches as ROW,COLUMN, counted from 0, such as --query 3,5 7,7")
    row, column = map(int, text.split(","))
    return row, column


def parse_heads(words: Sequence[str], heads: int) -> list[int | None]:
    """Reads head numbers, ``all`` and ``mean`` (None); raises InputError if there is no such head."""
    known: dict[str, Sequence[int | None]] = {str(head): [head] for head in range(heads)}
    known |= {"all": range(heads), "mean": [None]}
    if unknown := next((word for word in words if word not in known), ""):
        raise InputError(f"--heads {unknown}: the model has heads 0 to {heads - 1}; or give all or mean")
    return list(dict.fromkeys(head for word in words for head in known[word]))


def mask_generator(patches: int, model: Backbone) -> BlockwiseMaskGenerator | None:
    """Returns a generator of masks of so many patches, None for none; raises InputError where they cannot be masked."""
    if patches and not model.has_mask_token:
        raise InputError("--mask_patches needs a pre-trained model: a classifier has no mask token")
    try:
        smallest = min(MIN_MASK_BLOCK, max(1, patches // 4))
        return BlockwiseMaskGenerator(model.patch_embed.grid_size, patches, smallest) if patches else None
    except InputError as error:
        raise InputError(f"--mask_patches {patches}: {error}") from error


def distance(config: DistanceConfig) -> None:
    """Draws the mean attention distance of each head of each block, and writes the numbers to standard output."""
    check_picture(config.output, config.overwrite)
    paths = image_files(config.images, config.limit)
    viewer = open_viewer(config)
    found = distances_of(viewer, paths)
    for number, heads in enumerate(found.tolist()):
        listed = " ".join(f"{head:6.1f}" for head in heads)
        sys.stdout.write(f"block {number:2}  mean {sum(heads) / len(heads):6.1f} pixels  heads {listed}\n")
    embedding, (height, width) = viewer.model.patch_embed, viewer.model.img_size
    uniform = patch_distances(embedding.grid_size, embedding.patch_size).mean().item()
    title = f"Attention distance: {Path(config.checkpoint).name}, {len(paths)} images of {height} x {width}"
    draw_heads(config.output, found, "mean attention distance (pixels)", title, ("uniform attention", uniform))
    logger.info("%s written", config.output)


@torch.no_grad()
def distances_of(viewer: Viewer, images: Sequence[OneImage]) -> Tensor:
    """Returns the mean attention distance over some images, in pixels, float64 ``(blocks, heads)``."""
    embedding = viewer.model.patch_embed
    distances = patch_distances(embedding.grid_size, embedding.patch_size)
    summed = torch.zeros(viewer.model.get_num_layers(), viewer.model.num_heads, dtype=torch.float64)
    for image in images:  # one by one: at a high resolution the probabilities of one image fill the memory
        inputs = normalize(viewer.view(image), viewer.mean, viewer.std)
        blocks = [mean_distances(maps, distances)[0] for maps in attention_by_block(viewer.model, inputs)]
        summed += torch.stack(blocks)
    return summed / len(images)


def bias(config: BiasConfig) -> None:
    """Draws the relative position bias of each head; raises InputError if the checkpoint has none, or is missing."""
    check_picture(config.output, config.overwrite)
    tables = bias_images_of(open_viewer(config).model)
    if not tables:
        raise InputError(f"{config.checkpoint} has no relative position bias, but absolute position embeddings")
    most = max(max(table.grids.abs().max().item() for table in tables), 1e-6)
    rows: list[list[Picture]] = []
    for table in tables:
        titles = [f"head {head}" if not rows else "" for head in range(len(table.grids))]
        # Each number below its name, with a minus as wide as a plus.
        numbers = ("   ".join(f"{n:+.2f}" for n in three).replace("-", "−") for three in table.class_token.tolist())
        captions = (f"{CLASS_TOKEN_ENTRIES}\n{line}" for line in numbers)
        pictures = zip(table.grids, titles, captions, strict=True)
        rows.append([Picture(heat=grid, limits=(-most, most), title=t, caption=c) for grid, t, c in pictures])
    title, names = f"Relative position bias: {Path(config.checkpoint).name}", [table.name for table in tables]
    draw_pictures(config.output, rows, title, note=BIAS_NOTE, row_names=names, colours=SIGNED, bar=True)
    logger.info("%s written", config.output)
