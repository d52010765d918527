"""Hugging Face's ``Beit…`` models: the names in their FILES (those in memory change between versions), and configs.

A file keeps query, key and value apart, the key without a bias. The other name that needs care is ``layernorm``: the
final norm, before the token head at the top level and otherwise below ``beit``.

Of a segmentor the pyramid stands at the top level and ``conv_seg`` is a ``classifier``. Its ``out_indices`` count from
the embedding and are compared one further on: ``i`` taps our block ``i - 2``. There is no such number for the last
block, so an export of a model that taps it has one more layer, an inert one.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from beit.checkpoints.formats.names import NameTable
from beit.checkpoints.formats.segmentation import LEVELS, PARTS, Heads
from beit.checkpoints.formats.unilm import INDEX, TABLE, bare
from beit.errors import InputError

PREFIX = "beit."
FINAL_NORM = "layernorm."
QKV = re.compile(r"(?:beit\.)?encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.weight")

_NAMES = NameTable(
    outside={
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        f"rel_pos_bias.{TABLE}": f"encoder.relative_position_bias.{TABLE}",
        "norm": "layernorm",
        "fc_norm": "pooler.layernorm",
    },
    inside={
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.q_bias": "attention.attention.query.bias",
        "attn.v_bias": "attention.attention.value.bias",
        f"attn.{TABLE}": f"attention.attention.relative_position_bias.{TABLE}",
        "attn.proj": "attention.output.dense",
        "gamma_1": "lambda_1",
        "gamma_2": "lambda_2",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    blocks="encoder.layer",
)
_HEADS = {
    "head.": "classifier.",
    "lm_head.": "lm_head.",
    "decode_head.conv_seg.": "decode_head.classifier.",
    "auxiliary_head.conv_seg.": "auxiliary_head.classifier.",
}
TAP_SHIFT = 2
CONFIG_TAPS = (3, 5, 7, 11)  # where a config says nothing
AUXILIARY_INDEX = 2  # of the taps, the one that the library's auxiliary head sees


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translates the names of a file; names of other heads stay as they are.

    Raises:
        InputError: A layer lacks its query, key or value, or there are two final norms, which no BEiT has.
    """
    state_dict = {bare(name): tensor for name, tensor in state_dict.items()}
    if any(name.startswith(FINAL_NORM) for name in state_dict) and f"{PREFIX}{FINAL_NORM}weight" in state_dict:
        raise InputError("the model has a final norm of its own and one before the token head; no BEiT has two")
    weights = {}
    for name, tensor in state_dict.items():
        if QKV.fullmatch(name) or name.endswith(INDEX):
            continue
        head = next((ours + name[len(theirs) :] for ours, theirs in _HEADS.items() if name.startswith(theirs)), None)
        weights[head or _NAMES.official(name.removeprefix(PREFIX)) or name] = tensor
    return weights | _joined(state_dict)


def _joined(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stacks query, key and value weights ``(D, D)`` of each layer into ``qkv.weight`` ``(3 D, D)``."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        if match := QKV.fullmatch(name):
            layers.setdefault(match[1], {})[match[2]] = tensor
    for layer, parts in layers.items():
        if missing := {"query", "key", "value"} - parts.keys():
            raise InputError(f"layer {layer} of the Hugging Face checkpoint has no {' and no '.join(sorted(missing))}")
    return {
        f"blocks.{layer}.attn.qkv.weight": torch.cat([parts["query"], parts["key"], parts["value"]])
        for layer, parts in layers.items()
    }


def from_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translates official names to those of a file, which holds contiguous tensors of their own memory.

    Layers without biases of query and value get zeros: the library always has them.
    """
    masked = any(name.startswith("lm_head.") for name in weights)
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith(INDEX):
            continue
        head = next((theirs + name[len(ours) :] for ours, theirs in _HEADS.items() if name.startswith(ours)), None)
        if head:
            result[head] = tensor
        elif match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.weight", name):
            result |= _split(int(match[1]), tensor, biased=f"blocks.{match[1]}.attn.q_bias" in weights)
        elif name.startswith(PARTS):
            result[name] = tensor
        else:
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


def config_json(arguments: Mapping[str, Any], *, layer_norm_eps: float, labels: Sequence[str] | None) -> dict[str, Any]:
    """Describes a model as ``config.json``.

    Args:
        arguments: Keywords of our constructor, with ``vocab_size`` (pre-training) or ``num_classes``.
        layer_norm_eps: Of the model; the library's default is another.
        labels: Names of the classes, if they are known.

    Raises:
        InputError: The library cannot compute such a model.
    """
    height, width = arguments["img_size"]
    patch, other = arguments["patch_size"]
    tables = arguments["use_rel_pos_bias"] or arguments["use_shared_rel_pos_bias"]
    if patch != other or (height != width and (tables or arguments["use_abs_pos_emb"])):
        raise InputError(
            f"transformers computes other numbers for images of {height} x {width} pixels in patches of {patch} x "
            f"{other}: it reads tables and positions as those of a square. Convert the model at a square size"
        )
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
        "layer_norm_eps": layer_norm_eps,
        "layer_scale_init_value": arguments["init_values"] or 0.0,
        "use_mask_token": masked,
        "use_absolute_position_embeddings": arguments["use_abs_pos_emb"],
        "use_relative_position_bias": arguments["use_rel_pos_bias"],
        "use_shared_relative_position_bias": arguments["use_shared_rel_pos_bias"],
        "use_mean_pooling": masked or arguments["use_mean_pooling"],
    }
    if masked:
        return config | {"vocab_size": arguments["vocab_size"]}
    return config | _label_maps(labels or [f"LABEL_{index}" for index in range(arguments["num_classes"])])


def segmentation_json(
    config: Mapping[str, Any], heads: Heads, *, taps: Sequence[int], pool_scales: Sequence[int], palette: Any = None
) -> dict[str, Any]:
    """Makes a backbone's config that of a segmentor.

    Args:
        config: From :func:`config_json`, for the backbone with the layers it will have.
        heads: Of the segmentor.
        taps: Blocks that are tapped, from 0.
        pool_scales: Of UPerNet.
        palette: Colours of the classes, which the library keeps as it keeps every word it does not know.

    Raises:
        InputError: The library has no such segmentor.
    """
    size, width, patch = config["image_size"], config["hidden_size"], config["patch_size"]
    for odd, why in (
        (heads.kind != "uper", f"transformers has UPerNet alone, and the decode head is {heads.kind or 'another one'}"),
        (
            heads.channels != width,
            f"the decode head has {heads.channels} channels and the backbone {width}; in transformers' BEiT both are "
            "the hidden size",
        ),
        (patch == 8, "transformers' pyramid is the one for patches of 16 pixels, and these are of 8"),
        (not isinstance(size, int), f"transformers segments square images alone, not {size} pixels"),
        (
            len(taps) != LEVELS or list(taps) != sorted(set(taps)),
            f"transformers taps four blocks, one after the other; this model taps {', '.join(map(str, taps))}",
        ),
        (len(pool_scales) != heads.stages, f"it is not known at which {heads.stages} scales UPerNet pools"),
        (
            heads.auxiliary_channels > 0 and not heads.auxiliary_convs,
            "the auxiliary head is another one than transformers'",
        ),
    ):
        if odd:
            raise InputError(f"transformers has no such segmentor: {why}; convert it to unilm or mmsegmentation")
    colours = {"palette": [list(colour) for colour in palette]} if palette else {}
    return (
        dict(config)
        | colours
        | {
            "architectures": ["BeitForSemanticSegmentation"],
            "out_indices": [tap + TAP_SHIFT for tap in taps],
            "pool_scales": list(pool_scales),
            "use_auxiliary_head": heads.auxiliary_channels > 0,
            "auxiliary_channels": heads.auxiliary_channels or 256,
            "auxiliary_num_convs": heads.auxiliary_convs or 1,
            "auxiliary_concat_input": heads.auxiliary_concat,
            "auxiliary_loss_weight": 0.4,
            "semantic_loss_ignore_index": 255,
        }
    )


def needs_inert_layer(taps: Sequence[int], depth: int) -> bool:
    """Tells whether taps have no number in the library unless the model gets one more layer."""
    return max(taps) == depth - 1


def with_inert_layer(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Adds a block of zeros, which hands on what it is given, after the last one of a model of that depth."""
    last = f"blocks.{depth - 1}."
    return dict(weights) | {
        f"blocks.{depth}.{name[len(last) :]}": torch.zeros_like(tensor)
        for name, tensor in weights.items()
        if name.startswith(last)
    }


def without_inert_layer(weights: Mapping[str, Tensor], taps: Sequence[int]) -> dict[str, Tensor]:
    """Takes the block after the last tapped one away if it is the last one and hands on what it is given."""
    last = f"blocks.{max(taps) + 1}."
    block = {name: tensor for name, tensor in weights.items() if name.startswith(last)}
    scales = [tensor for name, tensor in block.items() if ".gamma_" in name]
    inert = not any(tensor.any() for tensor in scales or block.values())
    deeper = any(name.startswith(f"blocks.{max(taps) + 2}.") for name in weights)
    if deeper or not inert:
        return dict(weights)
    return {name: tensor for name, tensor in weights.items() if name not in block}


def read_segmentation(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the two files beside a segmentor's weights say: taps in our numbers, scales, colours, label maps.

    Raises:
        InputError: It taps what no block computes.
    """
    indices = config.get("out_indices") or config.get("semantic_out_indices") or CONFIG_TAPS
    taps = tuple(sorted({index - TAP_SHIFT for index in indices}))
    if len(taps) != LEVELS or taps[0] < 0:
        raise InputError(
            f"the Hugging Face segmentor has out_indices {list(indices)}: four that differ are needed, from "
            f"{TAP_SHIFT} on, which taps the first layer"
        )
    found: dict[str, Any] = {"out_indices": taps, "auxiliary_index": AUXILIARY_INDEX}
    found |= {key: config[key] for key in ("pool_scales", "palette") if config.get(key)}
    zero = preprocessor.get("do_reduce_labels", preprocessor.get("reduce_labels"))
    return found if zero is None else found | {"reduce_zero_label": zero}


def _label_maps(labels: Sequence[str]) -> dict[str, Any]:
    names = {str(index): label for index, label in enumerate(labels)}
    # Two classes of ImageNet have the same words; the way back is by the first.
    return {"id2label": names, "label2id": {label: int(index) for index, label in reversed(names.items())}}


def preprocessor_json(image_size: tuple[int, int], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Describes how images are prepared: the shorter side resized to size / crop_pct, and the centre cut out."""
    resample = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
    return {
        "image_processor_type": "BitImageProcessor",  # the library's own for BEiT cannot keep the aspect ratio
        "do_resize": True,
        "size": {"shortest_edge": int(min(image_size) / preprocessing["crop_pct"])},
        "resample": resample[preprocessing["interpolation"]],
        "do_center_crop": True,
        "crop_size": {"height": image_size[0], "width": image_size[1]},
        "crop_pct": preprocessing["crop_pct"],  # ours: the quotient of the two sizes is a rounded one
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
        "do_convert_rgb": True,
    }


def segmentation_preprocessor_json(image_size: int, preprocessing: Mapping[str, Any], *, zero: bool) -> dict[str, Any]:
    """Describes how images of a segmentor are prepared: resized to its size, as the library has no sliding window.

    Args:
        image_size: Height and width in pixels.
        preprocessing: ``mean``, ``std`` and ``interpolation`` of the images.
        zero: In label maps 0 is no class, and the first class is 1.
    """
    described = preprocessor_json((image_size, image_size), {**preprocessing, "crop_pct": 1.0})
    for key in ("crop_size", "crop_pct"):
        described.pop(key)
    return described | {
        "image_processor_type": "BeitImageProcessor",
        "size": {"height": image_size, "width": image_size},
        "do_center_crop": False,
        "do_reduce_labels": zero,
    }


def read_config(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the two files beside the weights say about the model, the images and the classes."""
    size = config.get("image_size")
    found: dict[str, Any] = {}
    if size is not None:
        found["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    for theirs, ours in (("num_attention_heads", "num_heads"), ("layer_norm_eps", "layer_norm_eps")):
        if theirs in config:
            found[ours] = config[theirs]
    labels = config.get("id2label") or {}
    names = tuple(labels[key] for key in sorted(labels, key=int))
    if names and names != tuple(f"LABEL_{index}" for index in range(len(names))):
        found["labels"] = names
    return found | _read_preprocessor(preprocessor)


def _read_preprocessor(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for theirs, ours in (("image_mean", "mean"), ("image_std", "std")):
        if theirs in preprocessor:
            found[ours] = tuple(preprocessor[theirs])
    resized, cropped = (_edge(preprocessor.get(key)) for key in ("size", "crop_size"))
    if resized and preprocessor.get("do_resize", True):
        found["crop_pct"] = cropped / resized if cropped and preprocessor.get("do_center_crop") else 1.0
        # What an export of ours wrote beside the sizes counts as long as nobody has changed those.
        recorded = preprocessor.get("crop_pct")
        if cropped and isinstance(recorded, (int, float)) and recorded > 0 and int(cropped / recorded) == resized:
            found["crop_pct"] = recorded
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    if preprocessor.get("resample") in names:
        found["interpolation"] = names[preprocessor["resample"]]
    return found


def _edge(size: Any) -> int | None:
    """Returns the shorter edge of a size as such files spell it: a number, or a dict of edges."""
    if isinstance(size, Mapping):
        return size.get("shortest_edge") or min((size[key] for key in ("height", "width") if key in size), default=None)
    return size
