"""Attention with a relative position bias, in fused kernels or in plain operations.

Shapes: ``B`` images, ``H`` heads, ``T = N + 1`` tokens of ``D`` channels, ``d = D / H`` channels of a head.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from beit.errors import InputError
from beit.relative_position import num_table_rows, relative_position_bias

ROW_ALIGNMENT = 8  # elements between rows of a bias that the efficient CUDA kernel reads without a copy


class RelativePositionBias(nn.Module):
    """A relative position bias shared by all blocks.

    Args:
        window_size: The patch grid ``(h, w)``.
        num_heads: Number of heads, the columns of the table.
    """

    def __init__(self, window_size: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_table_rows(window_size), num_heads))

    def forward(self, index: Tensor) -> Tensor:
        """Looks up the rows ``index`` ``(N + 1, N + 1)``: a bias ``(H, N + 1, N + 1)``."""
        return look_up(self.relative_position_bias_table, index, self.window_size)


class Attention(nn.Module):
    """Multi-head self-attention with an additive relative position bias.

    Query and value have a bias, the key has none: it would cancel in the softmax.

    Args:
        dim: Token channels.
        num_heads: Number of heads, a divisor of ``dim``.
        qkv_bias: Learn biases for query and value.
        attn_drop: Dropout of the attention probabilities.
        proj_drop: Dropout of the output.
        window_size: The patch grid ``(h, w)`` for a bias table in this layer; None for no table.

    Attributes:
        fused: Use ``scaled_dot_product_attention``; False for the same in plain operations.

    Raises:
        InputError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise InputError(f"embed_dim {dim} cannot be split into {num_heads} heads: make num_heads a divisor of it")
        self.num_heads, self.window_size, self.fused = num_heads, window_size, True
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        table = nn.Parameter(torch.zeros(num_table_rows(window_size), num_heads)) if window_size else None
        self.relative_position_bias_table = table
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, index: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Returns the tokens ``(B, N + 1, D)`` after attention.

        Args:
            x: Tokens ``(B, N + 1, D)``.
            index: Rows to look up in this layer's own table, int64 ``(N + 1, N + 1)``; None to leave the table out.
            bias: A bias ``(H, N + 1, N + 1)`` from outside, added to this layer's own.
        """
        query, key, value = self._query_key_value(x)
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = attend(query, key, value, self.position_bias(index, bias), dropout=dropout, fused=self.fused)
        return self.proj_drop(self.proj(rearrange(mixed, "b heads n d -> b n (heads d)")))

    def attention_map(self, x: Tensor, index: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Returns the attention probabilities ``(B, H, N + 1, N + 1)``; each row (a query) sums to 1."""
        query, key, _ = self._query_key_value(x)
        return attention_probabilities(query, key, self.position_bias(index, bias))

    def position_bias(self, index: Tensor | None, bias: Tensor | None = None) -> Tensor | None:
        """Returns the sum of this layer's own bias and one from outside, ``(H, N + 1, N + 1)``; None without either."""
        if self.relative_position_bias_table is None or self.window_size is None or index is None:
            return bias
        own = look_up(self.relative_position_bias_table, index, self.window_size)
        return own if bias is None else own + bias

    def _query_key_value(self, x: Tensor) -> tuple[Tensor, ...]:
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        return rearrange(qkv, "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads).unbind(0)


def look_up(table: Tensor, index: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Looks up a bias ``(H, N + 1, N + 1)``; where no gradient is wanted, in the dtype of autocast from the start."""
    learns = table.requires_grad and torch.is_grad_enabled()  # gradients of a row are summed in the table's dtype
    return relative_position_bias(table if learns else in_autocast_dtype(table), index, window_size)


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, dropout: float = 0.0, fused: bool = True
) -> Tensor:
    """Returns the attention output ``(B, H, T, d)``, in the dtype of query, key and value.

    In plain operations each result has that dtype: in bfloat16 logits, bias and probabilities are rounded to 8 bits,
    as in the official code under autocast (there the bias is not); sums and softmax are float32 inside. Fused kernels
    round the bias and the output alone, or the probabilities too.

    Args:
        query: ``(B, H, T, d)``, not scaled yet.
        key: ``(B, H, T, d)``.
        value: ``(B, H, T, d)``.
        bias: Added to the logits, ``(H, T, T)``.
        dropout: Dropout of the attention probabilities.
        fused: Use ``scaled_dot_product_attention`` where it is faster; False for the same in plain operations.
    """
    if bias is not None:
        bias = bias.to(query.dtype)  # the query may have a lower precision than the table
        if bias.requires_grad:
            # A CPU has no fused kernel with a gradient for the bias: torch would take a plain path in float32. And in
            # some releases of torch the backward of CUDA's efficient kernel crashes if only the bias needs a gradient.
            fused = fused and query.device.type != "cpu" and query.requires_grad
    if not fused:
        probabilities = attention_probabilities(query, key, bias).to(value.dtype)
        return F.dropout(probabilities, dropout, training=dropout > 0) @ value
    if bias is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    with kernels_with_bias_gradient(query.device.type):  # of which the efficient one takes only a 4-D bias
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.unsqueeze(0), dropout_p=dropout)


def attention_probabilities(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """Returns the attention probabilities, ``(B, H, T, T)``; each row (a query) sums to 1."""
    # The product needs contiguous keys anyway, and a copy that also transposes is slower.
    logits = (query * query.shape[-1] ** -0.5) @ key.contiguous().transpose(-2, -1)
    if bias is not None:
        logits += bias
    return logits.softmax(dim=-1)


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
    bias = in_autocast_dtype(bias)
    return aligned(bias) if bias.device.type == "cuda" else bias


def in_autocast_dtype(tensor: Tensor) -> Tensor:
    """Casts a tensor as autocast, where it is enabled, casts the operands of a product."""
    device_type = tensor.device.type
    enabled = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return tensor.to(torch.get_autocast_dtype(device_type)) if enabled else tensor


def aligned(bias: Tensor) -> Tensor:
    """Returns the same values with rows, along the last dimension, that start a multiple of 8 elements apart."""
    length = bias.shape[-1]
    return F.pad(bias, (0, -length % ROW_ALIGNMENT))[..., :length]
