"""Attention with an additive bias: fused kernels that return the bias's gradient, or plain operations.

Shapes: ``B`` images, ``H`` heads, ``T`` tokens, ``d`` channels of a head.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROW_ALIGNMENT = 8  # elements between rows of a bias that the efficient CUDA kernel reads without a copy


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, dropout: float = 0.0, fused: bool = True
) -> Tensor:
    """Returns the attention output ``(B, H, T, d)``.

    Args:
        query: ``(B, H, T, d)``, not scaled yet.
        key: ``(B, H, T, d)``.
        value: ``(B, H, T, d)``.
        bias: Added to the logits, ``(H, T, T)``.
        dropout: Dropout of the attention probabilities.
        fused: Use ``scaled_dot_product_attention``; False for the same in plain operations.
    """
    # In some torch releases the backward of the memory-efficient kernel crashes if only the bias needs a gradient.
    only_bias_learns = bias is not None and bias.requires_grad and not query.requires_grad
    if not fused or only_bias_learns:
        probabilities = attention_probabilities(query, key, bias).to(value.dtype)
        return F.dropout(probabilities, dropout, training=dropout > 0) @ value
    if bias is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    # The query may have a lower precision than the table, and the efficient kernel takes only a 4-D bias.
    bias = bias.to(query.dtype).unsqueeze(0)  # (1, H, T, T)
    with kernels_with_bias_gradient(query.device.type):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)


def attention_probabilities(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """Returns the attention probabilities, ``(B, H, T, T)``; each row (a query) sums to 1."""
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(dim=-1)


def kernels_with_bias_gradient(device_type: str) -> AbstractContextManager[None]:
    """Restricts ``scaled_dot_product_attention`` to the CUDA kernels that return a gradient for an additive bias.

    Recent torch prefers cuDNN's kernel on Hopper, whose backward has no output for the bias; flash takes no bias. With
    deterministic algorithms only the math kernel is left: with ``warn_only`` the efficient one would still be chosen,
    and its backward sums in any order.
    """
    if device_type != "cuda":
        return nullcontext()
    deterministic = torch.are_deterministic_algorithms_enabled()
    return sdpa_kernel([SDPBackend.MATH, *([] if deterministic else [SDPBackend.EFFICIENT_ATTENTION])])


def ready_for_kernels(bias: Tensor) -> Tensor:
    """Returns a bias ``(H, T, T)`` in the dtype of autocast and, on CUDA, with aligned rows.

    The efficient CUDA kernel reads rows that are a multiple of 8 elements apart and copies any other bias at every
    call. The gradients of all blocks that share the bias are summed in its dtype.
    """
    device_type = bias.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        bias = bias.to(torch.get_autocast_dtype(device_type))
    return aligned(bias) if device_type == "cuda" else bias


def aligned(bias: Tensor) -> Tensor:
    """Returns the same values with rows, along the last dimension, that start a multiple of 8 elements apart."""
    length = bias.shape[-1]
    return F.pad(bias, (0, -length % ROW_ALIGNMENT))[..., :length]
