"""Names in both directions, and whose file it is."""

import json
import re
from pathlib import Path

import pytest
import torch

from beit import targets
from beit.__main__ import main
from beit.checkpoints.formats import UNKNOWN, dialects, recognise, relative, to_official
from beit.checkpoints.formats.dialect import Dialect
from beit.checkpoints.formats.recorded import VISUAL_TOKENS
from beit.checkpoints.read import read_weights
from beit.errors import InputError
from beit.modeling import VisionTransformer
from beit.registry import FORMATS
from beit.relative_position import relative_position_index
from beit.storage import save_checkpoint
from beit.zoo import create_model

INDEX = relative_position_index((4, 4))


@pytest.mark.parametrize("dialect", [dialect for dialect in dialects() if dialect != "mmsegmentation"])
def test_there_and_back_is_bit_identical(any_model, dialect):
    # Breaks when a table lacks a row, two rows collide, or query, key and value are joined in another order.
    weights = any_model.state_dict()
    there = dialects()[dialect].from_official(weights, INDEX)
    back = to_official(there, recognise(there))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


def test_the_backbone_goes_to_mmsegmentation_and_back(small):
    weights = small("per-layer tables").state_dict()
    there = dialects()["mmsegmentation"].from_official(weights, INDEX)
    back = to_official(there, recognise(there))
    assert weights.keys() - back.keys() == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert all(torch.equal(weights[name], tensor) for name, tensor in back.items())


def test_official_files_get_the_official_names_and_shapes(golden):
    # Breaks when an export to the official format lacks the index buffers, which strict loading there asks for.
    published = json.loads((golden / "official_state_dicts.json").read_text())
    for name in ("beit_base_patch16_224_8k_vocab", "beit_base_patch16_224"):
        with torch.device("meta"):
            weights = create_model(name).state_dict()
        written = dialects()["unilm"].from_official(weights, relative_position_index((14, 14)))
        assert {key: list(tensor.shape) for key, tensor in written.items()} == published[name]["state_dict"]


OPENMMLAB = {
    "cls_token": "backbone.cls_token",
    "patch_embed.proj.weight": "backbone.patch_embed.projection.weight",
    "blocks.0.norm1.weight": "backbone.layers.0.ln1.weight",
    "blocks.1.norm2.bias": "backbone.layers.1.ln2.bias",
    "blocks.0.attn.qkv.weight": "backbone.layers.0.attn.qkv.weight",
    "blocks.0.attn.q_bias": "backbone.layers.0.attn.q_bias",
    "blocks.1.attn.proj.bias": "backbone.layers.1.attn.proj.bias",
    "blocks.0.attn.relative_position_bias_table": "backbone.layers.0.attn.relative_position_bias_table",
    "blocks.0.gamma_1": "backbone.layers.0.gamma_1",
    "blocks.1.gamma_2": "backbone.layers.1.gamma_2",
    "blocks.0.mlp.fc1.weight": "backbone.layers.0.ffn.layers.0.0.weight",
    "blocks.1.mlp.fc2.bias": "backbone.layers.1.ffn.layers.1.bias",
    "fc_norm.weight": "backbone.ln2.weight",
    "head.weight": "head.fc.weight",
}
OPENMMLAB_PRE_TRAINING = {
    "mask_token": "backbone.mask_token",
    "norm.weight": "backbone.ln1.weight",
    "lm_head.bias": "head.cls_head.bias",
    "rel_pos_bias.relative_position_bias_table": "backbone.rel_pos_bias.relative_position_bias_table",
}


@pytest.mark.parametrize(
    ("kind", "names"), [("per-layer tables", OPENMMLAB), ("pre-training", OPENMMLAB_PRE_TRAINING)], ids=["", "masked"]
)
def test_openmmlab_names_are_those_of_the_published_table(small, kind, names):
    # The reference is the documentation of these formats: neither library is installed here.
    weights = small(kind).state_dict()
    translated = dialects()["mmpretrain"].from_official(weights, INDEX)
    assert all(torch.equal(translated[theirs], weights[ours]) for ours, theirs in names.items())
    tables = [name for name in translated if name.endswith("_bias_table")]
    assert all(torch.equal(translated[name.replace("bias_table", "index")], INDEX) for name in tables)


def test_mmsegmentation_gives_every_block_its_own_table_and_scale(small):
    # Breaks when a shared table is lost, or a backbone without LayerScale would start with the one of that library.
    masked = small("pre-training")
    names = dialects()["mmsegmentation"].from_official(masked.state_dict(), INDEX)
    assert all(name.startswith("backbone.") for name in names)
    assert not any("mask_token" in name or name == "ln1.weight" for name in names)
    for block in range(2):
        table = names[f"backbone.layers.{block}.attn.relative_position_bias_table"]
        assert torch.equal(table, masked.rel_pos_bias.relative_position_bias_table)
    segmentor = VisionTransformer(
        img_size=64, embed_dim=32, depth=2, num_heads=2, init_values=1.0, use_abs_pos_emb=False, use_rel_pos_bias=True
    )
    segmentor.load_state_dict(to_official(names, "mmsegmentation"), strict=False)
    images = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(
        masked.get_intermediate_layers(images), segmentor.get_intermediate_layers(images), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    unscaled = small("no LayerScale", use_abs_pos_emb=False)
    names = dialects()["mmsegmentation"].from_official(unscaled.state_dict(), INDEX)
    assert torch.equal(names["backbone.layers.1.gamma_2"], torch.ones(32))
    with pytest.raises(InputError, match="no absolute positions"):
        dialects()["mmsegmentation"].from_official(small("positions, class token").state_dict(), None)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "backbone.", "model."])
def test_prefixes_of_wrappers_come_off(small, wrapper):
    weights = small("per-layer tables").state_dict()
    wrapped = {wrapper + name: tensor for name, tensor in weights.items()}
    assert recognise(wrapped) == "unilm"
    assert to_official(wrapped, "unilm").keys() == weights.keys()


def keys(*names):
    return {name: torch.zeros(1) for name in names}


OFFICIAL = ("cls_token", "blocks.0.attn.qkv.weight", "blocks.0.attn.q_bias")


@pytest.mark.parametrize(
    ("state", "name", "loads"),
    [
        (keys("beit3.encoder.layers.0.self_attn.k_proj.A.weight", "beit3.text_embed.weight"), "BEiT-3", False),
        (keys("encoder.layers.0.self_attn.k_proj.A.weight"), "BEiT-3", False),
        (keys(*OFFICIAL, "cls_pt_layers.0.norm1.weight", "lm_head.weight"), "BEiT v2", True),
        (keys("encoder.blocks.0.attn.qkv.weight", "quantize.embedding.weight"), "BEiT v2's tokenizer (VQ-KD)", False),
        ({**keys(*OFFICIAL), "cls_token": torch.zeros(1, 1, 1408)}, "EVA", True),
        (keys("blocks.0.attn.q_proj.weight", "blocks.0.mlp.w1.weight"), "EVA-02", False),
        (keys("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1_g.weight"), "EVA-02", False),
        (
            keys(*(f"backbone.bottom_up.backbone.{name}" for name in OFFICIAL), "roi_heads.box.weight"),
            "DiT",
            True,
        ),
        (
            keys("cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"),
            "a plain vision transformer (ViT, DeiT, MAE, DINO)",
            True,
        ),
        (
            keys(
                *(f"vit.embeddings.{name}" for name in ("cls_token", "position_embeddings")),
                "vit.encoder.layer.0.attention.attention.key.bias",
            ),
            "a plain vision transformer (ViT, DeiT, MAE, DINO)",
            True,
        ),
        (keys("data2vec_vision.encoder.layer.0.layernorm_before.weight"), "data2vec-vision", False),
        (keys("beit.layers.0.attention.q_proj.weight"), None, False),
        (keys("layer1.0.conv1.weight"), "a ResNet", False),
        (keys("blocks.group_1.block_1.id_path.w"), "a DALL-E tokenizer", False),
    ],
)
def test_relatives_are_told_apart(state, name, loads):
    # Breaks when a file of another model is taken for BEiT's, or one with BEiT's backbone is refused.
    found = relative(recognise(state))
    assert found is not None
    assert (found.to_official is not None) is loads
    assert name is None or found.name == name
    if not loads:
        with pytest.raises(InputError, match="unknown dialect"):
            to_official(state, found.name)


def test_the_documentation_lists_all_formats():
    documented = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \| ", documented, re.MULTILINE)) == set(FORMATS)


def test_a_format_registered_from_outside_is_recognised_and_written(small, tmp_path, monkeypatch):
    # Breaks when some place knows the formats by a list of its own.
    mine = Dialect(
        matches=lambda names: any(name.startswith("mine:") for name in names),
        to_official=lambda state: {name.removeprefix("mine:"): tensor for name, tensor in state.items()},
        from_official=lambda weights, _index: {f"mine:{name}": tensor for name, tensor in weights.items()},
        file=lambda model: {"model": {f"mine:{name}": tensor for name, tensor in model.weights.items()}},
    )
    monkeypatch.setitem(FORMATS, "mine", mine)
    model = small("per-layer tables")
    save_checkpoint(tmp_path / "ours.pth", {"model": model.state_dict()})
    assert main(["convert", str(tmp_path / "ours.pth"), str(tmp_path / "mine.pth"), "--to", "mine"]) == 0
    weights, metadata = read_weights(tmp_path / "mine.pth")
    assert metadata["dialect"] == "mine"
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_the_default_target_is_that_of_the_method():
    assert VISUAL_TOKENS == targets.VISUAL_TOKENS


def test_what_is_unknown_is_called_so():
    assert recognise(keys("a", "b")) == UNKNOWN
    with pytest.raises(InputError, match="did you mean 'huggingface'"):
        to_official({}, "huggingfase")
