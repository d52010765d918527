"""Semantic segmentation on a BEiT backbone: UPerNet and SETR-PUP without mmsegmentation; loads torch on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from semantic_segmentation.api import inference_model, init_model, show_result_pyplot, train_segmentor
    from semantic_segmentation.modeling import Segmentor, build_segmentor

__all__ = ["Segmentor", "build_segmentor", "inference_model", "init_model", "show_result_pyplot", "train_segmentor"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'semantic_segmentation' has no attribute {name!r}")
    home = "modeling" if name in ("Segmentor", "build_segmentor") else "api"
    return getattr(import_module(f"semantic_segmentation.{home}"), name)
