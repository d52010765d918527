"""Writing a checkpoint in another dialect. Tensors are renamed, never computed with: they stay the same bit by bit."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from beit.checkpoints.formats import dialects
from beit.checkpoints.formats.dialect import LAYER_NORM_EPS, Content, Dialect, Weights, WholeModel
from beit.checkpoints.formats.recorded import RECORDED, VISUAL_TOKENS
from beit.checkpoints.formats.segmentation import PARTS, heads_of, incomplete, is_segmentor
from beit.checkpoints.read import (
    FILE_METADATA,
    Architecture,
    Metadata,
    architecture_of,
    class_names,
    preparation_of,
    read_weights,
)
from beit.checkpoints.released import CHECKPOINT_SUFFIXES, CONFIG, FOLDER_WEIGHTS, PREPROCESSOR
from beit.checkpoints.released import resolve as resolve_source
from beit.data.preprocessing import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from beit.errors import InputError, listed
from beit.outputs import JSON_MARK, is_ours
from beit.registry import resolve
from beit.relative_position import relative_position_index
from beit.storage import atomic_write, load_checkpoint, save_checkpoint

logger = logging.getLogger(__name__)


def convert(
    source: str | Path,
    destination: Path,
    to: str,
    model_key: str = "",
    prefix: str = "",
    num_heads: int | None = None,
) -> None:
    """Writes a checkpoint in another dialect, to a file or folder, whichever that is.

    ``to`` is one of :func:`beit.checkpoints.formats.dialects`. The source is given as for
    :func:`beit.checkpoints.read.read_weights`.

    Raises:
        InputError: The checkpoint cannot be read or is incomplete, or the dialect has no such model.
    """
    _dialect_for(destination, to)
    read, written = ([path, path / FOLDER_WEIGHTS[0]] for path in (resolve_source(source), destination))
    if any(a.exists() and b.exists() and a.samefile(b) for a in read for b in written):
        raise InputError(f"{destination} is what is to be converted: write to another name")
    write_checkpoint(*read_weights(source, model_key, prefix, num_heads=num_heads), destination, to)


def write_checkpoint(weights: Weights, metadata: Metadata, destination: Path, to: str) -> None:
    """Writes what :func:`beit.checkpoints.read.read_weights` returns in a dialect, as :func:`convert` does."""
    dialect = _dialect_for(destination, to)
    check_segmentors(to, dialect.segmentors, metadata)
    if (target := metadata.get("target", VISUAL_TOKENS)) != VISUAL_TOKENS and to != "unilm":
        logger.warning("the head of %s predicts %s, which %s takes for a vocabulary", metadata["source"], target, to)
    further = [name for name in weights if name.startswith("cls_pt_")]
    if further and to != "unilm":
        logger.warning("left out, as only BEiT v2's pre-training needs it: %s", listed(further))
        weights = {name: tensor for name, tensor in weights.items() if name not in further}
    model = whole_model(weights, metadata)
    if dialect.folder is not None and destination.suffix not in dialect.suffixes:
        # A dialect that is only a folder has a place of its own for everything.
        recorded = _recorded(model) if dialect.file else {}
        for name, content in dialect.folder(model, destination).items():
            if name.endswith(".safetensors"):
                _write_safetensors(destination / name, content, recorded)
            else:
                with atomic_write(destination / name) as file:
                    file.write((json.dumps(content, indent=2) + "\n").encode())
    elif dialect.file is not None:
        content = dialect.file(model)
        if destination.suffix == ".safetensors":
            _write_safetensors(destination, content["state_dict"], _recorded(model))
        else:
            settings = {"args": metadata["args"]} if "args" in metadata else {}
            save_checkpoint(destination, {**content, **settings, **_recorded(model)})


def _dialect_for(destination: Path, to: str) -> Dialect:
    """Returns the dialect of a format; raises :class:`InputError` if it cannot be written to a destination."""
    dialect: Dialect = resolve(dialects(), to, "format")
    is_file = destination.suffix in CHECKPOINT_SUFFIXES
    if dialect.file is None and is_file:
        raise InputError(f"--to {to} writes a folder, not a file such as {destination}")
    if dialect.folder is None and destination.suffix not in dialect.suffixes:
        raise InputError(f"--to {to} writes one file: name it {destination.with_suffix(dialect.suffixes[0])}")
    if not is_file and destination.is_file():
        raise InputError(f"{destination} is a file, and --to {to} writes a folder")
    if destination.is_dir():
        foreign = [file.name for file in destination.glob("checkpoint-*.pth")]
        if not is_ours(destination / FOLDER_WEIGHTS[0]):
            foreign += [name for name in (CONFIG, PREPROCESSOR, *FOLDER_WEIGHTS) if (destination / name).exists()]
        if foreign:
            raise InputError(f"{destination} holds {listed(foreign)}, which no export replaces: write to another name")
    if not destination.is_file() or not is_file:  # a graph is no checkpoint
        return dialect
    try:
        content = load_checkpoint(destination, mmap=True)
    except InputError as error:
        raise InputError(f"{destination} is no checkpoint that can be read: write to another name") from error
    if any(str(key).startswith(("optimizer", "global_step", "param_groups")) for key in content):
        raise InputError(f"{destination} holds the state of a training run, which would be lost: write to another name")
    return dialect


def check_segmentors(to: str, supported: bool, metadata: Metadata) -> None:
    """Raises an :class:`InputError` for a segmentor unless the format has heads of segmentation."""
    if metadata.get("segmentation") and not supported:
        able = ", ".join(name for name, dialect in dialects().items() if dialect.segmentors)
        raise InputError(f"{metadata['source']} is a segmentor, which --to {to} cannot hold: choose {able}")


def whole_model(weights: Weights, metadata: Metadata) -> WholeModel:
    """Returns the model that a checkpoint holds, with what an export needs to know about it.

    Takes what :func:`beit.checkpoints.read.read_weights` returns and leaves out tensors that are not part of the model;
    raises :class:`InputError` if a part of the model is missing.
    """
    heads = heads_of(weights) if is_segmentor(weights) else None
    architecture = architecture_of(weights, metadata, images=heads is None)
    arguments = architecture.arguments
    images, labels = metadata, class_names(metadata, arguments.get("num_classes", 0))
    if heads is not None:
        labels = metadata.get("labels") or ()
        labels = tuple(map(str, labels)) if len(labels) == heads.num_classes else None
        # Segmentors are trained on images resized bilinearly, whatever their backbones were trained on.
        images = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, **metadata, "interpolation": "bilinear"}
    if "palette" in metadata:
        metadata = {**metadata, "palette": [list(colour) for colour in metadata["palette"]]}
    index = None
    if arguments["use_rel_pos_bias"] or arguments["use_shared_rel_pos_bias"]:
        (height, width), (patch_height, patch_width) = arguments["img_size"], arguments["patch_size"]
        index = relative_position_index((height // patch_height, width // patch_width))
    return WholeModel(
        weights=_complete(weights, architecture, metadata["source"]),
        arguments=arguments,
        metadata=metadata,
        images=preparation_of(images, arguments["img_size"], arguments["in_chans"]),
        labels=list(labels) if labels else None,
        position_index=index,
        heads=heads,
        layer_norm_eps=metadata.get("layer_norm_eps", LAYER_NORM_EPS),
    )


def _complete(weights: Weights, architecture: Architecture, source: str) -> dict[str, Tensor]:
    """Keeps what belongs to the model, in its order; a segmentor has no norm after the last block."""
    parts: dict[str, Tensor] = {}
    with torch.device("meta"):
        own = list(architecture.build().state_dict())
    if is_segmentor(weights):
        if lacking := incomplete(weights, architecture.arguments["patch_size"][0]):
            raise InputError(f"{source} is not a whole segmentor: it lacks {listed(lacking, 1)}")
        parts = {name: tensor for name, tensor in weights.items() if name.startswith(PARTS)}
        own = [name for name in own if not name.startswith(("norm.", "fc_norm."))]
    if missing := [name for name in own if name not in weights]:
        raise InputError(f"{source} is not a whole model: it lacks {listed(missing, 1)}")
    if left_out := [name for name in weights if name not in own and name not in parts]:
        logger.warning("left out, not part of BEiT: %s", listed(left_out))
    return {name: weights[name] for name in own} | parts


def _recorded(model: WholeModel) -> Content:
    """Returns what weights do not show, to be read back by :func:`beit.checkpoints.read.read_weights`."""
    found = {key: model.metadata[key] for key in RECORDED if key in model.metadata and key != "labels"}
    found |= {"num_heads": model.arguments["num_heads"], "image_size": model.arguments["img_size"]}
    return found | ({"labels": model.labels} if model.labels else {})


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], recorded: Content) -> None:
    metadata = {"format": "pt", **JSON_MARK} | ({FILE_METADATA: json.dumps(recorded)} if recorded else {})
    with atomic_write(path) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata))
