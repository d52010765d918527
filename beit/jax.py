"""BEiT in JAX: the models of :mod:`beit.modeling` as flax.nnx modules, from checkpoints and back into them.

model = from_checkpoint("beit_base_patch16_224_pt22k_ft22k")
logits = nnx.jit(lambda model, images: model(images))(model, images)  # images (B, 3, H, W), as in torch

Modules and parameters are arranged and named as there, with Flax's ``kernel`` or ``scale`` for torch's ``weight``.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import nn

from beit import modeling
from beit.checkpoints.export import write_checkpoint
from beit.errors import InputError
from beit.relative_position import relative_position_index, resize_position_embedding, resize_table
from beit.zoo import open_model

try:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax import Array
except ImportError as error:
    raise InputError(f"beit.jax needs jax and flax: pip install jax flax ({error})") from error

TO_FLAX = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}  # axes of torch's weights, by their number, in Flax's order
TO_TORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
WEIGHTS = ("kernel", "scale")  # Flax's names of torch's `weight`


def from_checkpoint(
    name_or_path: str | Path, *, model_key: str = "", prefix: str = "", num_heads: int | None = None
) -> "Backbone":
    """Opens a checkpoint as the model it was saved from, in evaluation mode, as :func:`beit.zoo.open_model` does."""
    return from_torch(open_model(name_or_path, model_key=model_key, prefix=prefix, num_heads=num_heads)[0])


def from_torch(model: modeling.Backbone, seed: int = 0) -> "Backbone":
    """Returns a copy of a torch model, such as a new one to be trained, in its mode; InputError if it has dropout.

    Stochastic depth draws from ``seed``; ``train()`` and ``eval()`` turn it on and off.
    """
    if any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        raise InputError("beit.jax has stochastic depth, but no dropout: build the model with drop_rate=0")
    if type(model) is modeling.VisionTransformer:
        copy: Backbone = VisionTransformer(model, nnx.Rngs(seed))
    elif type(model) is modeling.VisionTransformerForMaskedImageModeling:
        copy = VisionTransformerForMaskedImageModeling(model, nnx.Rngs(seed))
    else:
        raise InputError(f"beit.jax has no {type(model).__name__}, only classifiers and models for pre-training")
    (copy.train if model.training else copy.eval)()
    return copy


def save_checkpoint(model: "Backbone", path: str | Path, to: str = "unilm") -> None:
    """Writes a model, with what its source recorded, as :func:`beit.checkpoints.export.convert`: an official file."""
    if not isinstance(model, Backbone):
        raise InputError(f"a {type(model).__name__} is no model of beit.jax: see from_torch")
    patches, first = model.patch_embed, model.blocks[0]
    known = {"source": "the model", **model.metadata, "image_size": patches.img_size, "window": patches.grid_size}
    known |= {"num_heads": first.attn.num_heads, "layer_norm_eps": first.norm1.epsilon}
    if isinstance(model, VisionTransformerForMaskedImageModeling) and model.cls_pt_layers is not None:
        known["args"] = {**known.get("args", {}), "early_layers": model.early_layers}
    write_checkpoint(official_weights(model), known, Path(path), to)


def official_weights(model: "Backbone") -> dict[str, torch.Tensor]:
    """Returns the weights under official names and in torch's layout, as ``load_state_dict`` of torch takes them."""
    weights: dict[str, torch.Tensor] = {}
    for path, parameter in nnx.iter_graph(model):
        if isinstance(parameter, nnx.Param):
            *modules, name = map(str, path)
            value = parameter[...]  # in at least float32: torch takes no bfloat16 from NumPy
            array = np.array(value.astype(jnp.promote_types(value.dtype, jnp.float32)))
            if name in WEIGHTS:
                name, array = "weight", array.transpose(TO_TORCH[array.ndim])
            weights[".".join([*modules, name])] = torch.from_numpy(np.ascontiguousarray(array))
    return weights


class Metadata(dict[str, Any]):
    """What a checkpoint records besides weights; a constant of compiled functions, which tell it by its identity."""

    __eq__, __hash__ = object.__eq__, object.__hash__  # type: ignore[assignment]


class PatchEmbed(nnx.Module):
    """Splits images into patches and projects each to a token."""

    def __init__(self, like: modeling.PatchEmbed) -> None:
        self.patch_size, self.img_size, self.grid_size = like.patch_size, like.img_size, like.grid_size
        self.proj = _layer(like.proj)

    def __call__(self, images: Array) -> Array:
        """Embeds images ``(B, C, H, W)`` as tokens ``(B, N, D)``, row by row."""
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"images are {images.dtype}: give floating point numbers, normalised as in training")
        channels, (height, width) = self.proj.in_features, self.img_size
        if images.ndim != 4 or images.shape[1:] != (channels, height, width):
            wanted = f"(B, {channels}, {height}, {width})"
            raise InputError(f"images have shape {images.shape}, not {wanted}: see model.set_input_size((H, W))")
        return rearrange(self.proj(rearrange(images, "b c h w -> b h w c")), "b h w d -> b (h w) d")


class RelativePositionBias(nnx.Module):
    """A relative position bias for a window of ``(h, w)`` patches, ``(1, H, N + 1, N + 1)``."""

    def __init__(self, like: modeling.RelativePositionBias | modeling.Attention) -> None:
        self.relative_position_bias_table = _parameter(like.relative_position_bias_table)

    def position_bias(self, window: tuple[int, int]) -> Array:
        """Looks up the table; zero without one."""
        if self.relative_position_bias_table is None:
            return jnp.zeros(())
        index = relative_position_index(window).numpy()
        return rearrange(self.relative_position_bias_table[...][index], "query key heads -> 1 heads query key")


class Attention(RelativePositionBias):
    """Multi-head self-attention with an additive relative position bias."""

    def __init__(self, like: modeling.Attention) -> None:
        super().__init__(like)
        self.num_heads, self.q_bias, self.v_bias = like.num_heads, _parameter(like.q_bias), _parameter(like.v_bias)
        self.qkv, self.proj = _layer(like.qkv), _layer(like.proj)

    def __call__(self, x: Array, window: tuple[int, int], bias: Array) -> Array:
        """Returns the tokens ``(B, N + 1, D)`` after attention; ``bias`` is added to that of this layer's own table."""
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            qkv += jnp.concatenate([self.q_bias[...], jnp.zeros_like(self.v_bias[...]), self.v_bias[...]])
        query, key, value = rearrange(qkv, "b n (three heads d) -> three b n heads d", three=3, heads=self.num_heads)
        bias = jnp.atleast_1d(bias + self.position_bias(window)).astype(query.dtype)
        mixed = jax.nn.dot_product_attention(query, key, value, bias=bias if bias.ndim == 4 else None)
        return self.proj(rearrange(mixed, "b n heads d -> b n (heads d)"))


class Mlp(nnx.Module):
    """Two linear layers with a GELU in between."""

    def __init__(self, like: modeling.Mlp) -> None:
        self.fc1, self.fc2 = _layer(like.fc1), _layer(like.fc2)

    def __call__(self, x: Array) -> Array:
        """Transforms each token of ``(B, N + 1, D)`` independently."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    """A pre-norm transformer block, its branches scaled by LayerScale and dropped by stochastic depth."""

    def __init__(self, like: modeling.Block, rngs: nnx.Rngs) -> None:
        self.gamma_1, self.gamma_2 = _parameter(like.gamma_1), _parameter(like.gamma_2)
        self.norm1, self.norm2 = _layer(like.norm1), _layer(like.norm2)
        self.attn, self.mlp = Attention(like.attn), Mlp(like.mlp)
        rate = getattr(like.drop_path, "drop_prob", 0.0)
        self.drop_path = nnx.Dropout(rate, broadcast_dims=(1, 2), rngs=rngs) if rate else None

    def __call__(self, x: Array, window: tuple[int, int], bias: Array) -> Array:
        """Transforms tokens ``(B, N + 1, D)``; for ``window`` and ``bias`` see :class:`Attention`."""
        x = x + self._branch(self.attn(self.norm1(x), window, bias), self.gamma_1)
        return x + self._branch(self.mlp(self.norm2(x)), self.gamma_2)

    def _branch(self, x: Array, gamma: nnx.Param | None) -> Array:
        x = x if gamma is None else gamma[...] * x
        return x if self.drop_path is None else self.drop_path(x)


class Backbone(nnx.Module):
    """Everything from the image to the last block. ``metadata`` is what a checkpoint records besides weights."""

    def __init__(self, like: modeling.Backbone, rngs: nnx.Rngs) -> None:
        self.metadata = Metadata(like.metadata)
        self.cls_token, self.mask_token = _parameter(like.cls_token), _parameter(like.mask_token)
        self.pos_embed = _parameter(like.pos_embed)
        self.patch_embed = PatchEmbed(like.patch_embed)
        self.rel_pos_bias = RelativePositionBias(like.rel_pos_bias) if like.rel_pos_bias else None
        self.blocks = _blocks(like.blocks, rngs)

    def embed(self, images: Array, bool_masked_pos: Array | None = None) -> Array:
        """Embeds images ``(B, C, H, W)`` as tokens ``(B, N + 1, D)``; masked patches become the mask token."""
        tokens = self.patch_embed(images)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise InputError("a classifier has no mask token: leave bool_masked_pos out")
            tokens = jnp.where(self._flat(bool_masked_pos)[..., None], self.mask_token[...], tokens)
        tokens = jnp.concatenate([jnp.tile(self.cls_token[...], (len(images), 1, 1)), tokens], axis=1)
        return tokens if self.pos_embed is None else tokens + self.pos_embed[...]

    def forward_blocks(self, x: Array, blocks: Iterable[Block] | None = None) -> list[Array]:
        """Runs tokens through the blocks, or others; returns the output of each, before any norm."""
        window, outputs = self.patch_embed.grid_size, [x]
        bias = self.rel_pos_bias.position_bias(window) if self.rel_pos_bias else jnp.zeros(())
        for block in blocks or self.blocks:
            outputs.append(block(outputs[-1], window, bias))
        return outputs[1:]

    def set_input_size(self, img_size: modeling.Size) -> None:
        """Switches to images of size ``(H, W)``, with resized parameters: call this before building an optimizer."""
        patches = self.patch_embed
        new = modeling.PatchEmbed(img_size=img_size, patch_size=patches.patch_size, in_chans=1, embed_dim=1)
        holders = [module for _, module in nnx.iter_graph(self) if isinstance(module, RelativePositionBias)]
        places = [(module, "relative_position_bias_table", resize_table) for module in holders]
        for module, name, resize in (*places, (self, "pos_embed", resize_position_embedding)):
            if (parameter := getattr(module, name)) is not None:
                old = torch.from_numpy(np.array(parameter[...]))
                setattr(module, name, _parameter(resize(old, patches.grid_size, new.grid_size)))
        patches.img_size, patches.grid_size = new.img_size, new.grid_size

    def _flat(self, bool_masked_pos: Array) -> Array:
        """Returns a mask ``(B, N)`` or ``(B, h, w)`` as ``(B, N)``."""
        height, width = self.patch_embed.grid_size
        if bool_masked_pos.shape[1:] not in ((height * width,), (height, width)):
            raise InputError(f"bool_masked_pos is {bool_masked_pos.shape}: give (B, {height}, {width}), or these flat")
        return bool_masked_pos.reshape(len(bool_masked_pos), -1).astype(bool)


class VisionTransformer(Backbone):
    """Classifier: a linear head on the mean patch token or on the class token."""

    def __init__(self, like: modeling.VisionTransformer, rngs: nnx.Rngs) -> None:
        super().__init__(like, rngs)
        self.norm, self.fc_norm, self.head = _layer(like.norm), _layer(like.fc_norm), _layer(like.head)

    def __call__(self, images: Array) -> Array:
        """Classifies images ``(B, C, H, W)``: logits ``(B, num_classes)``, or the features without a head."""
        features = self.forward_features(images)
        return features if self.head is None else self.head(features)

    def forward_features(self, images: Array) -> Array:
        """Returns the pooled features ``(B, D)`` that enter the head."""
        tokens = self.forward_blocks(self.embed(images))[-1]
        return self.norm(tokens[:, 0]) if self.fc_norm is None else self.fc_norm(tokens[:, 1:].mean(axis=1))


class VisionTransformerForMaskedImageModeling(Backbone):
    """Predicts the visual tokens of masked patches, with BEiT v2's further blocks twice."""

    def __init__(self, like: modeling.VisionTransformerForMaskedImageModeling, rngs: nnx.Rngs) -> None:
        super().__init__(like, rngs)
        self.early_layers, self.norm, self.lm_head = like.early_layers, _layer(like.norm), _layer(like.lm_head)
        self.cls_pt_layers = _blocks(like.cls_pt_layers, rngs) if like.cls_pt_layers is not None else None
        self.cls_pt_norm, self.cls_pt_lm_head = _layer(like.cls_pt_norm), _layer(like.cls_pt_lm_head)

    def __call__(
        self, images: Array, bool_masked_pos: Array, return_all_tokens: bool = False, masked_index: Array | None = None
    ) -> Array | list[Array]:
        """Returns what the torch model does, ``(M, vocab_size)`` for the ``M`` masked patches or a list of two.

        In a compiled function, where nobody knows ``M`` from the mask, give ``masked_index`` or ``return_all_tokens``.
        """
        if masked_index is None and not return_all_tokens:
            if isinstance(bool_masked_pos, jax.core.Tracer):
                raise InputError("in a compiled function, give masked_index= or return_all_tokens=True")
            (masked_index,) = jnp.nonzero(self._flat(bool_masked_pos).reshape(-1))
        index = None if return_all_tokens else masked_index
        outputs = self.forward_blocks(self.embed(images, bool_masked_pos))
        logits = self.lm_head(self.norm(_patches_of(outputs[-1], index)))
        if self.cls_pt_layers is None:
            return logits
        mixed = jnp.concatenate([outputs[-1][:, :1], outputs[self.early_layers - 1][:, 1:]], axis=1)
        norm, head = self.cls_pt_norm or self.norm, self.cls_pt_lm_head or self.lm_head
        return [logits, head(norm(_patches_of(self.forward_blocks(mixed, self.cls_pt_layers)[-1], index)))]


def _patches_of(tokens: Array, index: Array | None) -> Array:
    return tokens[:, 1:] if index is None else rearrange(tokens[:, 1:], "b n d -> (b n) d")[index]


def _blocks(like: Iterable[modeling.Block], rngs: nnx.Rngs) -> Any:
    return getattr(nnx, "List", list)(Block(block, rngs) for block in like)  # older releases have plain lists


def _parameter(tensor: torch.Tensor | None, order: tuple[int, ...] | None = None) -> Any:
    """Returns a copy of a tensor, its axes in another order; None for none."""
    if tensor is None:
        return None
    return nnx.Param(jnp.array(tensor.detach().cpu().numpy().transpose(order or range(tensor.ndim))))


def _layer(like: nn.Module | None) -> Any:
    """Returns Flax's layer for torch's, with its weights; None for none, or for one that does nothing."""
    empty: Any = {"kernel_init": nnx.initializers.zeros_init(), "rngs": nnx.Rngs(0)}
    if isinstance(like, nn.Linear):
        layer: Any = nnx.Linear(like.in_features, like.out_features, use_bias=like.bias is not None, **empty)
    elif isinstance(like, nn.Conv2d):
        empty |= {"kernel_size": like.kernel_size, "strides": like.stride, "padding": "VALID"}
        layer = nnx.Conv(like.in_channels, like.out_channels, **empty)
    elif isinstance(like, nn.LayerNorm):
        layer = nnx.LayerNorm(like.normalized_shape[0], epsilon=like.eps, use_fast_variance=False, rngs=nnx.Rngs(0))
    else:
        return None
    setattr(layer, WEIGHTS[isinstance(like, nn.LayerNorm)], _parameter(like.weight, TO_FLAX[like.weight.ndim]))
    layer.bias = _parameter(like.bias)
    return layer
