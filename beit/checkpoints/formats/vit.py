"""Plain ViTs of timm and Hugging Face (ViT, DeiT, MAE, DINO, DINOv2), read as BEiTs without bias tables.

Their keys have a bias. It adds the same number to all logits of a query, so it cancels in the softmax: it is translated
to a name of its own, ``attn.k_bias``, which no model has.
"""

import math
import re

import torch
from torch import Tensor

from beit.checkpoints.formats import huggingface
from beit.checkpoints.formats.dialect import Weights

PLAIN_VIT = "a plain vision transformer (ViT, DeiT, MAE, DINO)"

_LAYER_SCALE = re.compile(r"(?:ls|layer_scale)([12])\.(?:gamma|lambda1)$")


def to_official(state_dict: Weights) -> dict[str, Tensor]:
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
