import pytest
import torch

from beit.modeling import VisionTransformer, VisionTransformerForMaskedImageModeling

SIZES = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.1}
MODELS = {
    "per-layer tables": (VisionTransformer, {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "num_classes": 5}),
    "positions, class token": (VisionTransformer, {"use_mean_pooling": False, "num_classes": 5}),
    "no LayerScale": (VisionTransformer, {"init_values": None, "use_rel_pos_bias": True, "num_classes": 5}),
    "pre-training": (
        VisionTransformerForMaskedImageModeling,
        {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "vocab_size": 16},
    ),
    "pre-training, positions": (VisionTransformerForMaskedImageModeling, {"vocab_size": 16, "init_values": None}),
}


def small_model(kind, **overrides):
    """A small model whose every parameter is random, so that a name taken for another shows in the outputs."""
    model_class, options = MODELS[kind]
    torch.manual_seed(0)
    model = model_class(**{**SIZES, **options, **overrides})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(params=MODELS)
def any_model(request):
    return small_model(request.param)


@pytest.fixture
def small():
    return small_model
