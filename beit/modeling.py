"""The BEiT architecture, bottom up: patch embedding, block, backbone, and the models of the two tasks.

Shapes: ``B`` images, ``N = h * w`` patches in a grid ``(h, w)``, ``D`` channels, ``H`` heads. Token 0 is the class
token.

Source: BEiT: BERT Pre-Training of Image Transformers (arXiv 2106.08254).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from inspect import signature
from itertools import islice
from typing import Any, ClassVar, cast

import torch
from einops import rearrange
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit.attention import Attention, RelativePositionBias, ready_for_kernels
from beit.errors import InputError, did_you_mean
from beit.relative_position import relative_position_index, resize_position_embedding, resize_table

Size = int | tuple[int, int]
NormLayer = Callable[[int], nn.Module]
Biases = Sequence[Tensor | None]  # of each block's attention, (H, N + 1, N + 1)

LAYER_NORM: NormLayer = partial(nn.LayerNorm, eps=1e-6)

WITHOUT_MEANING = {  # official keywords, None in every published model, and what to use instead
    "qk_scale": "num_heads",
    "attn_head_dim": "num_heads",
    "drop_block_rate": "drop_path_rate",
}


class PatchEmbed(nn.Module):
    """Splits images into patches and projects each to a token; for the sizes see :class:`Backbone`.

    Raises:
        InputError: The image size is not a multiple of the patch size.
    """

    def __init__(self, *, img_size: Size, patch_size: Size, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = _pair(patch_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.set_input_size(img_size)

    def set_input_size(self, img_size: Size) -> None:
        """Switches to images of size ``(H, W)``; the projection does not depend on it."""
        (height, width), (rows, columns) = _pair(img_size), self.patch_size
        if min(height, width) < 1 or height % rows or width % columns:
            raise InputError(
                f"an image of {height} x {width} pixels cannot be cut into patches of {rows} x {columns}: "
                "give img_size as multiples of the patch size"
            )
        self.img_size = (height, width)
        self.grid_size = (height // rows, width // columns)

    @property
    def num_patches(self) -> int:
        """``N``, the number of patches of an image."""
        return self.grid_size[0] * self.grid_size[1]

    def forward(self, images: Tensor) -> Tensor:
        """Embeds images ``(B, C, H, W)`` as tokens ``(B, N, D)``, row by row."""
        channels = self.proj.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise InputError(f"images must have shape (B, {channels}, height, width), not {tuple(images.shape)}")
        if (size := tuple(images.shape[2:])) != self.img_size:
            raise InputError(
                f"images are {size[0]} x {size[1]} pixels, but the model is set to {self.img_size[0]} x "
                f"{self.img_size[1]}: resize them, or call model.set_input_size({size})"
            )
        return rearrange(self.proj(images), "b d h w -> b (h w) d")


class Block(nn.Module):
    """A pre-norm transformer block, its branches scaled by LayerScale and dropped by stochastic depth.

    Args:
        dim: Token channels.
        num_heads: See :class:`Attention`, also for ``qkv_bias``, ``attn_drop`` and ``window_size``.
        mlp_ratio: Hidden width of the MLP, as a multiple of ``dim``.
        drop: Dropout of the outputs of attention and MLP.
        drop_path: Probability of dropping a branch for an image.
        init_values: Initial value of LayerScale; 0 or None for none.
        norm_layer: Builds a normalisation layer for a number of channels.

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
        # Dropout after the second layer only, as in the official code.
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=(0.0, drop))

    def forward(self, x: Tensor, index: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Transforms tokens ``(B, N + 1, D)``; for ``index`` and ``bias`` see :class:`Attention`."""
        x = self._residual(x, self.attn(self.norm1(x), index, bias), self.gamma_1)
        return self._residual(x, self.mlp(self.norm2(x)), self.gamma_2)

    @torch.no_grad()
    def damp(self, layer: int) -> None:
        """Divides the weights of ``proj`` and ``fc2`` by sqrt(2 layer), where ``layer`` counts the blocks from 1."""
        for linear in (self.attn.proj, self.mlp.fc2):
            linear.weight.div_(math.sqrt(2.0 * layer))

    def _residual(self, x: Tensor, branch: Tensor, gamma: Tensor | None) -> Tensor:
        if gamma is None:
            return x + self.drop_path(branch)
        # Both factors in one pass over the tokens.
        return x + gamma * self.drop_path(x.new_ones(x.shape[0], 1, 1)) * branch  # (B, 1, D) * (B, N + 1, D)


class Backbone(nn.Module):
    """Everything from the image to the last block. Subclasses add norms, a head and the initialisation.

    Args:
        img_size: Image height and width in pixels; one number for a square.
        patch_size: Patch height and width in pixels; one number for a square.
        in_chans: Image channels.
        embed_dim: Token channels, ``D``.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        mlp_ratio: Hidden width of the MLPs, as a multiple of ``embed_dim``.
        qkv_bias: Learn biases for query and value.
        drop_rate: Dropout of the tokens and of each branch.
        attn_drop_rate: Dropout of the attention probabilities.
        drop_path_rate: Stochastic depth rate of the last block; grows linearly from 0 in the first.
        norm_layer: Builds a normalisation layer for a number of channels; None for LayerNorm with eps 1e-6.
        init_values: Initial value of LayerScale; 0 or None for none.
        use_abs_pos_emb: Learn absolute position embeddings.
        use_rel_pos_bias: Learn a relative position bias in each block.
        use_shared_rel_pos_bias: Learn one relative position bias for all blocks.
        **official: Official keywords that have no meaning here (``WITHOUT_MEANING``), at their default, None.

    Raises:
        InputError: Sizes that do not go together, or a value for a keyword that has no meaning here.
        TypeError: An unknown keyword.

    Deviation: ``qkv_bias`` defaults to True, as every published model has it; official classifiers default to False.
    """

    has_mask_token: ClassVar[bool] = False
    relative_position_index: Tensor | None
    forward_features: Callable[..., Tensor]  # what the head sees of images (B, C, H, W); a subclass's
    init_std: float = 0.02
    init_limit: float = 2.0  # 100 standard deviations: effectively not truncated, as official except for MIM

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
        **official: object,
    ) -> None:
        super().__init__()
        sizes = {"patch_size": patch_size, "in_chans": in_chans, "embed_dim": embed_dim, "depth": depth}
        self._refuse(official, {**sizes, "num_heads": num_heads, "mlp_ratio": mlp_ratio})
        self.metadata: Mapping[str, Any] = {}  # what a checkpoint records besides weights: labels, mean and std, …
        self.embed_dim = self.num_features = embed_dim
        self.num_heads, self.init_values = num_heads, init_values
        self.norm_layer = norm_layer or LAYER_NORM
        self.grad_checkpointing = False  # recompute the blocks in the backward pass

        # Parameters are registered in the order of the official optimizer states.
        patch_embed = PatchEmbed(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        window = patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if self.has_mask_token else None
        positions = 1 + patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim)) if use_abs_pos_emb else None
        self.patch_embed = patch_embed
        self.pos_drop = nn.Dropout(drop_rate)
        self.rel_pos_bias = RelativePositionBias(window, num_heads) if use_shared_rel_pos_bias else None
        self._new_block = partial(
            Block,
            embed_dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            drop=drop_rate,
            attn_drop=attn_drop_rate,
            init_values=init_values,
            norm_layer=self.norm_layer,
            window_size=window if use_rel_pos_bias else None,
        )
        self.blocks = self.new_blocks(0, depth, drop_path_rate, depth)
        # One index for all tables. It follows from the window, so our checkpoints leave it out.
        index = relative_position_index(window) if use_rel_pos_bias or use_shared_rel_pos_bias else None
        self.register_buffer("relative_position_index", index, persistent=False)
        self.register_load_state_dict_pre_hook(_drop_relative_position_index)

    def new_blocks(self, start: int, stop: int, drop_path_rate: float, depth: int) -> Sequence[Block]:
        """Builds blocks ``start`` to ``stop - 1`` of a stack of ``depth``, whose drop rate grows from 0 linearly."""
        rates = (drop_path_rate * layer / max(depth - 1, 1) for layer in range(start, stop))
        return cast("Sequence[Block]", nn.ModuleList(self._new_block(drop_path=rate) for rate in rates))

    def _refuse(self, official: Mapping[str, object], sizes: Mapping[str, float | Size]) -> None:
        for keyword, value in official.items():
            if keyword not in WITHOUT_MEANING:
                known = {**signature(Backbone).parameters, **signature(type(self)).parameters}
                problem = f"got an unexpected keyword argument {keyword!r}{did_you_mean(keyword, known)}"
                raise TypeError(f"{type(self).__name__}() {problem}")
            if value is not None:
                raise InputError(f"{keyword}={value} has no meaning here: use {WITHOUT_MEANING[keyword]}")
        for name, size in sizes.items():
            if min(size if isinstance(size, Sequence) else [size]) <= 0:
                raise InputError(f"{name} {size}: must be above 0")

    @property
    def img_size(self) -> tuple[int, int]:
        """Image height and width, in pixels."""
        return self.patch_embed.img_size

    def embed(self, x: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Embeds normalised images ``(B, C, H, W)`` as the tokens ``(B, N + 1, D)`` that enter the first block.

        ``bool_masked_pos`` are the patches to replace with the mask token, ``(B, N)`` or ``(B, h, w)``.
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
        self,
        x: Tensor,
        *,
        stop: int | None = None,
        keep: Collection[int] = (),
        biases: Biases | None = None,
        blocks: Sequence[Block] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs tokens through the blocks; returns the last output and those of ``keep``, before any norm.

        Args:
            x: Tokens ``(B, N + 1, D)`` from :meth:`embed`; all outputs have this shape.
            stop: Number of blocks to run; None for all.
            keep: Blocks, counted from 0, to return the outputs of, in the order of the blocks.
            biases: From :meth:`position_biases`, to look up no table here.
            blocks: Other blocks than the model's stack.
        """
        index, shared = self.relative_position_index, None if biases else self._shared_bias()
        kept = []
        for layer, block in enumerate(islice(blocks or self.blocks, stop)):
            inputs = (x, None, biases[layer]) if biases else (x, index, shared)
            recompute = self.grad_checkpointing and self.training
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
            if layer in keep:
                kept.append(x)
        return x, kept

    def patch_features(self, x: Tensor) -> Tensor:
        """Returns the patch tokens of images ``(B, C, H, W)`` after the model's last norm, ``(B, N, D)``."""
        norm: nn.Module = getattr(self, "fc_norm", None) or self.norm  # type: ignore[assignment]
        return norm(self.forward_blocks(self.embed(x))[0][:, 1:])

    def position_biases(self) -> Biases:
        """Looks up the attention bias of every block, for many calls of :meth:`forward_blocks` without gradients.

        They are in the dtype of autocast, up to ``depth * H * (N + 1)**2`` elements, and hold until a table or the
        image size changes.
        """
        shared = self._shared_bias()
        biases = (block.attn.position_bias(self.relative_position_index, shared) for block in self.blocks)
        return [bias if bias is None or bias is shared else ready_for_kernels(bias) for bias in biases]

    def get_intermediate_layers(
        self, x: Tensor, n: int | Collection[int] | None = None, reshape: bool = False
    ) -> list[Tensor]:
        """Returns the raw outputs of blocks, in order and before any norm, each ``(B, N + 1, D)``.

        Args:
            x: Images ``(B, C, H, W)``.
            n: The last ``n`` blocks, or the numbers of the blocks, from 0; None for all.
            reshape: Drop the class token and arrange the patches as a feature map, ``(B, D, h, w)``.

        Raises:
            InputError: There is no such block.
        """
        depth = self.get_num_layers()
        wanted = range(depth) if n is None else range(depth - n, depth) if isinstance(n, int) else n
        if not len(wanted) or min(wanted) < 0 or max(wanted) >= depth:
            raise InputError(f"n={n}: the model has {depth} blocks, numbered from 0; give how many, or which")
        _, outputs = self.forward_blocks(self.embed(x), stop=max(wanted) + 1, keep=wanted)
        return [self.feature_map(tokens) for tokens in outputs] if reshape else outputs

    def feature_map(self, tokens: Tensor) -> Tensor:
        """Arranges the patches of tokens ``(B, N + 1, D)`` as ``(B, D, h, w)``."""
        return rearrange(tokens[:, 1:], "b (h w) d -> b d h w", h=self.patch_embed.grid_size[0])

    def get_attention_maps(self, x: Tensor, block: int = -1, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Returns the attention probabilities of a block, ``(B, H, N + 1, N + 1)``; each row (a query) sums to 1.

        Args:
            x: Images ``(B, C, H, W)``.
            block: Number of the block, from 0; negative from the end.
            bool_masked_pos: Masked patches, as for :meth:`embed`.

        Raises:
            InputError: There is no such block.
        """
        depth = self.get_num_layers()
        if not -depth <= block < depth:
            raise InputError(f"block={block}: the model has {depth} blocks, numbered from 0")
        tokens, _ = self.forward_blocks(self.embed(x, bool_masked_pos), stop=block % depth)
        layer = self.blocks[block]
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias(self.relative_position_index)
        return layer.attn.attention_map(layer.norm1(tokens), self.relative_position_index, shared)

    def get_num_layers(self) -> int:
        """Returns the number of blocks."""
        return len(self.blocks)

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters exempt from weight decay besides 1-D ones; the mask token is not, as official."""
        return {"pos_embed", "cls_token"}

    def layer_id(self, parameter_name: str) -> int:
        """Returns a parameter's depth: 0 for tokens and patch embedding, i + 1 for block i, depth + 1 for the rest."""
        head, *rest = parameter_name.split(".")
        if head in ("cls_token", "mask_token", "pos_embed", "patch_embed"):
            return 0
        return int(rest[0]) + 1 if head == "blocks" else self.get_num_layers() + 1

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades compute for memory: stores only the blocks' inputs and reruns each block in the backward pass."""
        self.grad_checkpointing = enable

    def set_attention(self, implementation: str) -> None:
        """Selects ``"sdpa"`` (fused, the default) or ``"eager"`` attention; raises InputError for other names."""
        if implementation not in ("sdpa", "eager"):
            raise InputError(f"unknown attention {implementation!r}: choose 'sdpa' or 'eager'")
        for module in self.modules():
            if isinstance(module, Attention):
                module.fused = implementation == "sdpa"

    @torch.no_grad()
    def set_input_size(self, img_size: Size) -> None:
        """Switches to images of size ``(H, W)``, resizing bias tables and position embeddings.

        Resized parameters are new objects: call this before building an optimizer.

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
                table, module.window_size = module.relative_position_bias_table, target
                resized = resize_table(table, source, target)
                module.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
        if self.pos_embed is not None:
            resized = resize_position_embedding(self.pos_embed, source, target)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        if self.relative_position_index is not None:
            self.relative_position_index = relative_position_index(target).to(self.relative_position_index.device)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Reinitialises every parameter; ``proj`` and ``fc2`` of block ``i`` (from 1) are divided by sqrt(2 i)."""
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
        if self.relative_position_index is not None:  # for a model that comes from the meta device
            self.relative_position_index.copy_(relative_position_index(self.patch_embed.grid_size))
        for layer, block in enumerate(self.blocks, start=1):
            block.damp(layer)

    def draw_(self, parameter: Tensor) -> None:
        """Samples a matrix or a token in place from N(0, init_std²), truncated at ±init_limit."""
        trunc_normal_(parameter, std=self.init_std, a=-self.init_limit, b=self.init_limit)

    def _shared_bias(self) -> Tensor | None:
        """Returns the bias that all blocks share, made ready here once rather than in each of them."""
        return None if self.rel_pos_bias is None else ready_for_kernels(self.rel_pos_bias(self.relative_position_index))

    def _flat_mask(self, bool_masked_pos: Tensor, batch_size: int) -> Tensor:
        grid = self.patch_embed.grid_size
        if tuple(bool_masked_pos.shape) not in ((batch_size, self.patch_embed.num_patches), (batch_size, *grid)):
            raise InputError(
                f"bool_masked_pos has shape {tuple(bool_masked_pos.shape)}, but {batch_size} images of {grid[0]} x "
                f"{grid[1]} patches need ({batch_size}, {self.patch_embed.num_patches}) or {(batch_size, *grid)}"
            )
        return bool_masked_pos.flatten(1).to(torch.bool)


class VisionTransformer(Backbone):
    """Classifier: a linear head on the mean patch token or on the class token.

    Args:
        num_classes: Number of classes; 0 for no head, so that the model returns features.
        use_mean_pooling: Classify ``fc_norm(mean of the patch tokens)``; False: the class token after the final norm.
        init_scale: Factor on the head's initial weights.
        **backbone: Keywords of :class:`Backbone`.
    """

    def __init__(
        self, *, num_classes: int = 1000, use_mean_pooling: bool = True, init_scale: float = 0.001, **backbone: Any
    ) -> None:
        super().__init__(**backbone)
        self.num_classes, self.init_scale = num_classes, init_scale
        self.norm = nn.Identity() if use_mean_pooling else self.norm_layer(self.embed_dim)
        self.fc_norm = self.norm_layer(self.embed_dim) if use_mean_pooling else None
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images ``(B, C, H, W)``: logits ``(B, num_classes)``."""
        return self.head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the pooled features ``(B, D)`` that enter the head."""
        tokens, _ = self.forward_blocks(self.embed(x))
        if self.fc_norm is not None:
            return self.fc_norm(tokens[:, 1:].mean(dim=1))
        return self.norm(tokens[:, 0])

    def get_classifier(self) -> nn.Module:
        """Returns the head; ``nn.Identity`` without one."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head by a new one, initialised as in a new model; 0 classes for none.

        Deviation: The official code leaves the new head at torch's default, a thousand times larger.
        """
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head.to(self.cls_token)
        self._init_head()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Reinitialises every parameter; the patch projection gets torch's default, as official."""
        super().init_weights()
        self.patch_embed.proj.reset_parameters()
        self._init_head()

    @torch.no_grad()
    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            self.draw_(self.head.weight)
            self.head.weight.mul_(self.init_scale)
            self.head.bias.zero_()


class VisionTransformerForMaskedImageModeling(Backbone):
    """Predicts the visual tokens of masked patches, or any other target of ``vocab_size`` numbers per patch.

    With ``head_layers`` it predicts them twice, as BEiT v2 does (arXiv 2208.06366, patch aggregation): further blocks
    mix the patches as an early block leaves them with the class token of the last. What the second prediction needs to
    know of the last blocks passes through the class token, which so learns to describe the image.

    Args:
        vocab_size: Number of visual tokens, or of regressed values per patch.
        init_std: Standard deviation of the initial weights before truncation.
        head_layers: Number of blocks for the second prediction; 0 for none.
        early_layers: The block, from 1, whose patches they see; by default the last but three, as published.
        shared_lm_head: Use the same norm and linear layer for both predictions.
        drop_path_rate: See :class:`Backbone`; the further blocks go on where ``early_layers`` is.
        **backbone: Keywords of :class:`Backbone`.

    Raises:
        InputError: There is no block ``early_layers``.
    """

    has_mask_token = True

    def __init__(
        self,
        *,
        vocab_size: int = 8192,
        init_std: float = 0.02,
        head_layers: int = 0,
        early_layers: int | None = None,
        shared_lm_head: bool = True,
        drop_path_rate: float = 0.0,
        **backbone: Any,
    ) -> None:
        super().__init__(drop_path_rate=drop_path_rate, **backbone)
        self.vocab_size = vocab_size
        self.init_std = self.init_limit = init_std  # truncated at one standard deviation
        self.norm = self.norm_layer(self.embed_dim)
        self.lm_head = nn.Linear(self.embed_dim, vocab_size)
        depth = self.get_num_layers()
        self.early_layers = early = max(1, depth - 3) if early_layers is None else early_layers
        if head_layers < 0 or not 1 <= early <= depth:
            raise InputError(f"early_layers {early}, head_layers {head_layers}: they are 1 to {depth}, and 0 or more")
        end, own = early + head_layers, head_layers and not shared_lm_head
        layers = self.new_blocks(early, end, drop_path_rate, max(depth, end)) if head_layers else None
        self.cls_pt_layers = layers  # for the second prediction
        self.cls_pt_norm = self.norm_layer(self.embed_dim) if own else None
        self.cls_pt_lm_head = nn.Linear(self.embed_dim, vocab_size) if own else None
        self.init_weights()

    def forward(
        self, x: Tensor, bool_masked_pos: Tensor, return_all_tokens: bool = False, masked_index: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """Returns logits ``(M, vocab_size)`` for the ``M`` masked patches, image by image and row by row.

        With ``head_layers`` they are the first of a list; the second are those predicted through the class token.

        Args:
            x: Normalised images ``(B, C, H, W)``.
            bool_masked_pos: True for masked patches, ``(B, N)`` or ``(B, h, w)``.
            return_all_tokens: Predict all patches, not only the masked ones: ``(B, N, vocab_size)``.
            masked_index: The patches to predict, as positions among all ``B * N``; by default the masked ones,
                ``bool_masked_pos.flatten().nonzero().flatten()``, which on a GPU makes the host wait for their number.

        Raises:
            InputError: Images or mask do not have the model's size.
        """
        if return_all_tokens:
            masked_index = None
        elif masked_index is None:
            masked_index = self._flat_mask(bool_masked_pos, len(x)).flatten().nonzero().flatten()
        tokens, kept = self.forward_blocks(self.embed(x, bool_masked_pos), keep=(self.early_layers - 1,))
        logits = self.lm_head(self.norm(_patches_of(tokens, masked_index)))
        if self.cls_pt_layers is None:
            return logits
        mixed = torch.cat((tokens[:, :1], kept[0][:, 1:]), dim=1)  # (B, N+1, D)
        mixed, _ = self.forward_blocks(mixed, blocks=self.cls_pt_layers)
        norm, head = self.cls_pt_norm or self.norm, self.cls_pt_lm_head or self.lm_head
        return [logits, head(norm(_patches_of(mixed, masked_index)))]

    def forward_features(self, x: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Returns all tokens after the final norm, ``(B, N + 1, D)``; without a mask nothing is hidden."""
        return self.norm(self.forward_blocks(self.embed(x, bool_masked_pos))[0])

    @torch.no_grad()
    def init_weights(self) -> None:
        """Reinitialises every parameter; linear layers of the further blocks get torch's default, as official."""
        super().init_weights()
        for layer, block in enumerate(self.cls_pt_layers or (), start=self.early_layers + 1):
            for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                linear.reset_parameters()
            block.damp(layer)


def _patches_of(tokens: Tensor, index: Tensor | None) -> Tensor:
    """Returns the patches ``index`` ``(M,)`` of all in tokens ``(B, N + 1, D)``: ``(M, D)``; None for ``(B, N, D)``."""
    patches = tokens[:, 1:]
    return patches if index is None else patches.flatten(0, 1).index_select(0, index)


def _pair(size: Size) -> tuple[int, int]:
    try:
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(f"{size!r} is no size: give a number of pixels, or (height, width)") from error


def _drop_relative_position_index(_module: nn.Module, state_dict: dict[str, Tensor], *_unused: object) -> None:
    """Drops the index buffers of official checkpoints, which follow from the window size."""
    for key in [key for key in state_dict if key.endswith("relative_position_index")]:
        del state_dict[key]
