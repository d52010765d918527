import pickle

import pytest
import timm
import torch

import beit
from beit.errors import InputError
from beit.modeling import VisionTransformer, VisionTransformerForMaskedImageModeling
from beit.zoo import MODELS, Model, create_model, list_models

SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
CLASSIFIERS = [f"beit_{size}_patch16_224" for size in SIZES] + [
    "beit_base_patch16_384",
    "beit_large_patch16_384",
    "beit_large_patch16_512",
]
MASKED_IMAGE_MODELS = [f"beit_{size}_patch16_224_8k_vocab" for size in SIZES]
CLASS_TOKEN_MODELS = [f"beit_{size}_patch16_224_8k_vocab_cls_pt" for size in ("base", "large")]  # test_class_token.py

# Quoted in the published tables, besides those in official_state_dicts.json; tiny and small are ours.
PARAMETERS = {"beit_large_patch16_384": 304_998_888}


def build(name, **overrides):
    with torch.device("meta"):
        return create_model(name, **overrides)


def test_the_registry_holds_the_named_models():
    # Breaks when a factory is lost or not registered, or is registered under another name than it is imported by.
    assert list_models() == sorted(CLASSIFIERS + MASKED_IMAGE_MODELS + CLASS_TOKEN_MODELS)
    assert list_models("*_8k_vocab") == sorted(MASKED_IMAGE_MODELS)
    assert list_models("beit_huge*") == []
    assert all(getattr(beit, name) is MODELS[name] for name in list_models())


@pytest.mark.parametrize("name", CLASSIFIERS + MASKED_IMAGE_MODELS)
def test_bare_factories_build_the_published_configuration(name):
    # Breaks when a released file would not fit, or a run would start from another configuration than the published one.
    model = build(name)
    size = name.split("_")[1]
    masked = name.endswith("8k_vocab")
    assert type(model) is (VisionTransformerForMaskedImageModeling if masked else VisionTransformer)
    assert (model.embed_dim, model.get_num_layers(), model.num_heads) == SIZES[size]
    assert model.img_size == (int(name.split("_")[3]),) * 2
    assert model.init_values == (1e-5 if size == "large" else 0.1)
    assert model.pos_embed is None
    assert (model.rel_pos_bias is not None) == masked
    assert (model.blocks[0].attn.relative_position_bias_table is None) == masked
    assert isinstance(model.blocks[-1].drop_path, torch.nn.Identity)
    if masked:
        assert model.vocab_size == model.lm_head.out_features == 8192
    else:
        assert model.num_classes == model.head.out_features == 1000
        assert model.fc_norm is not None
    if name in PARAMETERS:
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_keywords_override_the_published_configuration():
    # Breaks when an override is lost under the published value, or changes the published value for the next model.
    model = build("beit_base_patch16_224", img_size=(64, 96), depth=2, num_classes=3, use_rel_pos_bias=False)
    assert (model.img_size, model.get_num_layers(), model.num_classes) == ((64, 96), 2, 3)
    assert model.relative_position_index is None
    assert build("beit_base_patch16_224").get_num_layers() == 12


def test_mistakes_are_named():
    # Breaks when a typo in a name gives no hint, or a typo in a keyword is swallowed.
    with pytest.raises(
        InputError, match=r"unknown model 'beit_bse_patch16_224' \(did you mean 'beit_base_patch16_224'"
    ):
        create_model("beit_bse_patch16_224")
    with pytest.raises(TypeError, match="drop_path_rat"):
        create_model("beit_base_patch16_224", drop_path_rat=0.1)
    with pytest.raises(TypeError):
        beit.beit_base_patch16_224(224)


def test_rows_are_data():
    # Breaks when a row hides what it builds, or cannot be sent to another process.
    row = beit.beit_large_patch16_512
    assert row.builds == "beit.modeling:VisionTransformer"
    shown = {name: row.arguments[name] for name in ("img_size", "embed_dim", "init_values", "use_abs_pos_emb")}
    assert shown == {"img_size": 512, "embed_dim": 1024, "init_values": 1e-5, "use_abs_pos_emb": False}
    assert pickle.loads(pickle.dumps(row)) == row


def test_a_model_registered_from_outside_is_built_by_name(monkeypatch):
    class Wide(VisionTransformer):
        """A user's model."""

    monkeypatch.setitem(MODELS, "my_vit", Model(Wide, {"depth": 1, "use_abs_pos_emb": False}))
    model = build("my_vit", num_classes=5)
    assert type(model) is Wide
    assert (model.get_num_layers(), model.num_classes) == (1, 5)
    assert "my_vit" in list_models()
    with pytest.raises(InputError, match="did you mean 'my_vit'"):
        create_model("my_vitt")


def test_importing_leaves_the_registry_of_timm_alone():
    # timm names its own models the same. Breaks when ours are registered there: timm.create_model would build ours.
    build("beit_base_patch16_224")
    assert {timm.model_entrypoint(name).__module__.partition(".")[0] for name in timm.list_models()} == {"timm"}
    assert timm.model_entrypoint("beit_base_patch16_224").__module__ == "timm.models.beit"
