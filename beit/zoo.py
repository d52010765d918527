"""The published models by name: factories, and a registry of our own, apart from timm's.

Called bare, a factory builds the published configuration, so that a released file loads into it; keywords change it.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any, TypeVar

from beit.errors import InputError, did_you_mean
from beit.modeling import Backbone, VisionTransformer, VisionTransformerForMaskedImageModeling

Model = TypeVar("Model", bound=Backbone)

_REGISTRY: dict[str, Callable[..., Backbone]] = {}


def create_model(name: str, **overrides: Any) -> Backbone:
    """Builds a model by name.

    Args:
        name: One of :func:`list_models`.
        **overrides: Keywords of the model's constructor that differ from the published configuration.

    Raises:
        InputError: There is no such model.
        TypeError: The constructor has no such keyword.
    """
    if name not in _REGISTRY:
        raise InputError(
            f"unknown model {name!r}{did_you_mean(name, _REGISTRY)}: beit.list_models() names all {len(_REGISTRY)}"
        )
    return _REGISTRY[name](**overrides)


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
