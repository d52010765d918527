"""Other models whose files are mistaken for BEiT's, recognised by names and shapes of their parameters.

Plain ViTs of timm and Hugging Face (ViT, DeiT, MAE, DINO, DINOv2) are read as BEiTs without bias tables. Their keys
have a bias. It adds the same number to all logits of a query, so it cancels in the softmax: it is translated to a name
of its own, ``attn.k_bias``, which no model has.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from beit.checkpoints.formats import huggingface, unilm
from beit.checkpoints.formats.dialect import Weights

EVA_WIDTH, EVA02_ENORMOUS_WIDTH = 1408, 1792
PLAIN_VIT = "a plain vision transformer (ViT, DeiT, MAE, DINO)"

_LAYER_SCALE = re.compile(r"(?:ls|layer_scale)([12])\.(?:gamma|lambda1)$")

Names = frozenset[str]


@dataclass(frozen=True)
class Relative:
    """A model that is not BEiT."""

    name: str
    matches: Callable[[Names, Mapping[str, Tensor]], bool]  # given names without the prefixes of wrappers
    to_official: Callable[[Weights], dict[str, Tensor]] | None  # None unless its backbone has BEiT's architecture
    remark: str  # for the user


def _has(*patterns: str) -> Callable[[Names, Mapping[str, Tensor]], bool]:
    """Matches if every pattern occurs in some name."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda names, _tensors: all(any(p.search(name) for name in names) for p in compiled)


def _is_wide(width: int) -> Callable[[Names, Mapping[str, Tensor]], bool]:
    """Matches a model of this width, which no BEiT has."""
    return lambda _names, tensors: any(
        name.endswith("cls_token") and tensor.shape[-1:] == (width,) for name, tensor in tensors.items()
    )


def _is_gated(names: Names, tensors: Mapping[str, Tensor]) -> bool:
    """Matches an MLP whose first layer has gates beside the hidden units."""
    if any(".mlp.w12." in name or ".mlp.weights_in." in name for name in names):
        return True
    first, second = (
        next((tensor for name, tensor in tensors.items() if name.endswith(f"blocks.0.mlp.{layer}.weight")), None)
        for layer in ("fc1", "fc2")
    )
    return first is not None and second is not None and len(first) == 2 * second.shape[-1]


def _is_odd_vit(names: Names, tensors: Mapping[str, Tensor]) -> bool:
    """Matches a plain ViT with more tokens than BEiT has, or without what it has."""
    whole = _has(r"(^|\.)cls_token$", r"(^|\.)pos(_embed|ition_embeddings)$")(names, tensors)
    return _is_vit(names, tensors) and (not whole or _has(r"(^|\.)dist(illation)?_token$")(names, tensors))


def _from_plain_vit(state_dict: Weights) -> dict[str, Tensor]:
    """Translates timm's names or those of a Hugging Face file; what no BEiT has keeps a name that no BEiT has."""
    weights: dict[str, Tensor] = {}
    decodes = "decoder_pos_embed" in state_dict  # MAE, whose mask token enters the decoder
    for name, tensor in huggingface.to_official(state_dict).items():
        own = _LAYER_SCALE.sub(r"gamma_\1", re.sub(r"^encoder\.layer\.", "blocks.", name))
        if own.endswith("attn.qkv.bias"):
            biases = zip("qkv", tensor.chunk(3), strict=False)
            weights |= {own.replace("qkv.bias", f"{part}_bias"): bias for part, bias in biases}
        elif own == "mask_token":
            weights["decoder_mask_token" if decodes else own] = tensor.reshape(1, 1, -1)
        else:
            weights[own] = tensor
    positions, head = weights.get("pos_embed"), weights.get("head.weight")
    if positions is None or positions.ndim != 3:
        return weights
    if math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:  # DeiT III has no position for the class token
        weights["pos_embed"] = torch.cat((torch.zeros_like(positions[:, :1]), positions), dim=1)
    if head is not None and head.shape[-1] != positions.shape[-1]:  # DINOv2's sees the class token and the mean
        weights |= {f"pooler.{name}": weights.pop(name) for name in list(weights) if name.startswith("head.")}
    return weights


_is_vit = _has(r"(^blocks\.0\.attn\.qkv\.bias|attention\.attention\.key\.bias)$")
_OTHER = "another architecture"

RELATIVES = (
    Relative("BEiT-3", _has(r"(^beit3\.|\.self_attn\.k_proj\.A\.)"), None, "a multiway transformer, " + _OTHER),
    Relative("BEiT v2's tokenizer (VQ-KD)", _has(r"^quantize\.", r"^encoder\."), None, "a tokenizer, not a backbone"),
    Relative(
        "BEiT v2",
        _has(r"^cls_pt_layers\."),
        unilm.to_official,
        "the backbone is the same, its head predicts other tokens",
    ),
    Relative(
        "EVA-02",
        _has(r"^blocks\.\d+\.(attn\.q_proj\.|mlp\.w1\.|mlp\.fc1_g\.)"),
        None,
        "a gated MLP or split projections, " + _OTHER,
    ),
    Relative("EVA-02 or another model with a gated MLP", _is_gated, None, _OTHER),
    Relative("EVA-02 enormous", _is_wide(EVA02_ENORMOUS_WIDTH), None, "its norms come last in a block, " + _OTHER),
    Relative(
        "EVA", _is_wide(EVA_WIDTH), unilm.to_official, "the backbone is the same, its head predicts CLIP features"
    ),
    Relative(
        "a CLIP tower or another model with a norm before its blocks",
        _has(r"(^|\.)(norm_pre|ln_pre|pre_layrnorm)\."),
        None,
        _OTHER + ", which can only teach (--teacher)",
    ),
    Relative(
        "DINOv2 with registers, DINOv3 or another model with register tokens or rotary positions",
        _has(r"(^|\.)(reg_token|register_tokens|storage_tokens)$|^rope(_embed)?\."),
        None,
        _OTHER,
    ),
    Relative("DiT", _has(r"^roi_heads\.", r"^blocks\.0\.attn\.q_bias"), unilm.to_official, "the backbone is BEiT's"),
    Relative("data2vec-vision", _has(r"^data2vec_vision\."), None, "another model of the same shape"),
    Relative("a ViT without class token or positions, or with a distillation token", _is_odd_vit, None, _OTHER),
    Relative(PLAIN_VIT, _is_vit, _from_plain_vit, "positions are absolute, and keys have no bias"),
    Relative(
        "torchvision's ViT", _has(r"^encoder\.layers\.encoder_layer_0\."), None, "take timm's of the same weights"
    ),
    Relative("a CLIP model", _has(r"^visual\.", r"^logit_scale$"), None, _OTHER),
    Relative("a Swin transformer", _has(r"^layers\.0\.blocks\.0\.attn\."), None, _OTHER),
    Relative("a ResNet", _has(r"^layer1\.0\.conv1\.weight$"), None, _OTHER),
    Relative("a DALL-E tokenizer", _has(r"^blocks\.group_1\."), None, "a tokenizer, not a backbone"),
    Relative("a discrete VAE", _has(r"^codebook\.weight$"), None, "a tokenizer, not a backbone"),
    Relative(
        "a Hugging Face model under the names that transformers 5 has in memory",
        _has(r"(^|\.)layers\.\d+\.attention\.q_proj\."),
        None,
        "write it with save_pretrained(folder) and give the folder",
    ),
)
