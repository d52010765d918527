"""Other models whose files are mistaken for BEiT's, recognised by names and shapes of their parameters."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

EVA_WIDTH, EVA02_ENORMOUS_WIDTH = 1408, 1792

Names = frozenset[str]


@dataclass(frozen=True)
class Relative:
    """A model that is not BEiT."""

    name: str
    matches: Callable[[Names, Mapping[str, Tensor]], bool]  # given names without the prefixes of wrappers
    loads: bool  # whether its backbone has BEiT's architecture and names
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


def _is_gated(_names: Names, tensors: Mapping[str, Tensor]) -> bool:
    """Matches an MLP whose first layer has gates beside the hidden units."""
    first, second = (
        next((tensor for name, tensor in tensors.items() if name.endswith(f"blocks.0.mlp.{layer}.weight")), None)
        for layer in ("fc1", "fc2")
    )
    return first is not None and second is not None and len(first) == 2 * second.shape[-1]


_OTHER = "another architecture"

RELATIVES = (
    Relative("BEiT-3", _has(r"(^beit3\.|\.self_attn\.k_proj\.A\.)"), False, "a multiway transformer, " + _OTHER),
    Relative("BEiT v2's tokenizer (VQ-KD)", _has(r"^quantize\.", r"^encoder\."), False, "a tokenizer, not a backbone"),
    Relative("BEiT v2", _has(r"^cls_pt_layers\."), True, "the backbone is the same, its head predicts other tokens"),
    Relative(
        "EVA-02",
        _has(r"^blocks\.\d+\.(attn\.q_proj\.|mlp\.w1\.|mlp\.fc1_g\.)"),
        False,
        "a gated MLP or split projections, " + _OTHER,
    ),
    Relative("EVA-02 or another model with a gated MLP", _is_gated, False, _OTHER),
    Relative("EVA-02 enormous", _is_wide(EVA02_ENORMOUS_WIDTH), False, "its norms come last in a block, " + _OTHER),
    Relative("EVA", _is_wide(EVA_WIDTH), True, "the backbone is the same, its head predicts CLIP features"),
    Relative(
        "DINOv3 or another model with register tokens or rotary positions",
        _has(r"^(reg_token|register_tokens|storage_tokens|norm_pre\.|rope(_embed)?\.)"),
        False,
        _OTHER,
    ),
    Relative("DiT", _has(r"^roi_heads\.", r"^blocks\.0\.attn\.q_bias"), True, "the detector's backbone is BEiT's"),
    Relative("data2vec-vision", _has(r"^data2vec_vision\."), False, "another model of the same shape"),
    Relative(
        "a plain vision transformer (ViT, DeiT, MAE, DINO)",
        _has(r"(^blocks\.0\.attn\.qkv\.bias$|attention\.attention\.key\.bias$|^encoder\.layers\.encoder_layer_0\.)"),
        False,
        "it has a bias of the keys and no relative positions",
    ),
    Relative("a CLIP model", _has(r"^visual\.", r"^logit_scale$"), False, _OTHER),
    Relative("a Swin transformer", _has(r"^layers\.0\.blocks\.0\.attn\."), False, _OTHER),
    Relative("a ResNet", _has(r"^layer1\.0\.conv1\.weight$"), False, _OTHER),
    Relative("a DALL-E tokenizer", _has(r"^blocks\.group_1\."), False, "a tokenizer, not a backbone"),
    Relative("a discrete VAE", _has(r"^codebook\.weight$"), False, "a tokenizer, not a backbone"),
    Relative(
        "a Hugging Face model under the names that transformers 5 has in memory",
        _has(r"(^|\.)layers\.\d+\.attention\.q_proj\."),
        False,
        "write it with save_pretrained(folder) and give the folder",
    ),
)
