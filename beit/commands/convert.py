"""`beit convert`: a checkpoint of any dialect in another one, or as a graph that runs without this library."""

import importlib.util
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from beit.checkpoints.formats import from_official, huggingface, mmseg, timm
from beit.checkpoints.formats.recorded import RECORDED
from beit.checkpoints.formats.segmentation import (
    PARTS,
    POOL_SCALES,
    heads_of,
    incomplete,
    is_segmentor,
    leaves_zero_out,
)
from beit.checkpoints.load import Architecture, Metadata, architecture_of, class_names, read_weights
from beit.checkpoints.read import FILE_METADATA, taps_of
from beit.commands.settings import ConvertConfig
from beit.data.transforms import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from beit.errors import InputError
from beit.relative_position import relative_position_index
from beit.storage import atomic_write, save_checkpoint
from beit.targets import VISUAL_TOKENS
from beit.zoo import build, open_model

logger = logging.getLogger(__name__)

TARGETS = ("unilm", "huggingface", "timm", "mmsegmentation", "mmpretrain", "onnx", "torch_export")
SEGMENTATION_TARGETS = ("unilm", "huggingface", "mmsegmentation")
FILE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
CROP_FROM = 384  # from this size on, published models are evaluated on the whole image
LAYER_NORM_EPS = 1e-6  # of ours and of timm's
TOLERANCE = 1e-4  # of a graph's outputs against ours, in float32


def main(config: ConvertConfig) -> None:
    """Writes a checkpoint in another format.

    Raises:
        InputError: The checkpoint cannot be read, or the format has no such model.
    """
    if not config.to:
        raise InputError(f"--to is missing: one of {', '.join(TARGETS)}")
    if config.features and config.to not in ("onnx", "torch_export"):
        raise InputError(f"--features is for onnx and torch_export; {config.to} holds the whole model")
    destination = Path(config.output)
    if config.to in ("onnx", "torch_export"):
        export_graph(config.checkpoint, destination, config.to, features=config.features)
    else:
        convert(config.checkpoint, destination, config.to)
    logger.info("%s written", destination)


def convert(source: str | Path, destination: Path, to: str) -> None:
    """Writes a checkpoint in another dialect; the numbers stay as they are, bit by bit.

    Args:
        source: What :func:`beit.checkpoints.load.resolve` takes.
        destination: A file; for ``huggingface`` a folder, for ``timm`` either.
        to: One of :data:`beit.checkpoints.formats.DIALECTS`.

    Raises:
        InputError: The checkpoint cannot be read or is incomplete, or the dialect has no such model.
    """
    _check_destination(destination, to)
    weights, metadata = read_weights(source)
    if is_segmentor(weights):
        _convert_segmentor(weights, metadata, destination, to)
        return
    architecture = architecture_of(weights, metadata)
    if (target := metadata.get("target", VISUAL_TOKENS)) != VISUAL_TOKENS and to != "unilm":
        logger.warning("the head of %s predicts %s, which %s will take for a vocabulary", source, target, to)
    weights = _complete(weights, architecture, str(source))
    labels = class_names(metadata, architecture.arguments.get("num_classes", 0))
    translated = from_official(weights, to, position_index=_position_index(architecture))
    if to == "huggingface":
        _write_huggingface(destination, translated, architecture, metadata, labels)
    elif to == "timm":
        _write_timm(destination, translated, architecture, metadata, labels)
    else:
        key = "model" if to == "unilm" else "state_dict"
        settings = {"args": metadata["args"]} if "args" in metadata else {}
        save_checkpoint(destination, {key: translated, **settings, **_recorded(architecture, metadata, labels)})


def _convert_segmentor(weights: dict[str, Tensor], metadata: Metadata, destination: Path, to: str) -> None:
    """Writes a segmentor whole: the backbone as of other models, the heads by their names and shapes."""
    _check_segmentation_target(to, metadata)
    architecture = architecture_of(weights, metadata)
    weights = _complete_segmentor(weights, architecture, metadata["source"])
    recorded = metadata.get("labels") or ()
    labels = [str(label) for label in recorded] if len(recorded) == heads_of(weights).num_classes else None
    if to == "huggingface":
        _write_huggingface_segmentor(destination, weights, architecture, metadata, labels)
        return
    translated = from_official(weights, to, position_index=_position_index(architecture))
    palette = [list(colour) for colour in metadata["palette"]] if "palette" in metadata else None
    meta = mmseg.meta(labels, palette, legacy=to == "unilm")
    settings = {"args": metadata["args"]} if "args" in metadata else {}
    content = {"state_dict": translated, "meta": meta, **settings, **_recorded(architecture, metadata, labels)}
    save_checkpoint(destination, content)


def _check_segmentation_target(to: str, metadata: Metadata) -> None:
    if to not in SEGMENTATION_TARGETS:
        raise InputError(
            f"{metadata['source']} is a segmentor, and --to {to} has no heads of segmentation: convert it to one of "
            f"{', '.join(SEGMENTATION_TARGETS)}"
        )


def _complete_segmentor(weights: Mapping[str, Tensor], architecture: Architecture, source: str) -> dict[str, Tensor]:
    """Keeps backbone, pyramid and heads, and makes sure that nothing is missing."""
    a = architecture.arguments
    if missing := incomplete(weights, a["embed_dim"], a["patch_size"][0]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{source} is not a whole segmentor: it lacks {missing[0]}{more}, or they have other sizes")
    parts = {name: tensor for name, tensor in weights.items() if name.startswith(PARTS)}
    backbone = {name: tensor for name, tensor in weights.items() if name not in parts}
    return _complete(backbone, architecture, source, headless=True) | parts


def _write_huggingface_segmentor(
    folder: Path, weights: dict[str, Tensor], architecture: Architecture, metadata: Metadata, labels: Any
) -> None:
    heads, taps = heads_of(weights), taps_of(weights, metadata)
    arguments = architecture.arguments | {"num_classes": heads.num_classes}
    if huggingface.needs_inert_layer(taps, depth := arguments["depth"]):
        weights = huggingface.with_inert_layer(weights, depth)
        arguments["depth"] = depth + 1
        logger.info("transformers cannot tap a model's last layer: the export has an inert layer %d after it", depth)
    if metadata.get("auxiliary_index", huggingface.AUXILIARY_INDEX) != huggingface.AUXILIARY_INDEX:
        logger.warning("transformers' auxiliary head sees the third tap, this one another: its logits will differ")
    eps = metadata.get("layer_norm_eps", LAYER_NORM_EPS)
    config = huggingface.segmentation_json(
        huggingface.config_json(arguments, layer_norm_eps=eps, labels=labels),
        heads,
        taps=taps,
        pool_scales=metadata.get("pool_scales", POOL_SCALES),
        palette=metadata.get("palette"),
    )
    # Segmentors are trained and tested on images that were resized bilinearly, whatever their backbones learnt from.
    usual = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    images = preprocessing(architecture, usual | metadata | {"interpolation": "bilinear"})
    zero = leaves_zero_out(metadata, heads.num_classes)
    _write_json(folder / "config.json", config)
    prepared = huggingface.segmentation_preprocessor_json(config["image_size"], images, zero=zero)
    _write_json(folder / "preprocessor_config.json", prepared)
    _write_safetensors(folder / "model.safetensors", from_official(weights, "huggingface"))


def _recorded(architecture: Architecture, metadata: Metadata, labels: Any) -> dict[str, Any]:
    """Returns what weights do not tell, for the formats that have no place of their own for it."""
    found = {key: metadata[key] for key in RECORDED if key in metadata and key != "labels"}
    found |= {"num_heads": architecture.arguments["num_heads"], "image_size": architecture.arguments["img_size"]}
    return found | ({"labels": list(labels)} if labels else {})


def _check_destination(destination: Path, to: str) -> None:
    is_file = destination.suffix in FILE_SUFFIXES
    if to == "huggingface" and is_file:
        raise InputError(f"--to huggingface writes a folder, not a file such as {destination}")
    if to not in ("huggingface", "timm") and destination.suffix not in (".pth", ".pt"):
        raise InputError(f"--to {to} writes one file: name it {destination.with_suffix('.pth')}")
    if not is_file and destination.is_file():
        raise InputError(f"{destination} is a file; a folder is to be written there")


def _complete(
    weights: Mapping[str, Tensor], architecture: Architecture, source: str, *, headless: bool = False
) -> dict[str, Tensor]:
    """Keeps what belongs to the model, in its order, and makes sure that nothing is missing.

    Args:
        weights: In official names.
        architecture: Of the model.
        source: What to call it.
        headless: It has no norm after the last block either.
    """
    with torch.device("meta"):
        own = build(architecture).state_dict()
    if headless:
        own = {name: tensor for name, tensor in own.items() if not name.startswith(("norm.", "fc_norm."))}
    if missing := [name for name in own if name not in weights]:
        raise InputError(f"{source} is not a whole model: it lacks {missing[0]} and {len(missing) - 1} more tensors")
    if left_out := [name for name in weights if name not in own]:
        logger.warning("left out, no part of BEiT: %s (%d tensors)", left_out[0], len(left_out))
    return {name: weights[name] for name in own}


def _position_index(architecture: Architecture) -> Tensor | None:
    a = architecture.arguments
    if not (a["use_rel_pos_bias"] or a["use_shared_rel_pos_bias"]):
        return None
    (height, width), (patch_height, patch_width) = a["img_size"], a["patch_size"]
    return relative_position_index((height // patch_height, width // patch_width))


def preprocessing(architecture: Architecture, metadata: Metadata) -> dict[str, Any]:
    """Returns mean, standard deviation, crop and interpolation: as recorded, else those of the published models."""
    crop_pct = 0.875 if min(architecture.arguments["img_size"]) < CROP_FROM else 1.0
    return {
        "mean": list(metadata.get("mean", IMAGENET_INCEPTION_MEAN)),
        "std": list(metadata.get("std", IMAGENET_INCEPTION_STD)),
        "crop_pct": metadata.get("crop_pct") or crop_pct,
        "interpolation": metadata.get("interpolation", "bicubic"),
    }


def _write_huggingface(
    folder: Path, tensors: dict[str, Tensor], architecture: Architecture, metadata: Metadata, labels: Any
) -> None:
    arguments = architecture.arguments
    eps = metadata.get("layer_norm_eps", LAYER_NORM_EPS)
    config = huggingface.config_json(arguments, layer_norm_eps=eps, labels=labels)
    _write_json(folder / "config.json", config)
    images = huggingface.preprocessor_json(arguments["img_size"], preprocessing(architecture, metadata))
    _write_json(folder / "preprocessor_config.json", images)
    _write_safetensors(folder / "model.safetensors", tensors)


def _write_timm(
    destination: Path, tensors: dict[str, Tensor], architecture: Architecture, metadata: Metadata, labels: Any
) -> None:
    recorded = _recorded(architecture, metadata, labels)
    if destination.suffix == ".safetensors":
        _write_safetensors(destination, tensors, recorded)
    elif destination.suffix in FILE_SUFFIXES:
        save_checkpoint(destination, {"state_dict": tensors, **recorded})
    else:
        height, width = architecture.arguments["img_size"]
        if height != width and _position_index(architecture) is not None:
            raise InputError(
                f"timm takes the tables in a folder for those of a square, and this model sees {height} x {width} "
                f"pixels: write a file, {destination.with_suffix('.safetensors')}, and load it with load_state_dict"
            )
        config = timm.config_json(architecture.arguments, preprocessing(architecture, metadata), labels)
        _write_json(destination / "config.json", config)
        _write_safetensors(destination / "model.safetensors", tensors, recorded)
    if (eps := metadata.get("layer_norm_eps", LAYER_NORM_EPS)) != LAYER_NORM_EPS:
        logger.warning(
            "timm computes with a layer_norm_eps of %g, and this model was made with %g", LAYER_NORM_EPS, eps
        )
    if architecture.masked:
        logger.info("timm has no mask token and no token head: load it with pretrained_strict=False, as features")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], recorded: Mapping[str, Any] | None = None) -> None:
    metadata = {"format": "pt"} | ({FILE_METADATA: json.dumps(recorded)} if recorded else {})
    with atomic_write(path) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata))


def export_graph(source: str | Path, destination: Path, to: str, *, features: bool = False) -> None:
    """Writes a classifier as a graph for any batch size, and checks its outputs against the model's.

    Args:
        source: What :func:`beit.checkpoints.load.resolve` takes.
        destination: The file to write.
        to: ``onnx`` or ``torch_export``.
        features: Write the features ``(B, D)`` that enter the head, not its logits.

    Raises:
        InputError: The checkpoint is no classifier, a library is missing, or the graph computes other numbers.
    """
    suffix = ".onnx" if to == "onnx" else ".pt2"
    if destination.suffix != suffix:
        raise InputError(f"--to {to} writes one file: name it {destination.with_suffix(suffix)}")
    if to == "onnx":
        _require_onnx()
    model, metadata = open_model(source)
    if metadata.get("segmentation"):
        _check_segmentation_target(to, metadata)
    if to == "onnx":
        model.set_attention("eager")  # ONNX has plain operations for it; torch's own fused one does not decompose
    channels = model.patch_embed.proj.in_channels
    graph = Features(model) if features or not hasattr(model, "head") else model
    images = torch.randn(2, channels, *model.img_size, generator=torch.Generator().manual_seed(0))
    write: Callable[[nn.Module, Tensor, Path], Callable[[Tensor], Tensor]] = (
        _write_onnx if to == "onnx" else _write_torch_export
    )
    run = write(graph, images, destination)
    with torch.no_grad():
        for batch in (images, torch.cat((images, images.flip(3)))[:3]):
            difference = (run(batch) - graph(batch)).abs().max().item()
            if not difference <= TOLERANCE:
                destination.unlink()
                raise InputError(
                    f"the graph of {source} differs from the model by {difference:.1e}; nothing is written"
                )
    logger.info("checked against the model: the outputs differ by at most %.1e", difference)


class Features(nn.Module):
    """What enters a classifier's head, ``(B, D)``; of a pre-training model all tokens, ``(B, N + 1, D)``.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Takes images ``(B, C, H, W)``."""
        return self.model.forward_features(images)  # type: ignore[operator]


def _exported(graph: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(graph, (images,), dynamic_shapes=({0: batch},))


def _write_torch_export(graph: nn.Module, images: Tensor, destination: Path) -> Callable[[Tensor], Tensor]:
    program = _exported(graph, images)
    with atomic_write(destination) as file:
        torch.export.save(program, file)
    return torch.export.load(destination).module()


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--to onnx needs {' and '.join(missing)}: `pip install beit[onnx]`; --to torch_export does not"
        )


def _write_onnx(graph: nn.Module, images: Tensor, destination: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    program = torch.onnx.export(
        _exported(graph, images), input_names=["images"], output_names=["output"], dynamo=True, verbose=False
    )
    assert program is not None
    with atomic_write(destination) as file:
        file.write(program.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(str(destination), providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
