"""BEiT: BERT pre-training of image Transformers (arXiv 2106.08254).

Start with ``beit.create_model("beit_base_patch16_224_8k_vocab")``. The public names are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from beit.checkpoints.load import KeyReport, load_pretrained
    from beit.errors import InputError
    from beit.inference import extract_feat, inference_model
    from beit.jobs import finetune, linear_probe, pretrain, pretrain_v2, train_dvae, train_vqkd
    from beit.masking import BlockwiseMaskGenerator, RandomMaskGenerator
    from beit.modeling import VisionTransformer, VisionTransformerForMaskedImageModeling
    from beit.tokenizers.base import VisualTokenizer, load_tokenizer
    from beit.tokenizers.dalle import download_tokenizer
    from beit.tokenizers.dvae import DiscreteVAE
    from beit.zoo import Model, create_model, get_model, list_models

    beit_base_patch16_224: Model[VisionTransformer]
    beit_base_patch16_224_8k_vocab: Model[VisionTransformerForMaskedImageModeling]
    beit_base_patch16_224_8k_vocab_cls_pt: Model[VisionTransformerForMaskedImageModeling]
    beit_base_patch16_384: Model[VisionTransformer]
    beit_large_patch16_224: Model[VisionTransformer]
    beit_large_patch16_224_8k_vocab: Model[VisionTransformerForMaskedImageModeling]
    beit_large_patch16_224_8k_vocab_cls_pt: Model[VisionTransformerForMaskedImageModeling]
    beit_large_patch16_384: Model[VisionTransformer]
    beit_large_patch16_512: Model[VisionTransformer]
    beit_small_patch16_224: Model[VisionTransformer]
    beit_small_patch16_224_8k_vocab: Model[VisionTransformerForMaskedImageModeling]
    beit_tiny_patch16_224: Model[VisionTransformer]
    beit_tiny_patch16_224_8k_vocab: Model[VisionTransformerForMaskedImageModeling]

__version__ = "0.2.0"

__all__ = [
    "BlockwiseMaskGenerator", "DiscreteVAE", "InputError", "KeyReport", "RandomMaskGenerator", "VisionTransformer",
    "VisionTransformerForMaskedImageModeling", "VisualTokenizer", "beit_base_patch16_224",
    "beit_base_patch16_224_8k_vocab", "beit_base_patch16_224_8k_vocab_cls_pt", "beit_base_patch16_384",
    "beit_large_patch16_224", "beit_large_patch16_224_8k_vocab", "beit_large_patch16_224_8k_vocab_cls_pt",
    "beit_large_patch16_384", "beit_large_patch16_512", "beit_small_patch16_224", "beit_small_patch16_224_8k_vocab",
    "beit_tiny_patch16_224", "beit_tiny_patch16_224_8k_vocab", "create_model", "download_tokenizer", "extract_feat",
    "finetune", "get_model", "inference_model", "linear_probe", "list_models", "load_pretrained", "load_tokenizer",
    "pretrain", "pretrain_v2", "train_dvae", "train_vqkd",
]  # fmt: skip

_HOMES = {
    "KeyReport": "checkpoints.load", "load_pretrained": "checkpoints.load", "InputError": "errors",
    "extract_feat": "inference", "inference_model": "inference", "BlockwiseMaskGenerator": "masking",
    "RandomMaskGenerator": "masking", "VisionTransformer": "modeling",
    "VisionTransformerForMaskedImageModeling": "modeling", "VisualTokenizer": "tokenizers.base",
    "load_tokenizer": "tokenizers.base", "download_tokenizer": "tokenizers.dalle", "DiscreteVAE": "tokenizers.dvae",
    **dict.fromkeys(("finetune", "linear_probe", "pretrain", "pretrain_v2", "train_dvae", "train_vqkd"), "jobs"),
}  # fmt: skip


if not TYPE_CHECKING:  # a checker that saw it would take any name for one of ours

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module 'beit' has no attribute {name!r}")
        return getattr(import_module(f"beit.{_HOMES.get(name, 'zoo')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
