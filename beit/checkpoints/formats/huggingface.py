"""Hugging Face's ``Beit…`` models: the names in their FILES (those in memory change between versions), and configs.

A file keeps query, key and value apart, the key without a bias. The final norm needs care: ``layernorm`` is at the top
level before a token head and below ``beit`` otherwise.

In a segmentor the pyramid is at the top level and ``conv_seg`` is called ``classifier``. Its ``out_indices`` count from
the embedding and are compared one step later: ``i`` taps our block ``i - 2``. There is no such number for the last
block, so the export of a model that taps it has one more layer, an inert one.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from beit.checkpoints.formats.dialect import Content, Dialect, Files, NameTable, Weights, WholeModel, replace_prefix
from beit.checkpoints.formats.recorded import RECORDED, positive, readable, whole
from beit.checkpoints.formats.segmentation import LEVELS, PARTS, POOL_SCALES, Heads, leaves_zero_out, taps_of
from beit.checkpoints.formats.unilm import INDEX, SHARED_TABLE, TABLE, bare
from beit.errors import InputError, listed

logger = logging.getLogger(__name__)

PREFIX = "beit."
FINAL_NORM = "layernorm."
QKV = re.compile(r"(?:beit\.)?encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.weight")

_NAMES = NameTable(
    outside={
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        SHARED_TABLE: f"encoder.relative_position_bias.{TABLE}",
        "norm": "layernorm",
        "fc_norm": "pooler.layernorm",
    },
    inside={
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.q_bias": "attention.attention.query.bias",
        "attn.k_bias": "attention.attention.key.bias",  # of plain ViTs
        "attn.v_bias": "attention.attention.value.bias",
        f"attn.{TABLE}": f"attention.attention.relative_position_bias.{TABLE}",
        "attn.proj": "attention.output.dense",
        "gamma_1": "lambda_1",
        "gamma_2": "lambda_2",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    blocks="encoder.layer",
    heads={
        "head.": "classifier.",
        "lm_head.": "lm_head.",
        "decode_head.conv_seg.": "decode_head.classifier.",
        "auxiliary_head.conv_seg.": "auxiliary_head.classifier.",
    },
)
TAP_SHIFT = 2
CONFIG_TAPS = (3, 5, 7, 11)  # of a config that has none
AUXILIARY_INDEX = 2  # which of the taps the library's auxiliary head sees
PREPROCESSOR = "preprocessor_config.json"
_KEYS = {"num_heads": "num_attention_heads", "labels": "id2label", "mean": "image_mean", "std": "image_std"}
_KEYS |= {"interpolation": "resample", "crop_pct": "size"}
EPS = "layer_norm_eps"
KEEP_THE_RATIO = ("Bit", "CLIP")  # processors for which one number is the shorter edge
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


def to_official(state_dict: Weights) -> dict[str, Tensor]:
    """Translates the names of a file; names of other heads stay as they are.

    Raises :class:`InputError` if a layer lacks its query, key or value, or if there are two final norms.
    """
    state_dict = {bare(name): tensor for name, tensor in state_dict.items()}
    if any(name.startswith(FINAL_NORM) for name in state_dict) and f"{PREFIX}{FINAL_NORM}weight" in state_dict:
        raise InputError("the model has a final norm of its own and one before the token head; no BEiT has two")
    weights: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        if match := QKV.fullmatch(name):
            layers.setdefault(match[1], {})[match[2]] = tensor
        elif not name.endswith(INDEX):
            renamed = _NAMES.official(own := name.removeprefix(PREFIX))
            weights[name if renamed == own else renamed] = tensor
    for layer, parts in layers.items():
        if missing := {"query", "key", "value"} - parts.keys():
            raise InputError(f"layer {layer} of the Hugging Face checkpoint has no {' and no '.join(sorted(missing))}")
        weights[f"blocks.{layer}.attn.qkv.weight"] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return weights


def from_official(weights: Weights, _position_index: Tensor | None = None) -> dict[str, Tensor]:
    """Translates official names to a file's: contiguous tensors, with zeros for missing query and value biases."""
    masked = any(name.startswith("lm_head.") for name in weights)
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if head := replace_prefix(name, _NAMES.heads):
            result[head] = tensor
        elif match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.weight", name):
            result |= _split(int(match[1]), tensor, biased=f"blocks.{match[1]}.attn.q_bias" in weights)
        elif name.startswith(PARTS):
            result[name] = tensor
        elif not name.endswith(INDEX):
            theirs = _NAMES.theirs(name) or name
            result[theirs if masked and theirs.startswith(FINAL_NORM) else PREFIX + theirs] = tensor
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in result.items()}


def _split(layer: int, qkv: Tensor, *, biased: bool) -> dict[str, Tensor]:
    prefix = f"{PREFIX}encoder.layer.{layer}.attention.attention"
    parts = dict(zip(("query", "key", "value"), qkv.chunk(3), strict=True))
    names = {f"{prefix}.{part}.weight": tensor for part, tensor in parts.items()}
    if not biased:
        names |= {f"{prefix}.{part}.bias": qkv.new_zeros(len(parts[part])) for part in ("query", "value")}
    return names


def _folder(model: WholeModel, _destination: Path) -> Files:
    size = model.arguments["img_size"]
    if model.heads is None:
        config, weights = _config(model, model.arguments), model.weights
        squash = model.images["crop_mode"] == "squash"
        height, width = (int(side / model.images["crop_pct"]) for side in size)
        images = {
            # The library's own processor for BEiT resizes each side by itself; another one keeps the aspect ratio.
            "image_processor_type": "BeitImageProcessor" if squash else "BitImageProcessor",
            "size": {"height": height, "width": width} if squash else {"shortest_edge": min(height, width)},
            "do_center_crop": True,
            "crop_size": {"height": size[0], "width": size[1]},
            "crop_pct": model.images["crop_pct"],  # ours: the quotient of the two sizes is rounded
        }
    else:
        config, weights = _segmentor(model, model.heads)
        images = {  # resized to a square, as the library has no sliding window
            "image_processor_type": "BeitImageProcessor",
            "size": {"height": size[0], "width": size[1]},
            "do_center_crop": False,
            "do_reduce_labels": leaves_zero_out(model.metadata, model.heads.num_classes),
        }
    preprocessor = {
        "do_resize": True,
        "resample": RESAMPLE[model.images["interpolation"]],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.images["mean"]),
        "image_std": list(model.images["std"]),
        "do_convert_rgb": model.arguments["in_chans"] == 3,
    }
    files: Files = {"config.json": config, "preprocessor_config.json": images | preprocessor}
    return files | {"model.safetensors": from_official(weights)}


def _config(model: WholeModel, arguments: Content) -> Content:
    height, width = arguments["img_size"]
    patch, other = arguments["patch_size"]
    tables = arguments["use_rel_pos_bias"] or arguments["use_shared_rel_pos_bias"]
    if patch != other or (height != width and (tables or arguments["use_abs_pos_emb"])):
        what = f"{height} x {width} pixels in patches of {patch} x {other}"
        raise InputError(f"transformers takes tables and positions for a square's, not for {what}: use a square size")
    masked = "vocab_size" in arguments
    config = {
        "architectures": ["BeitForMaskedImageModeling" if masked else "BeitForImageClassification"],
        "model_type": "beit",
        "hidden_size": arguments["embed_dim"],
        "num_hidden_layers": arguments["depth"],
        "num_attention_heads": arguments["num_heads"],
        "intermediate_size": int(arguments["embed_dim"] * arguments["mlp_ratio"]),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "image_size": height if height == width else [height, width],
        "patch_size": patch,
        "num_channels": arguments["in_chans"],
        "layer_norm_eps": model.layer_norm_eps,  # the library's default is another
        "layer_scale_init_value": arguments["init_values"] or 0.0,
        "use_mask_token": masked,
        "use_absolute_position_embeddings": arguments["use_abs_pos_emb"],
        "use_relative_position_bias": arguments["use_rel_pos_bias"],
        "use_shared_relative_position_bias": arguments["use_shared_rel_pos_bias"],
        "use_mean_pooling": masked or arguments["use_mean_pooling"],
    }
    if masked:
        return config | {"vocab_size": arguments["vocab_size"]}
    names = dict(enumerate(model.labels or [f"LABEL_{index}" for index in range(arguments["num_classes"])]))
    # Two classes of ImageNet have the same name, which label2id maps to the first.
    numbers = {label: index for index, label in reversed(names.items())}
    return config | {"id2label": {str(index): label for index, label in names.items()}, "label2id": numbers}


def _segmentor(model: WholeModel, heads: Heads) -> tuple[Content, dict[str, Tensor]]:
    """Returns the config and the weights of a segmentor, with an inert layer if it taps its last block."""
    taps = taps_of(model.weights, model.metadata)
    weights = model.weights
    arguments = model.arguments | {"num_classes": heads.num_classes}
    if max(taps) == (depth := arguments["depth"]) - 1:
        weights, arguments["depth"] = _with_inert_layer(weights, depth), depth + 1
        logger.info("transformers cannot tap the last layer of a model: layer %d is added, which does nothing", depth)
    if model.metadata.get("auxiliary_index", AUXILIARY_INDEX) != AUXILIARY_INDEX:
        logger.warning("transformers' auxiliary head sees the third tap, this one another: its logits will differ")
    config = _config(model, arguments)
    scales, palette = model.metadata.get("pool_scales", POOL_SCALES), model.metadata.get("palette")
    _check_segmentor(config, heads, taps, scales)
    config |= {
        "architectures": ["BeitForSemanticSegmentation"],
        "out_indices": [tap + TAP_SHIFT for tap in taps],
        "pool_scales": list(scales),
        "use_auxiliary_head": heads.auxiliary_channels > 0,
        "auxiliary_channels": heads.auxiliary_channels or 256,
        "auxiliary_num_convs": heads.auxiliary_convs or 1,
        "auxiliary_concat_input": heads.auxiliary_concat,
        "auxiliary_loss_weight": 0.4,
        "semantic_loss_ignore_index": 255,
    }
    return config | ({"palette": palette} if palette else {}), weights  # unknown keys of a config are kept there


def _check_segmentor(config: Content, heads: Heads, taps: Sequence[int], scales: Sequence[int]) -> None:
    size, width, channels = config["image_size"], config["hidden_size"], heads.channels
    needed = {
        f"its only decode head is UPerNet, and this one is {heads.kind or 'another'}": heads.kind == "uper",
        f"decode head and backbone have one width there, and here {channels} and {width} channels": channels == width,
        "its pyramid is the one for patches of 16 pixels, and these are of 8": config["patch_size"] != 8,
        f"it only segments square images, not {size} pixels": isinstance(size, int),
        f"it taps four blocks in ascending order, and here they are {listed(taps, 9)}": len(taps) == LEVELS
        and list(taps) == sorted(set(taps)),
        f"the {heads.stages} scales at which UPerNet pools are not recorded": len(scales) == heads.stages,
        "the auxiliary head is another": heads.auxiliary_convs > 0 or not heads.auxiliary_channels,
    }
    if why := next((why for why, fits in needed.items() if not fits), ""):
        raise InputError(f"transformers has no such segmentor: {why}; convert it to unilm or mmsegmentation")


def _with_inert_layer(weights: Weights, depth: int) -> dict[str, Tensor]:
    last = f"blocks.{depth - 1}."
    block = {name.removeprefix(last): tensor for name, tensor in weights.items() if name.startswith(last)}
    return {**weights, **{f"blocks.{depth}.{name}": torch.zeros_like(tensor) for name, tensor in block.items()}}


def without_inert_layer(weights: Weights, taps: Sequence[int]) -> dict[str, Tensor]:
    """Removes the block after the last tapped one if it is the last block and returns its input."""
    last = f"blocks.{max(taps) + 1}."
    block = {name: tensor for name, tensor in weights.items() if name.startswith(last)}
    scales = [tensor for name, tensor in block.items() if ".gamma_" in name]
    inert = not any(tensor.any() for tensor in scales or block.values())
    if not inert or any(name.startswith(f"blocks.{max(taps) + 2}.") for name in weights):
        return dict(weights)
    return {name: tensor for name, tensor in weights.items() if name not in block}


def read_segmentation(config: Content, preprocessor: Content) -> Content:
    """Returns the taps (as we count them), scales, colours and labels in the two files beside a segmentor's weights.

    Raises :class:`InputError` if it taps what no block computes.
    """
    given = config.get("out_indices") or config.get("semantic_out_indices") or CONFIG_TAPS
    indices = RECORDED["out_indices"](given) or ()
    taps = tuple(sorted({index - TAP_SHIFT for index in indices}))
    if len(taps) != LEVELS or taps[0] < 0:
        needed = f"four different ones, from {TAP_SHIFT} on, which taps the first layer"
        raise InputError(f"the Hugging Face segmentor has out_indices {given!r:.40}: needed are {needed}")
    found: Content = {"out_indices": taps, "auxiliary_index": AUXILIARY_INDEX}
    found |= {key: config.get(key) for key in ("pool_scales", "palette")}
    found["reduce_zero_label"] = preprocessor.get("do_reduce_labels", preprocessor.get("reduce_labels"))
    return readable(found, "config.json or preprocessor_config.json", reduce_zero_label="do_reduce_labels")


def read_config(config: Content, preprocessor: Content) -> Content:
    """Returns what the two files beside the weights record about the model, the images and the classes.

    Raises :class:`InputError` for a model that computes something else.
    """
    if (activation := config.get("hidden_act", "gelu")) not in ("gelu", "gelu_python"):
        raise InputError(f"the Hugging Face model has the activation {activation!r:.40}, and BEiT's is gelu")
    found = {ours: config.get(theirs) for theirs, ours in (("num_attention_heads", "num_heads"), (EPS, EPS))}
    found["image_size"] = size = config.get("image_size")
    tables = config.get("use_relative_position_bias") or config.get("use_shared_relative_position_bias")
    if tables and isinstance(size, (list, tuple)) and len({*map(str, size)}) > 1:
        raise InputError(f"transformers reads the tables of images of {size} pixels as those of a square, unlike BEiT")
    found["labels"] = labels = RECORDED["labels"](config.get("id2label")) or config.get("id2label") or None
    if isinstance(labels, tuple) and labels == tuple(f"LABEL_{index}" for index in range(len(labels))):
        del found["labels"]
    return readable(found, "config.json", **_KEYS) | readable(_read_images(preprocessor), PREPROCESSOR, **_KEYS)


def _read_images(preprocessor: Content) -> Content:
    """Returns how ``preprocessor_config.json`` prepares images; a warning names what cannot be done here."""
    factor = positive(preprocessor.get("rescale_factor")) or 1 / 255
    scale = 255 * factor if preprocessor.get("do_rescale", True) else 255.0
    found: Content = {}
    for theirs, ours, plain in (("image_mean", "mean", 0.0), ("image_std", "std", 1.0)):
        value = preprocessor.get(theirs) if preprocessor.get("do_normalize", True) else [plain] * 3
        known = RECORDED[ours](value)
        found[ours] = value if known is None or math.isclose(scale, 1) else [number / scale for number in known]
    number = preprocessor.get("resample")
    found["interpolation"] = next((name for name, known in RESAMPLE.items() if known == number), number)
    if not preprocessor.get("do_resize", True):
        logger.warning("preprocessor_config.json: do_resize false is passed over: images are resized to fit the model")
        return found
    size = preprocessor.get("size")
    resized, cropped = (_edge(preprocessor.get(key)) for key in ("size", "crop_size"))
    found["crop_pct"] = None if size is None else size if resized is None else 1.0
    kind = str(preprocessor.get("image_processor_type") or preprocessor.get("feature_extractor_type"))
    if resized and cropped and preprocessor.get("do_center_crop", kind.startswith(KEEP_THE_RATIO)):
        found["crop_pct"] = cropped / resized
        # What our export wrote beside the sizes counts as long as nobody has changed those.
        recorded = RECORDED["crop_pct"](preprocessor.get("crop_pct"))
        if recorded and int(cropped / recorded) == resized:
            found["crop_pct"] = recorded
    sides = size if isinstance(size, Mapping) else {}
    odd = {
        f"size {size}": sides.get("height") != sides.get("width"),
        "do_flip_channel_order": preprocessor.get("do_flip_channel_order"),
        f"the processor {kind}": kind != "None" and not kind.startswith((*KEEP_THE_RATIO, "Beit", "ViT", "DeiT")),
    }
    if passed_over := [name for name, is_odd in odd.items() if is_odd]:
        logger.warning(
            "preprocessor_config.json: images are prepared otherwise here, for all that can be told, in respect of %s",
            ", ".join(passed_over),
        )
    if resized:
        edge = "shortest_edge" in size if isinstance(size, Mapping) else kind.startswith(KEEP_THE_RATIO)
        found["crop_mode"] = "center" if edge else "squash"
    return found


def _edge(size: object) -> int | None:
    """Returns the shorter edge of a size: a number, or a dict of edges; None if it is neither."""
    if isinstance(size, Mapping):
        edges = [size.get(key) for key in ("shortest_edge", "height", "width") if key in size]
        return min(filter(None, map(whole, edges)), default=None)
    return whole(size)


HUGGINGFACE = Dialect(
    matches=lambda names: any(
        "embeddings.patch_embeddings.projection." in name or "encoder.layer.0." in name for name in names
    ),
    to_official=to_official,
    from_official=from_official,
    folder=_folder,
    suffixes=(),
    segmentors=True,
)
