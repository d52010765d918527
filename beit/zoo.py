"""The published models by name, and how a model is built or a checkpoint opened. Imports torch only to build one.

:data:`MODELS` is separate from timm's registry, whose names it shares. A row is a factory: called bare it builds the
published configuration, so that a released file loads into it; keywords change it. To add a model:

    from beit.zoo import MODELS, Model

    MODELS["my_vit"] = Model("my_package.models:MyViT", {"img_size": 224, "embed_dim": 256})
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from beit.errors import InputError, did_you_mean
from beit.registry import Factory, locate

if TYPE_CHECKING:
    from beit.checkpoints.read import Metadata
    from beit.modeling import Backbone, VisionTransformer, VisionTransformerForMaskedImageModeling

M_co = TypeVar("M_co", bound="Backbone", covariant=True)


@dataclass(frozen=True)
class Model(Generic[M_co]):
    """A row of :data:`MODELS`: a class and the arguments it is built with; calling it builds the model."""

    builds: str | Factory  # "module:Class", or the class itself; a :class:`beit.modeling.Backbone`
    arguments: Mapping[str, Any] = field(default_factory=dict)  # that differ from the constructor's defaults

    def __call__(self, **overrides: Any) -> M_co:
        """Builds the model; ``overrides`` replace or extend :attr:`arguments` (``TypeError`` for an unknown one)."""
        model: M_co = locate(self.builds)(**{**self.arguments, **overrides})
        return model


_TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3, "init_values": 0.1}
_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6, "init_values": 0.1}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12, "init_values": 0.1}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "init_values": 1e-5}


_CLS_PT = {"head_layers": 2}  # pre-training of the class token, BEiT v2's


def _pretraining(**size: float) -> "Model[VisionTransformerForMaskedImageModeling]":
    shared = {"img_size": 224, "use_abs_pos_emb": False, "use_shared_rel_pos_bias": True}
    return Model("beit.modeling:VisionTransformerForMaskedImageModeling", {**shared, **size})


def _classifier(img_size: int, **size: float) -> "Model[VisionTransformer]":
    shared = {"img_size": img_size, "use_abs_pos_emb": False, "use_rel_pos_bias": True}
    return Model("beit.modeling:VisionTransformer", {**shared, **size})


MODELS: dict[str, "Model[Backbone]"] = {
    "beit_tiny_patch16_224_8k_vocab": _pretraining(**_TINY),
    "beit_small_patch16_224_8k_vocab": _pretraining(**_SMALL),
    "beit_base_patch16_224_8k_vocab": _pretraining(**_BASE),
    "beit_large_patch16_224_8k_vocab": _pretraining(**_LARGE),
    "beit_base_patch16_224_8k_vocab_cls_pt": _pretraining(**_BASE, **_CLS_PT),
    "beit_large_patch16_224_8k_vocab_cls_pt": _pretraining(**_LARGE, **_CLS_PT),
    "beit_tiny_patch16_224": _classifier(224, **_TINY),
    "beit_small_patch16_224": _classifier(224, **_SMALL),
    "beit_base_patch16_224": _classifier(224, **_BASE),
    "beit_base_patch16_384": _classifier(384, **_BASE),
    "beit_large_patch16_224": _classifier(224, **_LARGE),
    "beit_large_patch16_384": _classifier(384, **_LARGE),
    "beit_large_patch16_512": _classifier(512, **_LARGE),
}


if not TYPE_CHECKING:

    def __getattr__(name):  # beit.zoo.beit_base_patch16_224, a factory by its name
        if name not in MODELS:
            raise AttributeError(f"module 'beit.zoo' has no attribute {name!r}")
        return MODELS[name]


def create_model(name: str, pretrained: bool | str | Path = False, **overrides: Any) -> "Backbone":
    """Builds a model by name.

    Args:
        name: A key of :data:`MODELS`.
        pretrained: A checkpoint to load, as :func:`beit.load_pretrained` takes it; True for the released one:
            fine-tuned on ImageNet-1k for a classifier, pre-trained on ImageNet-22k for a pre-training model. A head of
            another size is initialised from scratch. What the checkpoint records is in ``model.metadata``.
        **overrides: Keywords of the model's constructor that differ from the published configuration.

    Raises:
        InputError: There is no such model or checkpoint, or the checkpoint is of another model.
        TypeError: The constructor has no such keyword.
    """
    from beit.checkpoints.load import load_pretrained
    from beit.checkpoints.released import released_for

    if name not in MODELS:
        raise InputError(f"unknown model {name!r}{did_you_mean(name, MODELS)}: beit.list_models() names all of them")
    source = released_for(name).name if pretrained is True else pretrained
    model = MODELS[name](**overrides)
    if source:
        load_pretrained(model, source)
    return model


def get_model(
    name_or_path: str | Path, *, model_key: str = "", prefix: str = "", num_heads: int | None = None
) -> "Backbone":
    """Opens a checkpoint as the model it was saved from, in evaluation mode; see :func:`open_model`.

    ``model.metadata`` holds what the checkpoint records (labels, mean and std, crop), which ``inference_model`` uses.
    """
    return open_model(name_or_path, model_key=model_key, prefix=prefix, num_heads=num_heads)[0]


def open_model(
    name_or_path: str | Path, *, model_key: str = "", prefix: str = "", num_heads: int | None = None
) -> "tuple[Backbone, Metadata]":
    """Opens a checkpoint as the model it was saved from; of a segmentor, only the backbone.

    Args:
        name_or_path: A file, folder, released name, address or hub id; or a key of :data:`MODELS` for its release.
        model_key: Where in the file the weights are, such as ``model_ema``; by default a usual key.
        prefix: Of the names to take, where a file has several models, such as ``teacher.``
        num_heads: Attention heads per block, where the file neither records nor shows them.

    Returns:
        The model in evaluation mode, and what the checkpoint records; see :mod:`beit.checkpoints.read`.

    Raises:
        InputError: There is no such checkpoint, or it is of another kind of model.
    """
    from beit.checkpoints.load import open_checkpoint
    from beit.checkpoints.released import released_for

    source = released_for(str(name_or_path)).name if name_or_path in MODELS else name_or_path
    return open_checkpoint(source, model_key, prefix, num_heads)


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names of the models that match a shell pattern such as ``"*_8k_vocab"``, sorted."""
    return sorted(name for name in MODELS if fnmatchcase(name, pattern))
