"""Checkpoints of BEiT v2: opened whole, loaded into every other model, converted, and released."""

import logging

import pytest
import timm
import torch

from beit.checkpoints import released
from beit.checkpoints.export import convert
from beit.checkpoints.formats.mmseg import to_mmpretrain
from beit.checkpoints.load import load_pretrained
from beit.checkpoints.read import architecture_of, read_weights
from beit.checkpoints.released import RELEASED, released_for, resolve
from beit.errors import InputError
from beit.storage import save_checkpoint
from beit.zoo import create_model, get_model, list_models

TABLES = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "vocab_size": 16}


@pytest.fixture
def two_losses(small):
    return lambda **options: small("pre-training", **{**TABLES, "depth": 4, "head_layers": 2, **options})


def outputs(model):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        return model(images, torch.rand(2, 16, generator=generator) < 0.4)


def save(folder, model, **more):
    save_checkpoint(folder / "v2.pth", {"model": model.state_dict(), **more})
    return folder / "v2.pth"


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("early", [None, 2])
def test_a_pre_trained_model_opens_whole(two_losses, tmp_path, shared, early, caplog):
    # Breaks if a part is left out, or the early block that the run's settings record is not the one taken.
    model = two_losses(shared_lm_head=shared, early_layers=early)
    opened = get_model(save(tmp_path, model, args={"early_layers": early}))
    assert opened.state_dict().keys() == model.state_dict().keys()
    for ours, theirs in zip(outputs(opened), outputs(model), strict=True):
        assert torch.equal(ours, theirs)
    assert "last blocks but three" not in caplog.text


def test_an_early_block_that_is_not_recorded_is_assumed_aloud(two_losses, tmp_path, caplog):
    opened = get_model(save(tmp_path, two_losses()))
    assert opened.early_layers == 1
    assert "last blocks but three" in caplog.text
    weights, metadata = read_weights(save(tmp_path, two_losses(), args={"early_layers": "9; rm"}))
    assert architecture_of(weights, metadata).arguments["early_layers"] is None


def test_loading_keeps_both_heads_or_says_why_not(two_losses, tmp_path):
    path = save(tmp_path, source := two_losses(shared_lm_head=False))
    target = two_losses(shared_lm_head=False)
    report = load_pretrained(target, path)
    assert (report.missing, report.unexpected, report.dropped) == ((), (), {})
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())
    report = load_pretrained(two_losses(shared_lm_head=False, vocab_size=5), path)
    assert set(report.dropped) == set(report.missing)
    assert set(report.dropped.values()) == {"the head has 16 outputs, the model 5"}
    assert {name.partition(".")[0] for name in report.dropped} == {"lm_head", "cls_pt_lm_head"}


def test_the_first_version_is_a_start_without_the_further_blocks(two_losses, small, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        report = load_pretrained(two_losses(), save(tmp_path, small("pre-training", depth=4)))
    assert {name.partition(".")[0] for name in report.missing} == {"cls_pt_layers"}
    assert "not in the checkpoint: cls_pt_layers" in caplog.text


def test_a_classifier_takes_the_backbone(two_losses, small, tmp_path):
    classifier = small("per-layer tables", depth=4)
    report = load_pretrained(classifier, save(tmp_path, source := two_losses(shared_lm_head=False)))
    assert report.expanded == 4
    assert report.unexpected == ()
    assert {name.partition(".")[0] for name in report.dropped} == {
        *("mask_token", "norm", "lm_head", "cls_pt_layers", "cls_pt_norm", "cls_pt_lm_head")
    }
    images = torch.randn(2, 3, 64, 64)
    ours, theirs = (model.get_intermediate_layers(images)[-1] for model in (classifier, source))
    torch.testing.assert_close(ours, theirs)


def test_the_official_format_keeps_everything(two_losses, tmp_path):
    path = save(tmp_path, source := two_losses(shared_lm_head=False), args={"early_layers": 2})
    convert(path, tmp_path / "out.pth", "unilm")
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert written.keys() == {*source.state_dict(), "rel_pos_bias.relative_position_index"}
    assert get_model(tmp_path / "out.pth").early_layers == 2


@pytest.mark.parametrize(("to", "name"), [("timm", "o.pth"), ("mmpretrain", "o.pth"), ("huggingface", "o")])
def test_other_formats_leave_the_further_blocks_out(two_losses, tmp_path, to, name, caplog):
    path = save(tmp_path, source := two_losses())
    with caplog.at_level(logging.WARNING):
        convert(path, tmp_path / name, to)
    assert "left out, as only BEiT v2's pre-training needs it: cls_pt_layers.0.gamma_1" in caplog.text
    weights, _ = read_weights(tmp_path / name)
    assert torch.equal(weights["blocks.3.mlp.fc1.weight"], source.blocks[3].mlp.fc1.weight)
    assert not [name for name in weights if "cls_pt" in name]


def test_mmpretrains_neck_is_named_as_what_it_is(two_losses, small, tmp_path):
    names = to_mmpretrain({name: tensor for name, tensor in two_losses().state_dict().items() if "cls_pt" not in name})
    neck = {"neck.patch_aggregation.0.ln1.weight": torch.ones(32), "neck.norm.weight": torch.ones(32)}
    save_checkpoint(tmp_path / "mm.pth", {"state_dict": names | neck})
    report = load_pretrained(small("per-layer tables", depth=4), tmp_path / "mm.pth")
    assert report.unexpected == ()
    assert {report.dropped[name] for name in neck} == {"of pre-training"}


def test_timms_beitv2_opens_with_equal_logits(tmp_path):
    sizes = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "init_values": 0.1}
    theirs = timm.create_model("beitv2_base_patch16_224", pretrained=False, **sizes).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_checkpoint(tmp_path / "beitv2_base.pth", theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            get_model(tmp_path / "beitv2_base.pth")(images), theirs(images), rtol=1e-4, atol=1e-5
        )


def test_the_released_checkpoints_are_those_of_the_authors():
    rows = {name: row for name, row in RELEASED.items() if name.startswith("beitv2_")}
    tasks = ("300e", "", "300e_ft1k", "ft1k", "ft21k", "ft21kto1k", "ftade20k", "ft21ktoade20k")
    stems = [f"beitv2_{size}_patch16_224_pt1k" for size in ("base", "large")]
    assert rows.keys() == {f"{stem}_{task}".removesuffix("_") for stem in stems for task in tasks}
    for name, row in rows.items():
        assert row.urls == (f"https://github.com/addf400/files/releases/download/BEiT-v2/{name}.pth",)
        assert row.mean == (0.485, 0.456, 0.406)  # ImageNet's
        assert row.model in list_models()
        classes = {"k": 1000, "ft21k": 21841, "ade20k": 150}
        expected = None if row.model.endswith("cls_pt") else next(
            classes[end] for end in ("ade20k", "ft21k", "k") if name.endswith(end)
        )  # fmt: skip
        assert (row.num_classes, row.input_size) == (expected, 512 if "ade20k" in name else 224)
    assert released_for("beit_large_patch16_224_8k_vocab_cls_pt").name == "beitv2_large_patch16_224_pt1k"
    assert released_for("beit_base_patch16_224").name == "beit_base_patch16_224_pt22k_ft22kto1k"


@pytest.mark.parametrize(
    "address",
    [
        "https://conversationhub.blob.core.windows.net/beit-share-public/beitv2/beitv2_base_patch16_224_pt1k.pth",
        "https://github.com/addf400/files/releases/download/BEiT-v2/beitv2_base_patch16_224_pt1k.pth",
        "beitv2_base_patch16_224_pt1k",
    ],
)
def test_every_address_leads_to_the_one_that_is_alive(address, monkeypatch):
    asked = []
    monkeypatch.setattr(released, "download", lambda urls, *_args, **_options: asked.append(urls))
    resolve(address)
    assert asked == [("https://github.com/addf400/files/releases/download/BEiT-v2/beitv2_base_patch16_224_pt1k.pth",)]


def test_other_files_beside_them_keep_their_address(monkeypatch):
    asked = []
    monkeypatch.setattr(released, "download", lambda urls, *_args, **_options: asked.append(urls))
    tokenizer = "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth"
    alive = f"https://github.com/addf400/files/releases/download/BEiT-v2/{tokenizer}"
    resolve(alive)
    resolve(f"https://conversationhub.blob.core.windows.net/beit-share-public/beitv2/{tokenizer}?sv=2021&sig=x")
    assert asked == [(alive,), (alive,)]


def test_a_model_without_a_release_says_so():
    with pytest.raises(InputError, match="no checkpoint of beit_tiny_patch16_224 was released"):
        create_model("beit_tiny_patch16_224", pretrained=True)
