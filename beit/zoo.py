"""The published models by name: factories, and a registry of our own, apart from timm's.

Called bare, a factory builds the published configuration, so that a released file loads into it; keywords change it.
"""

import logging
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from beit.checkpoints.load import (
    Architecture,
    Metadata,
    architecture_of,
    load_pretrained,
    load_weights,
    read_weights,
    released_for,
)
from beit.errors import InputError, did_you_mean
from beit.modeling import Backbone, VisionTransformer, VisionTransformerForMaskedImageModeling

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Backbone)

_REGISTRY: dict[str, Callable[..., Backbone]] = {}


def create_model(name: str, pretrained: bool | str | Path = False, **overrides: Any) -> Backbone:
    """Builds a model by name.

    Args:
        name: One of :func:`list_models`.
        pretrained: A checkpoint to load, as :func:`beit.load_pretrained` takes it; True for the released one:
            fine-tuned on ImageNet-1k for a classifier, pre-trained on 22k for a pre-training model. A head of another
            size is initialised anew. What the checkpoint records is in ``model.metadata``.
        **overrides: Keywords of the model's constructor that differ from the published configuration.

    Raises:
        InputError: There is no such model or checkpoint, or the checkpoint is of another model.
        TypeError: The constructor has no such keyword.
    """
    if name not in _REGISTRY:
        raise InputError(
            f"unknown model {name!r}{did_you_mean(name, _REGISTRY)}: beit.list_models() names all {len(_REGISTRY)}"
        )
    source = released_for(name).name if pretrained is True else pretrained
    model = _REGISTRY[name](**overrides)
    if source:
        load_pretrained(model, source)
    return model


def get_model(name_or_path: str | Path) -> Backbone:
    """Opens a checkpoint as the model it is of, in evaluation mode; see :func:`open_model`.

    ``model.metadata`` holds what the checkpoint records (labels, mean and std, crop); ``inference_model`` goes by it.
    """
    return open_model(name_or_path)[0]


def open_model(name_or_path: str | Path) -> tuple[Backbone, Metadata]:
    """Opens a checkpoint as the model it is of; of a segmentor the backbone, without the heads.

    Args:
        name_or_path: A file, folder, released name, address or hub id; or one of :func:`list_models`, for the
            checkpoint that was released for it.

    Returns:
        The model in evaluation mode, and what the checkpoint records; see :mod:`beit.checkpoints.read`.

    Raises:
        InputError: There is no such checkpoint, or it is of another kind of model.
    """
    source = released_for(str(name_or_path)).name if name_or_path in _REGISTRY else name_or_path
    weights, metadata = read_weights(source)
    if metadata.get("segmentation"):
        logger.info("%s is a segmentor: this is its backbone, without the heads", metadata["source"])
    model = build(architecture_of(weights, metadata), metadata.get("layer_norm_eps"))
    report = load_weights(model, weights, metadata)
    (logger.warning if report.missing or report.unexpected else logger.info)("%s", report.summary())
    return model.eval(), metadata


def build(architecture: Architecture, layer_norm_eps: float | None = None) -> Backbone:
    """Builds the model that an architecture describes.

    Args:
        architecture: From :func:`beit.checkpoints.load.architecture_of`.
        layer_norm_eps: Where another library's checkpoint was made with another than ours, 1e-6.
    """
    model = VisionTransformerForMaskedImageModeling if architecture.masked else VisionTransformer
    norm_layer = partial(nn.LayerNorm, eps=layer_norm_eps) if layer_norm_eps else None
    return model(norm_layer=norm_layer, **architecture.arguments)


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names of the models that match a shell pattern such as ``"*_8k_vocab"``, sorted."""
    return sorted(name for name in _REGISTRY if fnmatchcase(name, pattern))


def _factory(name: str, model: type[Model], **published: Any) -> Callable[..., Model]:
    """Registers a function that builds ``model`` with the published keywords, and shows them as its defaults."""

    def build(**overrides: Any) -> Model:
        return model(**{**published, **overrides})

    constructor = signature(model)
    parameters = [p.replace(default=published.get(p.name, p.default)) for p in constructor.parameters.values()]
    build.__signature__ = constructor.replace(parameters=parameters, return_annotation=model)  # type: ignore[attr-defined]
    build.__name__ = build.__qualname__ = name
    build.__doc__ = (
        f"Builds {model.__name__} with {published['depth']} blocks of {published['embed_dim']} channels and "
        f"{published['num_heads']} heads, for images of {published['img_size']} pixels."
    )
    _REGISTRY[name] = build
    return build


_TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3, "init_values": 0.1}
_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6, "init_values": 0.1}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12, "init_values": 0.1}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "init_values": 1e-5}


def _masked_image_modeling(name: str, **published: Any) -> Callable[..., VisionTransformerForMaskedImageModeling]:
    shared = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True}
    return _factory(name, VisionTransformerForMaskedImageModeling, **shared, **published)


def _classifier(name: str, **published: Any) -> Callable[..., VisionTransformer]:
    return _factory(name, VisionTransformer, use_abs_pos_emb=False, use_rel_pos_bias=True, **published)


beit_tiny_patch16_224_8k_vocab = _masked_image_modeling("beit_tiny_patch16_224_8k_vocab", img_size=224, **_TINY)
beit_small_patch16_224_8k_vocab = _masked_image_modeling("beit_small_patch16_224_8k_vocab", img_size=224, **_SMALL)
beit_base_patch16_224_8k_vocab = _masked_image_modeling("beit_base_patch16_224_8k_vocab", img_size=224, **_BASE)
beit_large_patch16_224_8k_vocab = _masked_image_modeling("beit_large_patch16_224_8k_vocab", img_size=224, **_LARGE)

beit_tiny_patch16_224 = _classifier("beit_tiny_patch16_224", img_size=224, **_TINY)
beit_small_patch16_224 = _classifier("beit_small_patch16_224", img_size=224, **_SMALL)
beit_base_patch16_224 = _classifier("beit_base_patch16_224", img_size=224, **_BASE)
beit_base_patch16_384 = _classifier("beit_base_patch16_384", img_size=384, **_BASE)
beit_large_patch16_224 = _classifier("beit_large_patch16_224", img_size=224, **_LARGE)
beit_large_patch16_384 = _classifier("beit_large_patch16_384", img_size=384, **_LARGE)
beit_large_patch16_512 = _classifier("beit_large_patch16_512", img_size=512, **_LARGE)
