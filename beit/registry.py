"""Everything that is chosen by name, one table per kind; flags, error messages and documentation list the keys.

A value is ``"module:object"``, imported when it is used, or the object itself; add one before flags are parsed:

    from beit.registry import MASK_STRATEGIES

    MASK_STRATEGIES["stripes"] = "my_package.masks:StripeMasks"

Models have their own table with their arguments, :data:`beit.zoo.MODELS`.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from beit.errors import InputError, did_you_mean

Factory = Callable[..., Any]
Table = dict[str, str | Factory]

MASK_STRATEGIES: Table = {  # called like `beit.masking.BlockwiseMaskGenerator`
    "block": "beit.masking:BlockwiseMaskGenerator",
    "block_exact": "beit.masking:ExactBlockwiseMaskGenerator",
    "random": "beit.masking:RandomMaskGenerator",
}
TARGETS: Table = {  # subclasses of `beit.targets.PredictionTarget`; a run calls their `build`
    "tokens": "beit.targets:TokenTarget",
    "pixels": "beit.targets:PixelTarget",
    "hog": "beit.targets:HogTarget",
    "features": "beit.targets:FeatureTarget",
}
TOKENIZERS: Table = {  # (path, dtype, compiled) -> `beit.tokenizers.base.VisualTokenizer`
    "dall-e": "beit.tokenizers.dalle:open_dall_e",
    "customized": "beit.tokenizers.dvae:open_customized",
    "vqkd": "beit.tokenizers.vqkd:open_vqkd",
}
TOKENIZERS |= {  # --tokenizer_model of official commands
    f"vqkd_encoder_base_decoder_{decoder}": TOKENIZERS["vqkd"]
    for decoder in ("3x768x12_clip", "1x768x12_clip", "1x768x12_dino")
}
TRACKERS: Table = {  # subclasses of `beit.training.trackers.Tracker`
    "tensorboard": "beit.training.trackers:TensorBoard",
    "wandb": "beit.training.trackers:WandB",
    "trackio": "beit.training.trackers:Trackio",
}
FORMATS: Table = {  # what `beit convert` writes: dialects of `beit.checkpoints.formats`, graphs of `beit.checkpoints`
    "unilm": "beit.checkpoints.formats.unilm:UNILM",
    "huggingface": "beit.checkpoints.formats.huggingface:HUGGINGFACE",
    "timm": "beit.checkpoints.formats.timm:TIMM",
    "mmsegmentation": "beit.checkpoints.formats.mmseg:MMSEGMENTATION",
    "mmpretrain": "beit.checkpoints.formats.mmseg:MMPRETRAIN",
    "onnx": "beit.checkpoints.graphs:ONNX",
    "torch_export": "beit.checkpoints.graphs:TORCH_EXPORT",
}

SEGMENTATION = "semantic_segmentation.api:painter_of"  # (checkpoint, device) -> (image -> painted image, legend)


def resolve(table: Mapping[str, object], name: str, kind: str) -> Any:
    """Returns a table's object by ``name``; if there is none, :class:`InputError` names the ``kind`` and choices."""
    if name not in table:
        raise InputError(f"unknown {kind} {name!r}{did_you_mean(name, table)}: choose from {', '.join(table)}")
    return locate(table[name])


def locate(entry: object) -> Any:
    """Imports what ``"module:object"`` names; anything but a string is returned as it is."""
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    return getattr(import_module(module), attribute)
