"""Reading a checkpoint of any dialect: weights in official names, and what is recorded beside them.

A source is resolved to a file (:mod:`beit.checkpoints.released`), its state dict is translated to official names
(:mod:`beit.checkpoints.formats`), and the weights are loaded into a model (:mod:`beit.checkpoints.load`).

The metadata is a plain dict. A key is present only if the file, its neighbours or the table of released files have it:
``source``, ``dialect``, ``args`` (settings of the run), ``labels`` (class names), ``image_size`` ``(H, W)`` in pixels,
``window`` ``(h, w)`` in patches, ``mean``, ``std``, ``crop_pct``, ``crop_mode`` (``center`` or ``squash``),
``interpolation``, ``num_heads``, ``layer_norm_eps``, ``target`` (what it was trained to predict of a patch),
``tokenizer`` (a hash of its weights), ``guessed`` (what was assumed, as nobody recorded it). A segmentor also has
``segmentation`` (True), ``out_indices``
(blocks that are tapped, from 0), ``pool_scales`` (of UPerNet), ``auxiliary_index`` (the tap that the auxiliary head
sees), ``palette`` (class colours), ``reduce_zero_label`` (0 is no class in label maps). Its weights are named
``blocks.…``, ``fpn1.…``, ``fpn2.…``, ``decode_head.…``, ``auxiliary_head.…``, without the ``backbone.`` of its files.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from beit.checkpoints.formats import UNKNOWN, huggingface, mmseg, recognise, relative, timm, to_official
from beit.checkpoints.formats.dialect import Content, Weights
from beit.checkpoints.formats.recorded import RECORDED, whole
from beit.checkpoints.formats.relatives import EVA_WIDTH, PLAIN_VIT
from beit.checkpoints.formats.segmentation import PARTS, PUBLISHED_TAPS, depth_of, is_segmentor
from beit.checkpoints.formats.unilm import INDEX, SHARED_TABLE, TABLE, one_model
from beit.checkpoints.released import (
    CONFIG,
    FOLDER_WEIGHTS,
    PIECES_INDEX,
    PREPROCESSOR,
    released_at,
    resolve,
    shards_of,
)
from beit.data.preprocessing import COLOURS, default_crop_pct, normalization
from beit.errors import InputError, counted, listed
from beit.modeling import Backbone, VisionTransformer, VisionTransformerForMaskedImageModeling
from beit.relative_position import num_table_rows
from beit.storage import check_form, load_checkpoint, read_json, settings_in

logger = logging.getLogger(__name__)

STATE_KEYS = ("model", "module", "state_dict", "model_ema")
HEAD_WIDTH = 64  # channels of an attention head in every published model but EVA
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, EVA_WIDTH: 16}  # by width
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # EVA's too
IMAGENET_CLASSES = (1000, 21841, 21843)
AXES = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
MATRICES = (TABLE, "head.weight", "mlp.fc1.weight")
MODEL_PARTS = (  # beginnings of its names
    *("cls_token", "mask_token", "pos_embed", "patch_embed.", "rel_pos_bias.", "blocks.", "norm.", "fc_norm.", "head."),
    *("lm_head.", "cls_pt_", *PARTS),
)
RECORDED_BY_A_RUN = (  # also among its settings; the second row by segmentation
    *("labels", "mean", "std", "crop_pct", "crop_mode", "interpolation"),
    *("out_indices", "pool_scales", "auxiliary_index", "reduce_zero_label"),
)
FILE_METADATA = "beit"  # under which a safetensors file, which holds only tensors and strings, has the rest as JSON

Metadata = Content


def read_weights(
    source: str | Path, model_key: str = "", prefix: str = "", *, num_heads: int | None = None
) -> tuple[dict[str, Tensor], Metadata]:
    """Returns a checkpoint's weights in official names, without index buffers, and the metadata described above.

    Args:
        source: Anything :func:`beit.checkpoints.released.resolve` accepts.
        model_key: Where in the file the weights are, alternatives separated by ``|``; by default a usual key.
        prefix: Take only names that begin with this prefix, and remove it.
        num_heads: Attention heads per block, for files that do not record them; bias tables show them.

    Raises:
        InputError: There is no such checkpoint, it cannot be read, or it is of another kind of model.
    """
    path = resolve(source)
    source = path if path.parent == Path(source).expanduser() else source  # the file that was found in a run folder
    content, config, preprocessor = _read(path)
    state = _find_state(content, model_key, prefix, str(source))
    _refuse_relative(recognise(state), source)  # before its parts are taken for several models
    state = one_model(state, str(source))
    dialect = recognise(state)
    _refuse_relative(dialect, source)
    if dialect == UNKNOWN:
        raise InputError(f"{source} holds no BEiT: its tensors are called {listed(state) or 'nothing'}")
    for name, tensor in state.items():
        odd = tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized
        if odd or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"{source} cannot be used: its {name} is sparse, quantized, or more than the file holds")
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > 2 * sum(held.values()):
        raise InputError(f"{source} cannot be used: its tensors repeat each other and would fill the memory")
    weights = to_official(state, dialect)
    blank = _check_tensors(weights, str(source))
    metadata: Metadata = {"source": str(source), "dialect": dialect}
    if (released := released_at(path)) is not None:
        metadata |= {key: getattr(released, key) for key in ("mean", "std", "crop_pct", "interpolation")}
        metadata["image_size"] = (released.input_size, released.input_size)
    if "architecture" in config:
        metadata |= timm.read_config(config)
    else:
        metadata |= huggingface.read_config(config, preprocessor)
    metadata |= mmseg.read_meta(content)
    if (window := _window_of_index(state)) is not None:
        metadata["window"] = window
    if is_segmentor(weights):
        metadata["segmentation"] = True
        if dialect == "huggingface":
            metadata |= huggingface.read_segmentation(config, preprocessor)
            weights = _segmentor_of_huggingface(weights, metadata["out_indices"])
    if blank := [name for name in blank if name in weights]:
        logger.warning("%s is probably damaged: all zeros in %s; fetch or copy it again", source, listed(blank))
    return weights, metadata | _recorded(content) | ({} if num_heads is None else {"num_heads": num_heads})


def _refuse_relative(dialect: str, source: str | Path) -> None:
    if (other := relative(dialect)) is not None and not other.to_official:
        raise InputError(f"{source} is {other.name}, not BEiT: {other.remark}")


def _check_tensors(weights: Weights, source: str) -> list[str]:
    """Raises :class:`InputError` for what no model can be filled with; tensors that are no part of one pass.

    Returns the weights of the backbone that are all zeros, as no initialisation or training leaves them.
    """
    blank = []
    for name, tensor in weights.items():
        if not name.startswith(MODEL_PARTS) or name.endswith("num_batches_tracked"):
            continue
        axes = 2 if name.endswith(MATRICES) else AXES.get(name, tensor.ndim)
        if not tensor.is_floating_point():
            raise InputError(f"{source} cannot be used: its {name} is of {tensor.dtype}, not of floating point numbers")
        if tensor.ndim != axes or not tensor.numel():
            raise InputError(f"{source} is not a BEiT: it has a {name} of shape {tuple(tensor.shape)}")
        low, high = (tensor.float() if tensor.element_size() < 4 else tensor).aminmax()  # one pass; NaN if any is
        if name.startswith(("patch_embed.", "blocks.")) and name.endswith(".weight") and low == high == 0:
            blank.append(name)
        if not (low.isfinite() and high.isfinite()):
            raise InputError(f"{source} cannot be used: its {name} has values that are NaN or infinite; take another")
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if odd := blocks ^ {str(number) for number in range(len(blocks) or 1)}:
        raise InputError(f"{source} is not a whole model: it has no blocks 0, 1, 2, … in a row ({listed(sorted(odd))})")
    return blank


def _read(path: Path) -> tuple[Mapping, Content, Content]:
    """Returns what is in a file, and in the two JSON files that may lie beside it."""
    if (path / PIECES_INDEX).is_file():
        from beit.checkpoints.pieces import read_whole  # torch.distributed.checkpoint is slow to import, seldom needed

        return read_whole(path, optimizer=False), {}, {}
    if path.is_dir():
        found = [path / name for name in FOLDER_WEIGHTS if (path / name).is_file()]
        if not found:
            checkpoints = sorted(entry.name for entry in path.glob("*.pth"))
            hint = f"; give one of its files: {', '.join(checkpoints[-3:])}" if checkpoints else ""
            raise InputError(f"the folder {path} holds no {', '.join(FOLDER_WEIGHTS[::2])} or checkpoint-….pth{hint}")
        path = found[0]
    content: Content = {}
    for file in shards_of(path) if path.name.endswith(".index.json") else [path]:
        part = load_checkpoint(file)
        if not isinstance(part, Mapping):
            raise InputError(f"{file} is of type {type(part).__name__}, not a dict of weights")
        content |= _file_metadata(file) | dict(part)
    if path.name not in FOLDER_WEIGHTS:
        return content, {}, {}
    config, preprocessor = (
        read_json(file) if file.is_file() else {} for file in map(path.with_name, (CONFIG, PREPROCESSOR))
    )
    return content, config, preprocessor


def _file_metadata(path: Path) -> Content:
    """Reads what ``beit convert`` writes beside safetensors; nothing if another program uses that name."""
    if check_form(path, whole=False) != "safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        recorded = (file.metadata() or {}).get(FILE_METADATA, "{}")
    try:
        found = json.loads(recorded)
    except (ValueError, RecursionError):
        return {}
    return {key: found[key] for key in RECORDED if key in found} if isinstance(found, dict) else {}


def _find_state(content: Mapping, model_key: str, prefix: str, source: str) -> dict[str, Tensor]:
    """Finds the weights: under the keys asked for, at the top level, or under a usual key or the only one with any."""
    asked, held = model_key.split("|") if model_key else STATE_KEYS, listed(content) or "nothing"
    found = _first_mapping(content, asked)
    if found is None:
        flat = _tensors(content)
        if not flat and not set(asked) & set(STATE_KEYS[:3]):
            raise InputError(f"{source} has nothing under {' or '.join(asked)!r}; it has {held}")
        found = flat or _first_mapping(content, STATE_KEYS)
    if found is None:
        holding = [key for key, value in content.items() if isinstance(value, Mapping) and _tensors(value)]
        if len(holding) != 1:
            raise InputError(f"{source} has no weights under {', '.join(STATE_KEYS)}; it has {held}")
        logger.info("%s: taking the weights under %s", source, holding[0])
        found = content[holding[0]]
    state = _tensors(_first_mapping(found, STATE_KEYS) or found)
    if not prefix:
        return state
    if not (kept := {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}):
        raise InputError(f"no name in {source} begins with {prefix!r}")
    return kept


def _first_mapping(content: Mapping, keys: Sequence[str]) -> Mapping | None:
    return next((content[key] for key in keys if isinstance(content.get(key), Mapping)), None)


def _tensors(content: Mapping) -> dict[str, Tensor]:
    return {name: t for name, t in content.items() if isinstance(name, str) and isinstance(t, Tensor)}


def _segmentor_of_huggingface(weights: Weights, taps: tuple[int, ...]) -> dict[str, Tensor]:
    """Returns a segmentor's weights without a layer that only an export needed; a warning where its taps look wrong."""
    weights, shift = huggingface.without_inert_layer(weights, taps), huggingface.TAP_SHIFT
    if (published := PUBLISHED_TAPS.get(depth_of(weights))) == tuple(tap + shift for tap in taps):
        logger.warning(
            "taking blocks %s, which is what transformers computes for out_indices %s; if the weights were "
            "converted from an official file learnt with blocks %s: %s in config.json",
            *(taps, published, published, [tap + shift for tap in published]),
        )
    return weights


def _recorded(content: Mapping) -> Metadata:
    """Returns what a run's checkpoint records about its images and classes, at the top level or in its settings."""
    settings = dict(settings_in(content))
    found: Metadata = {"args": settings} if settings else {}
    if isinstance(flag := settings.get("imagenet_default_mean_and_std"), bool):
        found |= dict(zip(("mean", "std"), normalization(flag), strict=True))
    keywords = settings.get("model_kwargs")
    in_settings = {key: settings.get(key) for key in RECORDED_BY_A_RUN} | {
        "image_size": settings.get("input_size", settings.get("crop_size")),
        "num_heads": keywords.get("num_heads") if isinstance(keywords, Mapping) else None,
    }
    for place in (in_settings, content):  # the top level takes precedence
        for key, read in RECORDED.items():
            if (value := read(place.get(key))) is not None:
                found[key] = value
    return found


def _window_of_index(state: Weights) -> tuple[int, int] | None:
    """Reads the patch grid off an index buffer: along a row of patches the index grows by one, at its end by more."""
    index = next((tensor for name, tensor in state.items() if name.endswith(INDEX)), None)
    if index is None or index.ndim != 2 or min(index.shape) < 2:
        return None
    steps = (index[1:, 1] - index[1, 1]).tolist()
    width = next((patch for patch, step in enumerate(steps) if step != patch), len(steps))
    return len(steps) // width, width


@dataclass(frozen=True)
class Architecture:
    """The model that weights belong to."""

    masked: bool  # whether it predicts visual tokens (VisionTransformerForMaskedImageModeling) or classes
    arguments: Content  # of its constructor

    def build(self) -> Backbone:
        """Builds the model, of layer norms with an eps of 1e-6: loading weights sets another one."""
        return (VisionTransformerForMaskedImageModeling if self.masked else VisionTransformer)(**self.arguments)


def window_of(weights: Weights, metadata: Metadata, fallback: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Returns the patch grid ``(h, w)`` that tables and positions were trained with; None if there are none.

    What is recorded comes first, then ``fallback``, a model's own grid, then a square, which is a guess. Raises
    :class:`InputError` if no grid fits.
    """
    rows = next((len(tensor) for name, tensor in weights.items() if name.endswith(TABLE)), None)
    positions = weights["pos_embed"].shape[1] - 1 if "pos_embed" in weights else None
    if rows is None and positions is None:
        return None
    patch = weights["patch_embed.proj.weight"].shape[2:]
    side = (math.isqrt(max(rows - 3, 0)) + 1) // 2 if rows is not None else math.isqrt(max(positions or 0, 0))
    square = side, side

    def fits(window: tuple[int, int] | None) -> bool:
        if window is None or min(window) < 1 or (positions is not None and window[0] * window[1] != positions):
            return False
        return rows is None or num_table_rows(window) == rows

    height, width = metadata.get("image_size", (0, 0))
    recorded = metadata.get("window"), (height // patch[0], width // patch[1])
    held = f"a bias table of {rows} rows" if rows is not None else f"{positions} positions"
    window = next(filter(fits, (*recorded, fallback, square)), None)
    if window is None:
        source = metadata.get("source", "the checkpoint")
        raise InputError(f"{source} has {held}, no square, and no image size: give the model that of its training")
    if not any(map(fits, recorded)) and not window == fallback == square:
        guess(metadata, f"{window[0]} x {window[1]} patches for {held} (img_size= of create_model settles it)")
    return window


def guess(metadata: Metadata, *what: str) -> None:
    """Warns once of what is assumed, as nobody recorded it, and keeps it in ``metadata["guessed"]``."""
    guessed = metadata.get("guessed", [])
    if new := [assumption for assumption in what if assumption not in guessed]:
        metadata["guessed"] = [*guessed, *new]
        source = metadata.get("source", "the checkpoint")
        logger.warning("%s does not say everything; assuming %s", source, "; ".join(new))


def architecture_of(weights: Weights, metadata: Metadata, *, images: bool = False) -> Architecture:
    """Returns the model that weights in official names belong to; for a segmentor its backbone, without classes.

    With ``images`` it is to be used as recorded: what is not recorded of images and classes is assumed, and said.
    Raises :class:`InputError` if the number of heads or the patch grid cannot be determined, or a part is missing.
    """
    source = metadata.get("source", "the checkpoint")
    for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        if name not in weights:
            raise InputError(f"{source} is not a whole model: it lacks {name}")
    # A classifier or segmentor of Hugging Face may keep the mask token of its pre-training, and DINOv2 always does.
    segmentor = is_segmentor(weights)
    classifier = segmentor or {"head.weight", "fc_norm.weight"} & weights.keys() or metadata.get("dialect") == PLAIN_VIT
    masked = "lm_head.weight" in weights or ("mask_token" in weights and not classifier)
    embed_dim, in_chans, *patch = weights["patch_embed.proj.weight"].shape
    table = next((tensor for name, tensor in weights.items() if name.endswith(TABLE)), None)
    if (grid := window_of(weights, metadata)) is None:
        if not metadata.keys() & {"num_heads", "args"}:
            problem = f"{source} has neither bias tables nor position embeddings, and does not say that it needs none"
            raise InputError(f"{problem}: if it is a BEiT, load it into a model without positions")
        height, width = metadata.get("image_size", (224, 224))
        grid = height // patch[0], width // patch[1]
    heads = table.shape[1] if table is not None else metadata.get("num_heads") or PUBLISHED_HEADS.get(embed_dim)
    assumed = []
    if heads is None:
        heads = next(number for number in range(max(1, embed_dim // HEAD_WIDTH), 0, -1) if embed_dim % number == 0)
        assumed.append(f"{counted(heads, 'attention head')} of {embed_dim // heads} channels (num_heads= settles it)")
    if embed_dim % heads:
        raise InputError(f"{source}: {embed_dim} channels cannot be split into {heads} heads")
    classes = len(weights["head.weight"]) if "head.weight" in weights and not masked else 0
    guess(metadata, *assumed, *(_unrecorded(metadata, classes) if images else ()))
    hidden_dim = len(weights["blocks.0.mlp.fc1.weight"])
    ratio = hidden_dim / embed_dim  # times embed_dim it may round to below the hidden dimension
    arguments: Content = {
        "img_size": (grid[0] * patch[0], grid[1] * patch[1]),
        "patch_size": tuple(patch),
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": depth_of(weights),
        "num_heads": heads,
        "mlp_ratio": ratio if int(embed_dim * ratio) == hidden_dim else (hidden_dim + 0.5) / embed_dim,
        "qkv_bias": "blocks.0.attn.q_bias" in weights,
        "init_values": 0.1 if "blocks.0.gamma_1" in weights else None,
        "use_abs_pos_emb": "pos_embed" in weights,
        "use_rel_pos_bias": f"blocks.0.attn.{TABLE}" in weights,
        "use_shared_rel_pos_bias": SHARED_TABLE in weights,
    }
    if masked:
        head = weights.get("lm_head.weight")
        further = _further_blocks(weights, metadata)
        return Architecture(True, {**arguments, **further, "vocab_size": 8192 if head is None else len(head)})
    mean_pooling = segmentor or "fc_norm.weight" in weights or "norm.weight" not in weights
    return Architecture(False, arguments | {"num_classes": classes, "use_mean_pooling": mean_pooling})


def _further_blocks(weights: Weights, metadata: Metadata) -> Content:
    """Returns what a model was built with to predict through the class token too, as in BEiT v2's pre-training."""
    if not (blocks := {name.split(".")[1] for name in weights if name.startswith("cls_pt_layers.")}):
        return {}
    early = whole(metadata.get("args", {}).get("early_layers"))  # None where the run took the model's own
    if early is None and depth_of(weights) not in (12, 24) and "args" not in metadata:
        guess(metadata, "that the last blocks but three feed the second prediction (early_layers= settles it)")
    return {"head_layers": len(blocks), "early_layers": early, "shared_lm_head": "cls_pt_lm_head.weight" not in weights}


def preparation_of(metadata: Metadata, img_size: tuple[int, int], in_chans: int = COLOURS) -> Content:
    """Returns how to prepare images of ``(H, W)`` pixels: as recorded, or else as for the published models.

    What is recorded of another number of channels does not count. The keys are ``mean``, ``std``, ``crop_pct``,
    ``crop_mode`` and ``interpolation``.
    """
    beit_v2 = Path(metadata.get("source", "")).name.startswith("beitv2_")
    mean, std = normalization(imagenet=beit_v2 or metadata.get("segmentation", False))
    if metadata.get("dialect") == "EVA":
        mean, std = CLIP_MEAN, CLIP_STD
    if in_chans != COLOURS:
        mean = std = (0.5,) * in_chans
    recorded = {key: metadata[key] for key in ("mean", "std") if len(metadata.get(key, ())) == in_chans}
    return {
        "mean": list(recorded.get("mean", mean)),
        "std": list(recorded.get("std", std)),
        "crop_pct": metadata.get("crop_pct") or default_crop_pct(img_size),
        "crop_mode": metadata.get("crop_mode", "center"),
        "interpolation": metadata.get("interpolation", "bicubic"),
    }


def _unrecorded(metadata: Metadata, classes: int) -> Iterator[str]:
    """Yields the mean, standard deviation and class names that a model will be used with unless they are recorded."""
    settles = "metadata= of inference_model settles it"
    if not {"mean", "std"} <= metadata.keys():
        known = preparation_of(metadata, (0, 0))
        yield f"images of mean {known['mean']} and standard deviation {known['std']} ({settles})"
    if classes in IMAGENET_CLASSES and not metadata.get("labels") and released_at(metadata.get("source", "")) is None:
        yield f"that its {classes} classes are ImageNet's, in their order ({settles}: labels)"


def class_names(metadata: Metadata, num_classes: int) -> tuple[str, ...] | None:
    """Returns the class names: the recorded ones, or ImageNet's if their number fits, or None."""
    recorded = metadata.get("labels")
    if recorded and len(recorded) == num_classes:
        return tuple(map(str, recorded))
    if num_classes not in IMAGENET_CLASSES:
        return None
    from timm.data import ImageNetInfo, infer_imagenet_subset  # reads word lists of some megabytes

    subset = infer_imagenet_subset({"num_classes": num_classes})
    return tuple(ImageNetInfo(subset).label_descriptions()) if subset else None
