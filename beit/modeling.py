"""The BEiT architecture, from the bottom up: patches, attention, a block, the backbone, and its two tasks.

Shapes: ``B`` images, ``N = h * w`` patches in a grid ``(h, w)``, ``D`` channels, ``H`` heads.
Token 0 is the class token.

Source: BEiT: BERT Pre-Training of Image Transformers (arXiv 2106.08254).
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from inspect import Parameter, Signature, signature
from itertools import islice
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from beit.errors import InputError
from beit.relative_position import num_table_rows, relative_position_bias, relative_position_index, resize_table

Size = int | tuple[int, int]
NormLayer = Callable[[int], nn.Module]

LAYER_NORM: NormLayer = partial(nn.LayerNorm, eps=1e-6)
ROW_ALIGNMENT = 8  # of an attention bias, in numbers, for the efficient CUDA kernel


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each to one token.

    Args:
        img_size: Height and width of the images, in pixels.
        patch_size: Height and width of a patch, in pixels.
        in_chans: Channels of the images.
        embed_dim: Channels of a token.

    Raises:
        InputError: The image cannot be cut into whole patches.
    """

    def __init__(self, *, img_size: Size, patch_size: Size, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = _pair(patch_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.set_input_size(img_size)

    def set_input_size(self, img_size: Size) -> None:
        """Takes images of another size ``(H, W)`` from now on; the projection does not depend on it."""
        (height, width), (patch_height, patch_width) = _pair(img_size), self.patch_size
        if min(height, width) < 1 or height % patch_height or width % patch_width:
            raise InputError(
                f"an image of {height} x {width} pixels cannot be cut into patches of {patch_height} x {patch_width}: "
                f"give img_size as multiples of the patch size"
            )
        self.img_size = (height, width)
        self.grid_size = (height // patch_height, width // patch_width)

    @property
    def num_patches(self) -> int:
        """``N``, the number of patches of an image."""
        return self.grid_size[0] * self.grid_size[1]

    def forward(self, images: Tensor) -> Tensor:
        """Turns images ``(B, C, H, W)`` into tokens ``(B, N, D)``, row by row."""
        if images.ndim != 4 or images.shape[1] != self.proj.in_channels:
            raise InputError(
                f"images must have shape (B, {self.proj.in_channels}, height, width), not {tuple(images.shape)}"
            )
        if tuple(images.shape[2:]) != self.img_size:
            height, width = images.shape[2:]
            raise InputError(
                f"images are {height} x {width} pixels, but the model is set to {self.img_size[0]} x "
                f"{self.img_size[1]}: resize them, or call model.set_input_size(({height}, {width}))"
            )
        return rearrange(self.proj(images), "b d h w -> b (h w) d")


class RelativePositionBias(nn.Module):
    """One bias table that all blocks share.

    Args:
        window_size: The patch grid ``(h, w)``.
        num_heads: Columns of the table.
    """

    def __init__(self, window_size: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_table_rows(window_size), num_heads))

    def forward(self, index: Tensor) -> Tensor:
        """Gathers the rows of ``index`` ``(N + 1, N + 1)`` into a bias ``(H, N + 1, N + 1)``."""
        return relative_position_bias(self.relative_position_bias_table, index, self.window_size)


class Attention(nn.Module):
    """Multi-head self-attention with an additive relative position bias.

    The query and the value have a bias, the key has none: it would cancel in the softmax.

    Args:
        dim: Channels of a token.
        num_heads: Number of heads, a divisor of ``dim``.
        qkv_bias: Learn the biases of query and value.
        attn_drop: Dropout of the attention probabilities.
        proj_drop: Dropout of the output.
        window_size: The patch grid ``(h, w)`` of a bias table of this layer's own; None for no table.

    Attributes:
        fused: Use ``scaled_dot_product_attention``; False: the eager path, the same in plain operations.

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
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.fused = True
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.window_size = window_size
        self.relative_position_bias_table = (
            nn.Parameter(torch.zeros(num_table_rows(window_size), num_heads)) if window_size else None
        )
        self.held_bias: tuple[nn.Parameter, int, Tensor] | None = None  # the table, its version, the bias it gave
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, index: Tensor | None = None, shared_bias: Tensor | None = None) -> Tensor:
        """Mixes the tokens.

        Args:
            x: Tokens ``(B, N + 1, D)``.
            index: Rows of this layer's own table, int64 ``(N + 1, N + 1)``; not read where it has none.
            shared_bias: A bias ``(H, N + 1, N + 1)`` from outside, added to this layer's own.

        Returns:
            Tokens ``(B, N + 1, D)``.
        """
        query, key, value = self._query_key_value(x)
        bias = self._bias(index, shared_bias)
        # Backward of the memory-efficient kernel crashes in some torch releases where the bias alone needs a gradient.
        only_bias_learns = bias is not None and bias.requires_grad and not query.requires_grad
        if self.fused and not only_bias_learns:
            mixed = self._fused_attention(query, key, value, bias)
        else:
            mixed = self.attn_drop(self._probabilities(query, key, bias).to(value.dtype)) @ value
        return self.proj_drop(self.proj(rearrange(mixed, "b heads n d -> b n (heads d)")))

    def attention_map(self, x: Tensor, index: Tensor | None = None, shared_bias: Tensor | None = None) -> Tensor:
        """Returns the attention probabilities ``(B, H, N + 1, N + 1)``: each row (a query) sums to 1."""
        query, key, _ = self._query_key_value(x)
        return self._probabilities(query, key, self._bias(index, shared_bias))

    def _query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        qkv = rearrange(qkv, "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads)
        query, key, value = qkv.unbind(0)
        return query, key, value

    def _bias(self, index: Tensor | None, shared_bias: Tensor | None) -> Tensor | None:
        if self.relative_position_bias_table is None or self.window_size is None or index is None:
            return shared_bias
        own = self._held()
        if own is None:
            own = relative_position_bias(self.relative_position_bias_table, index, self.window_size)
        return own if shared_bias is None else own + shared_bias

    def _held(self) -> Tensor | None:
        if self.held_bias is None or torch.is_grad_enabled():
            return None
        table, version, bias = self.held_bias
        return bias if table is self.relative_position_bias_table and version == _version(table) else None

    def _probabilities(self, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        logits = (query * self.scale) @ key.transpose(-2, -1)  # (B, H, N+1, N+1)
        if bias is not None:
            logits = logits + bias
        return logits.softmax(dim=-1)

    def _fused_attention(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        dropout = self.attn_drop.p if self.training else 0.0
        if bias is None:
            return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        # The query may have a lower precision than the table; and the efficient kernel takes only a 4-D bias.
        bias = bias.to(query.dtype).unsqueeze(0)  # (1, H, N+1, N+1)
        with kernels_with_bias_gradient(query.device.type):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)


def kernels_with_bias_gradient(device_type: str) -> AbstractContextManager[None]:
    """Keeps ``scaled_dot_product_attention`` to the CUDA kernels that return the gradient of an additive bias.

    Recent torch prefers cuDNN's kernel on Hopper, whose backward has no output for the bias; flash takes no bias.
    Where deterministic algorithms are wanted, the plain one is left: where that is with a warning only, the efficient
    one adds up as it comes.
    """
    if device_type != "cuda":
        return nullcontext()
    deterministic = torch.are_deterministic_algorithms_enabled()
    return sdpa_kernel([SDPBackend.MATH, *([] if deterministic else [SDPBackend.EFFICIENT_ATTENTION])])


def ready_for_kernels(bias: Tensor) -> Tensor:
    """Returns a bias ``(H, N + 1, N + 1)`` in the number format that autocast computes in, aligned where that counts.

    The efficient CUDA kernel reads rows that are a multiple of 8 numbers apart; of any other bias it makes a copy, at
    every call. The gradients of all blocks that share the bias are added up in its number format.
    """
    device_type = bias.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        bias = bias.to(torch.get_autocast_dtype(device_type))
    return aligned(bias) if device_type == "cuda" else bias


def aligned(bias: Tensor) -> Tensor:
    """Returns a tensor of the same values whose rows, the last dimension, are a multiple of 8 numbers apart."""
    length = bias.shape[-1]
    return F.pad(bias, (0, -length % ROW_ALIGNMENT))[..., :length]


class Mlp(nn.Module):
    """Two linear layers with a GELU between them; dropout only after the second, as official.

    Args:
        dim: Channels of a token.
        hidden_dim: Channels between the layers.
        drop: Dropout of the output.
    """

    def __init__(self, dim: int, *, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Maps each token of ``(B, N + 1, D)`` on its own."""
        return self.drop(self.fc2(self.act(self.fc1(x))))


class Block(nn.Module):
    """A pre-norm transformer layer, each branch scaled by LayerScale and dropped whole by stochastic depth.

    Args:
        dim: Channels of a token.
        num_heads: As for :class:`Attention`, with ``qkv_bias``, ``attn_drop`` and ``window_size``.
        mlp_ratio: Width of the MLP over ``dim``.
        drop: Dropout of the outputs of attention and MLP.
        drop_path: Probability that a branch is dropped for an image.
        init_values: Initial value of LayerScale; 0 or None for none.
        norm_layer: Makes a normalisation layer from its number of channels.

    Source: LayerScale is arXiv 2103.17239, stochastic depth arXiv 1603.09382.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
        norm_layer: NormLayer = LAYER_NORM,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        window_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values)) if init_values else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values)) if init_values else None
        self.norm1 = norm_layer(dim)
        self.attn = Attention(
            dim, num_heads=num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=drop, window_size=window_size
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, hidden_dim=int(dim * mlp_ratio), drop=drop)

    def forward(self, x: Tensor, index: Tensor | None = None, shared_bias: Tensor | None = None) -> Tensor:
        """Takes tokens ``(B, N + 1, D)`` to the next layer; the other arguments are those of :class:`Attention`."""
        x = x + self._branch(self.attn(self.norm1(x), index, shared_bias), self.gamma_1)
        return x + self._branch(self.mlp(self.norm2(x)), self.gamma_2)

    def _branch(self, x: Tensor, gamma: Tensor | None) -> Tensor:
        return self.drop_path(x if gamma is None else gamma * x)


class Backbone(nn.Module):
    """What the tasks share: all from the image to the last block. A subclass adds norms, head and initialisation.

    Args:
        img_size: Height and width of the images in pixels; one number for a square.
        patch_size: Height and width of a patch in pixels; one number for a square.
        in_chans: Channels of the images.
        embed_dim: Channels of a token, ``D``.
        depth: Number of blocks.
        num_heads: Attention heads of a block.
        mlp_ratio: Width of a block's MLP over ``embed_dim``.
        qkv_bias: Learn the biases of query and value.
        drop_rate: Dropout of the tokens and of each branch.
        attn_drop_rate: Dropout of the attention probabilities.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 in the first.
        norm_layer: Makes a normalisation layer from its number of channels; None for LayerNorm with eps 1e-6.
        init_values: Initial value of LayerScale; 0 or None for none.
        use_abs_pos_emb: Learn a position embedding.
        use_rel_pos_bias: Learn a relative position bias in each block.
        use_shared_rel_pos_bias: Learn one relative position bias for all blocks.
        qk_scale: No meaning here; None.
        attn_head_dim: No meaning here; None.
        drop_block_rate: No meaning here; None.

    Attributes:
        grad_checkpointing: Recompute the blocks in the backward pass; set by :meth:`set_grad_checkpointing`.

    Raises:
        InputError: Sizes that do not fit each other, or an official keyword that has no meaning here.

    Deviation: Official classifiers default to no ``qkv_bias``, although every published model has it.
    """

    has_mask_token: ClassVar[bool] = False
    __signature__: ClassVar[Signature]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Shows the keywords of this class in the signature of a subclass, which passes them on as ``**backbone``."""
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            return  # the keywords are those of the class above, as in what FSDP makes of a model's class
        own = [p for p in signature(cls.__init__).parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
        names = {parameter.name for parameter in own}
        inherited = signature(cls.__mro__[1]).parameters.values()
        cls.__signature__ = Signature([*own, *(p for p in inherited if p.name not in names)])

    def __init__(
        self,
        *,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: NormLayer | None = None,
        init_values: float | None = None,
        use_abs_pos_emb: bool = True,
        use_rel_pos_bias: bool = False,
        use_shared_rel_pos_bias: bool = False,
        qk_scale: None = None,
        attn_head_dim: None = None,
        drop_block_rate: None = None,
    ) -> None:
        super().__init__()
        self.metadata: Mapping[str, Any] = {}  # what a checkpoint says besides the weights: labels, mean and std, …
        _refuse("qk_scale", qk_scale, "queries are scaled by the square root of their width, set by num_heads")
        _refuse("attn_head_dim", attn_head_dim, "the width of a head is embed_dim / num_heads")
        _refuse("drop_block_rate", drop_block_rate, "use drop_path_rate")
        self.embed_dim = self.num_features = embed_dim
        self.num_heads = num_heads
        self.init_values = init_values
        self.norm_layer = norm_layer or LAYER_NORM
        self.grad_checkpointing = False

        # The order of registration is the order of the official optimizer states.
        patch_embed = PatchEmbed(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        window = patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if self.has_mask_token else None
        self.pos_embed = (
            nn.Parameter(torch.zeros(1, 1 + patch_embed.num_patches, embed_dim)) if use_abs_pos_emb else None
        )
        self.patch_embed = patch_embed
        self.pos_drop = nn.Dropout(drop_rate)
        self.rel_pos_bias = RelativePositionBias(window, num_heads) if use_shared_rel_pos_bias else None
        layers = nn.ModuleList(
            Block(
                embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_path_rate * layer / max(depth - 1, 1),
                init_values=init_values,
                norm_layer=self.norm_layer,
                window_size=window if use_rel_pos_bias else None,
            )
            for layer in range(depth)
        )
        self.blocks = cast("Sequence[Block]", layers)
        # One index serves every table. It follows from the window, so it is in no checkpoint of ours.
        index = relative_position_index(window) if use_rel_pos_bias or use_shared_rel_pos_bias else None
        self.register_buffer("relative_position_index", index, persistent=False)
        self.relative_position_index: Tensor | None
        self.register_load_state_dict_pre_hook(_drop_relative_position_index)

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.patch_embed.img_size

    def embed(self, x: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Turns images ``(B, C, H, W)`` into the tokens ``(B, N + 1, D)`` that enter the first block.

        Args:
            x: Images, normalised.
            bool_masked_pos: Which patches give way to the mask token, ``(B, N)`` or ``(B, h, w)``.
        """
        tokens = self.patch_embed(x)  # (B, N, D)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise InputError("a classifier has no mask token: leave bool_masked_pos out")
            mask = self._flat_mask(bool_masked_pos, len(x))
            tokens = torch.where(mask.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        # Not len(x), which would fix the batch size of an exported graph.
        tokens = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), tokens), dim=1)  # (B, N+1, D)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        return self.pos_drop(tokens)

    def forward_blocks(
        self, x: Tensor, *, stop: int | None = None, keep: Collection[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs tokens through the blocks.

        Args:
            x: Tokens ``(B, N + 1, D)`` from :meth:`embed`.
            stop: Run only the first so many blocks; None for all.
            keep: Blocks, counted from 0, whose outputs are wanted.

        Returns:
            The output of the last block run, and those of ``keep`` in the order of the blocks, all ``(B, N + 1, D)``
            before any norm.
        """
        shared_bias = self._shared_bias()
        if shared_bias is not None:
            shared_bias = ready_for_kernels(shared_bias)  # here, once, and not in each block
        kept = []
        for layer, block in enumerate(islice(self.blocks, stop)):
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, self.relative_position_index, shared_bias, use_reentrant=False)
            else:
                x = block(x, self.relative_position_index, shared_bias)
            if layer in keep:
                kept.append(x)
        return x, kept

    @contextmanager
    def holding_biases(self) -> Iterator[None]:
        """Gathers the blocks' own biases once for many forward passes, in the number format of autocast.

        They take ``depth * H * (N + 1)**2`` numbers, and are let go at the end. They are not read where gradients are
        recorded, nor once a table has changed; a change through ``.data`` goes unseen.
        """
        layers = [block.attn for block in self.blocks if block.attn.relative_position_bias_table is not None]
        try:
            with torch.no_grad():
                for layer in layers:
                    bias = cast("Tensor", layer._bias(self.relative_position_index, None))
                    table = cast("nn.Parameter", layer.relative_position_bias_table)
                    layer.held_bias = table, _version(table), ready_for_kernels(bias)
            yield
        finally:
            for layer in layers:
                layer.held_bias = None

    def get_intermediate_layers(
        self, x: Tensor, n: int | Collection[int] | None = None, reshape: bool = False
    ) -> list[Tensor]:
        """Returns the raw outputs of blocks, before any norm.

        Args:
            x: Images ``(B, C, H, W)``.
            n: The last ``n`` blocks, or the blocks with these numbers (from 0); None for all.
            reshape: Leave the class token out and arrange the patches as images.

        Returns:
            For each block, in their order, ``(B, N + 1, D)``; reshaped, ``(B, D, h, w)``.

        Raises:
            InputError: There is no such block.
        """
        depth = self.get_num_layers()
        wanted = range(depth) if n is None else range(depth - n, depth) if isinstance(n, int) else n
        if not len(wanted) or min(wanted) < 0 or max(wanted) >= depth:
            raise InputError(f"n={n}: the model has {depth} blocks, numbered from 0; give how many, or which")
        _, outputs = self.forward_blocks(self.embed(x), stop=max(wanted) + 1, keep=wanted)
        if not reshape:
            return outputs
        return [rearrange(out[:, 1:], "b (h w) d -> b d h w", h=self.patch_embed.grid_size[0]) for out in outputs]

    def get_attention_maps(self, x: Tensor, block: int = -1, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Returns the attention probabilities of one block for images ``(B, C, H, W)``.

        Args:
            x: Images.
            block: The block, counted from 0, or from the end if negative.
            bool_masked_pos: Masked patches, as in :meth:`embed`.

        Returns:
            ``(B, H, N + 1, N + 1)``, indexed by query and key; each row sums to 1.

        Raises:
            InputError: There is no such block.
        """
        depth = self.get_num_layers()
        if not -depth <= block < depth:
            raise InputError(f"block={block}: the model has {depth} blocks, numbered from 0")
        tokens, _ = self.forward_blocks(self.embed(x, bool_masked_pos), stop=block % depth)
        layer = self.blocks[block]
        return layer.attn.attention_map(layer.norm1(tokens), self.relative_position_index, self._shared_bias())

    def get_num_layers(self) -> int:
        """Returns the number of blocks."""
        return len(self.blocks)

    def no_weight_decay(self) -> set[str]:
        """Names the parameters without weight decay besides those of one dimension; the mask token has it."""
        return {"pos_embed", "cls_token"}

    def layer_id(self, parameter_name: str) -> int:
        """Returns a parameter's depth: 0 for tokens and patches, i + 1 for block i, the last for all the others."""
        head, *rest = parameter_name.split(".")
        if head in ("cls_token", "mask_token", "pos_embed", "patch_embed"):
            return 0
        return int(rest[0]) + 1 if head == "blocks" else self.get_num_layers() + 1

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: keeps only the inputs of the blocks and runs each again in the backward pass."""
        self.grad_checkpointing = enable

    def set_attention(self, implementation: str) -> None:
        """Chooses the attention: ``"sdpa"`` (the default, fused) or ``"eager"`` (plain operations, the same numbers).

        Raises:
            InputError: Another name.
        """
        if implementation not in ("sdpa", "eager"):
            raise InputError(f"unknown attention {implementation!r}: choose 'sdpa' or 'eager'")
        for block in self.blocks:
            block.attn.fused = implementation == "sdpa"

    @torch.no_grad()
    def set_input_size(self, img_size: Size) -> None:
        """Takes images of another size ``(H, W)`` from now on, resizing bias tables and position embedding.

        The resized parameters are new objects: call this before building an optimizer.

        Raises:
            InputError: The size is not a multiple of the patch size.
        """
        source = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        target = self.patch_embed.grid_size
        if target == source:
            return
        for module in self.modules():
            if isinstance(module, RelativePositionBias | Attention) and module.relative_position_bias_table is not None:
                table = module.relative_position_bias_table
                module.relative_position_bias_table = _like(table, resize_table(table, source, target))
                module.window_size = target
        if self.pos_embed is not None:
            self.pos_embed = _like(self.pos_embed, resize_position_embedding(self.pos_embed, source, target))
        if self.relative_position_index is not None:
            self.relative_position_index = relative_position_index(target).to(self.relative_position_index.device)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws every parameter anew, each branch of block ``i`` (from 1) ending in weights divided by sqrt(2 i)."""
        for name, parameter in self.named_parameters():
            leaf = name.rpartition(".")[2]
            if leaf.startswith("gamma_"):
                parameter.fill_(self.init_values or 0.0)
            elif leaf.endswith(("bias", "bias_table")):
                parameter.zero_()
            elif parameter.ndim == 1:  # the weight of a norm
                parameter.fill_(1.0)
            else:
                self.draw_(parameter)
        if self.relative_position_index is not None:  # filled too, for a model that comes from the meta device
            self.relative_position_index.copy_(relative_position_index(self.patch_embed.grid_size))
        for layer, block in enumerate(self.blocks, start=1):
            block.attn.proj.weight.div_(math.sqrt(2.0 * layer))
            block.mlp.fc2.weight.div_(math.sqrt(2.0 * layer))

    def draw_(self, parameter: Tensor) -> None:
        """Fills a matrix or a token from the task's distribution."""
        raise NotImplementedError

    def _shared_bias(self) -> Tensor | None:
        return None if self.rel_pos_bias is None else self.rel_pos_bias(self.relative_position_index)

    def _flat_mask(self, bool_masked_pos: Tensor, batch_size: int) -> Tensor:
        grid = self.patch_embed.grid_size
        if tuple(bool_masked_pos.shape) not in ((batch_size, self.patch_embed.num_patches), (batch_size, *grid)):
            raise InputError(
                f"bool_masked_pos has shape {tuple(bool_masked_pos.shape)}, but {batch_size} images of {grid[0]} x "
                f"{grid[1]} patches need ({batch_size}, {self.patch_embed.num_patches}) or {(batch_size, *grid)}"
            )
        return bool_masked_pos.flatten(1).to(torch.bool)


class VisionTransformer(Backbone):
    """Classifier: the mean of the patch tokens, or the class token, into a linear head.

    Args:
        num_classes: Classes of the head; 0 for no head, so that the model returns features.
        use_mean_pooling: Classify ``fc_norm(mean of the patch tokens)``; False: the class token after the final norm.
        init_scale: Factor on the head's initial weights.
        **backbone: Keywords of :class:`Backbone`.
    """

    def __init__(
        self, *, num_classes: int = 1000, use_mean_pooling: bool = True, init_scale: float = 0.001, **backbone: Any
    ) -> None:
        super().__init__(**backbone)
        self.num_classes = num_classes
        self.init_scale = init_scale
        self.norm = nn.Identity() if use_mean_pooling else self.norm_layer(self.embed_dim)
        self.fc_norm = self.norm_layer(self.embed_dim) if use_mean_pooling else None
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images ``(B, C, H, W)``: logits ``(B, num_classes)``."""
        return self.head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the features ``(B, D)`` that enter the head."""
        tokens, _ = self.forward_blocks(self.embed(x))
        if self.fc_norm is not None:
            return self.fc_norm(tokens[:, 1:].mean(dim=1))
        return self.norm(tokens[:, 0])

    def get_classifier(self) -> nn.Module:
        """Returns the head, an ``nn.Identity`` where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head by a fresh one, initialised as in a new model; 0 for none.

        Deviation: The official code leaves the new head at torch's default, a thousand times larger.
        """
        self.num_classes = num_classes
        if num_classes > 0:
            self.head = nn.Linear(self.embed_dim, num_classes).to(self.cls_token)
            self._init_head()
        else:
            self.head = nn.Identity()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws every parameter anew; the patch projection keeps torch's own distribution, as official."""
        super().init_weights()
        self.patch_embed.proj.reset_parameters()
        self._init_head()

    def draw_(self, parameter: Tensor) -> None:
        """Draws from N(0, 0.02²) truncated at ±2, 100 standard deviations: in effect not truncated, as official."""
        trunc_normal_(parameter, std=0.02, a=-2.0, b=2.0)

    @torch.no_grad()
    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            self.draw_(self.head.weight)
            self.head.weight.mul_(self.init_scale)
            self.head.bias.zero_()


class VisionTransformerForMaskedImageModeling(Backbone):
    """Predicts the visual token of each masked patch, or whatever else a target asks of it.

    Args:
        vocab_size: Number of visual tokens; of another target, how many numbers describe a patch.
        init_std: Standard deviation of the initial weights before truncation.
        **backbone: Keywords of :class:`Backbone`.
    """

    has_mask_token = True

    def __init__(self, *, vocab_size: int = 8192, init_std: float = 0.02, **backbone: Any) -> None:
        super().__init__(**backbone)
        self.vocab_size = vocab_size
        self.init_std = init_std
        self.norm = self.norm_layer(self.embed_dim)
        self.lm_head = nn.Linear(self.embed_dim, vocab_size)
        self.init_weights()

    def forward(
        self,
        x: Tensor,
        bool_masked_pos: Tensor,
        return_all_tokens: bool = False,
        masked_index: Tensor | None = None,
    ) -> Tensor:
        """Predicts visual tokens.

        Args:
            x: Images ``(B, C, H, W)``, normalised.
            bool_masked_pos: True where a patch is masked, ``(B, N)`` or ``(B, h, w)``.
            return_all_tokens: Predict all patches, not only the masked ones.
            masked_index: ``bool_masked_pos.flatten().nonzero().flatten()``, for those who know it already: finding it
                on a GPU makes the host wait for the number of masked patches. Or the places of other patches among
                all ``B * N``, whose predictions are then returned in that order.

        Returns:
            Logits ``(M, vocab_size)`` of the ``M`` masked patches, image by image and row by row; or, of all of them,
            ``(B, N, vocab_size)``.

        Raises:
            InputError: Images or mask do not have the model's size.
        """
        tokens, _ = self.forward_blocks(self.embed(x, bool_masked_pos))
        patches = tokens[:, 1:]
        if not return_all_tokens:
            if masked_index is None:
                masked_index = self._flat_mask(bool_masked_pos, len(x)).flatten().nonzero().flatten()
            patches = patches.flatten(0, 1).index_select(0, masked_index)  # (M, D)
        return self.lm_head(self.norm(patches))

    def forward_features(self, x: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Returns all tokens after the final norm, ``(B, N + 1, D)``; without a mask, those of the whole image."""
        tokens, _ = self.forward_blocks(self.embed(x, bool_masked_pos))
        return self.norm(tokens)

    def draw_(self, parameter: Tensor) -> None:
        """Draws from N(0, init_std²) truncated at ±1 standard deviation."""
        trunc_normal_(parameter, std=self.init_std, a=-self.init_std, b=self.init_std)


def resize_position_embedding(pos_embed: Tensor, source_grid: tuple[int, int], target_grid: tuple[int, int]) -> Tensor:
    """Carries a position embedding to another patch grid by bicubic interpolation; the class token keeps its own.

    Args:
        pos_embed: ``(1, 1 + h * w, D)``.
        source_grid: The grid ``(h, w)`` it was trained with.
        target_grid: The grid ``(h', w')`` it is wanted for.

    Returns:
        ``(1, 1 + h' * w', D)``.

    Raises:
        InputError: The embedding does not have the shape of ``source_grid``.
    """
    height, width = source_grid
    if pos_embed.ndim != 3 or pos_embed.shape[1] != 1 + height * width:
        raise InputError(
            f"a position embedding for {height} x {width} patches has shape (1, {1 + height * width}, channels), "
            f"not {tuple(pos_embed.shape)}"
        )
    patches = rearrange(pos_embed[:, 1:], "one (h w) d -> one d h w", h=height)
    resized = F.interpolate(patches, size=target_grid, mode="bicubic", align_corners=False)
    return torch.cat((pos_embed[:, :1], rearrange(resized, "one d h w -> one (h w) d")), dim=1)


def _version(tensor: Tensor) -> int:
    """Returns how often a tensor was changed in place, as far as that is counted."""
    return 0 if tensor.is_inference() else tensor._version


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _like(old: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=old.requires_grad)


def _refuse(keyword: str, value: object, replacement: str) -> None:
    if value is not None:
        raise InputError(f"{keyword}={value} has no meaning here: {replacement}")


def _drop_relative_position_index(_module: nn.Module, state_dict: dict[str, Tensor], *_unused: object) -> None:
    """Leaves out the index buffers of official checkpoints, which follow from the window size."""
    for key in [key for key in state_dict if key.endswith("relative_position_index")]:
        del state_dict[key]
