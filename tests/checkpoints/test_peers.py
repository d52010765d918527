"""Files read and written by the libraries themselves: equal logits on random weights."""

import json

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from timm.layers import resample_patch_embed
from timm.models.beit import Beit
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitImageProcessorPil,
    BitImageProcessorPil,
)

from beit.checkpoints.export import convert
from beit.checkpoints.read import read_weights
from beit.data.preprocessing import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from beit.errors import InputError
from beit.inference import preprocessing_of
from beit.modeling import VisionTransformer
from beit.storage import save_checkpoint
from beit.zoo import create_model, get_model

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
MASK = torch.rand(2, 16, generator=torch.Generator().manual_seed(2)) < 0.4
HF_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 16,
}


def outputs(model, images=IMAGES):
    with torch.no_grad():
        if hasattr(model, "lm_head"):
            return model(images, MASK, return_all_tokens=True)
        return model(images)


def randomise(model):
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def saved(model, folder, **recorded):
    save_checkpoint(folder / "source.pth", {"model": model.state_dict(), **recorded})
    return folder / "source.pth"


def test_transformers_opens_our_export_with_equal_logits(any_model, tmp_path):
    # Breaks with a wrong name (the library fills it with noise), another eps, or a wrong flag in the config.
    convert(saved(any_model, tmp_path, args={"model_kwargs": {"num_heads": 2}}), tmp_path / "hf", "huggingface")
    masked = hasattr(any_model, "lm_head")
    peer_class = BeitForMaskedImageModeling if masked else AutoModelForImageClassification
    peer, info = peer_class.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        theirs = peer.eval()(IMAGES, bool_masked_pos=MASK) if masked else peer.eval()(IMAGES)
    logits = theirs.logits[:, -16:] if masked else theirs.logits
    torch.testing.assert_close(logits, outputs(any_model), rtol=1e-5, atol=1e-5)


def test_our_export_has_the_names_of_the_librarys_own_files(any_model, tmp_path):
    # The file names, not those in memory: a file that only the installed version opens would pass the test above.
    convert(saved(any_model, tmp_path, args={"model_kwargs": {"num_heads": 2}}), tmp_path / "hf", "huggingface")
    peer_class = BeitForMaskedImageModeling if hasattr(any_model, "lm_head") else BeitForImageClassification
    peer_class(BeitConfig.from_pretrained(tmp_path / "hf")).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "theirs"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"use_relative_position_bias": True, "num_labels": 5},
        {"use_absolute_position_embeddings": True, "use_mean_pooling": False, "num_labels": 5},
        {"use_relative_position_bias": True, "layer_scale_init_value": 0.0, "layer_norm_eps": 1e-6},
    ],
    ids=["tables", "positions, class token", "no LayerScale"],
)
def test_we_open_a_classifier_that_transformers_saved(options, tmp_path):
    # Breaks with a wrong name, and when the library's default eps of 1e-12 in its config is not taken.
    peer = randomise(BeitForImageClassification(BeitConfig(**HF_SIZES, **options)))
    peer.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(outputs(get_model(tmp_path)), peer(IMAGES).logits, rtol=1e-5, atol=1e-5)


def test_we_open_a_pre_training_model_that_transformers_saved(tmp_path):
    config = BeitConfig(**HF_SIZES, use_shared_relative_position_bias=True, use_mask_token=True, vocab_size=16)
    peer = randomise(BeitForMaskedImageModeling(config))
    peer.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs = peer(IMAGES, bool_masked_pos=MASK).logits[:, -16:]
    torch.testing.assert_close(outputs(get_model(tmp_path)), theirs, rtol=1e-5, atol=1e-5)


def test_transformers_export_keeps_labels_and_preprocessing(small, tmp_path):
    # Breaks predictions of an exported model: numbers for names, or images prepared in another way.
    names = ["a cat", "a dog", "a bird", "a fish", "a horse"]
    recorded = {"args": {"imagenet_default_mean_and_std": True, "input_size": 64}, "labels": names}
    convert(saved(small("per-layer tables"), tmp_path, **recorded), tmp_path / "hf", "huggingface")
    config = BeitConfig.from_pretrained(tmp_path / "hf")
    assert [config.id2label[index] for index in range(5)] == names
    assert config.label2id["a fish"] == 3
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert tuple(processor.image_mean) == IMAGENET_DEFAULT_MEAN
    assert tuple(processor.image_std) == IMAGENET_DEFAULT_STD
    pixels = processor(torch.zeros(3, 80, 120, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    black = [-m / s for m, s in zip(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, strict=True)]
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor(black), rtol=1e-3, atol=1e-3)
    assert json.loads((tmp_path / "hf/preprocessor_config.json").read_text())["size"] == {"shortest_edge": 73}


def test_transformers_is_not_given_what_it_computes_otherwise(small, tmp_path):
    # It reads the tables of a non-square grid transposed: an export would load and be wrong.
    model = small("per-layer tables", img_size=(64, 96))
    path = saved(model, tmp_path, args={"input_size": [64, 96]})
    with pytest.raises(InputError, match="for a square's, not for"):
        convert(path, tmp_path / "hf", "huggingface")
    options = {**HF_SIZES, "image_size": [64, 96]}
    peer = BeitForImageClassification(BeitConfig(**options, use_relative_position_bias=True, num_labels=5))
    from beit.checkpoints.formats import dialects

    translated = dialects()["huggingface"].from_official(model.state_dict(), None)
    peer.save_pretrained(tmp_path / "peer")
    from safetensors.torch import save_file

    save_file(translated, tmp_path / "peer/model.safetensors", metadata={"format": "pt"})
    peer = BeitForImageClassification.from_pretrained(tmp_path / "peer").eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        difference = (peer(images).logits - model(images)).abs().max()
    assert difference > 1e-3, "transformers has learnt non-square tables: the refusal can go"


@pytest.mark.parametrize("size", [(64, 64), (64, 96)], ids=["square", "non-square"])
@pytest.mark.parametrize("kind", ["per-layer tables", "positions, class token", "no LayerScale"])
def test_timm_opens_our_export_with_equal_logits(small, kind, size, tmp_path):
    model = small(kind, img_size=size)
    path = saved(model, tmp_path, args={"input_size": list(size), "model_kwargs": {"num_heads": 2}})
    convert(path, tmp_path / "timm.safetensors", "timm")
    peer = Beit(
        img_size=size,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=5,
        init_values=model.init_values,
        use_abs_pos_emb=model.pos_embed is not None,
        use_rel_pos_bias=model.blocks[0].attn.relative_position_bias_table is not None,
        global_pool="avg" if model.fc_norm is not None else "token",
    )
    peer.load_state_dict(load_file(tmp_path / "timm.safetensors"))
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(peer.eval()(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["per-layer tables", "positions, class token", "no LayerScale"])
def test_timm_creates_the_model_from_our_folder(small, kind, tmp_path):
    model = small(kind)
    path = saved(model, tmp_path, labels=list("abcde"), args={"model_kwargs": {"num_heads": 2}})
    convert(path, tmp_path / "timm", "timm")
    peer = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(peer(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    assert peer.pretrained_cfg["crop_pct"] == 0.875
    assert peer.pretrained_cfg["label_names"] == list("abcde")
    torch.testing.assert_close(outputs(get_model(tmp_path / "timm")), outputs(model))


def test_timm_takes_a_pre_training_model_as_features(small, tmp_path):
    model = small("pre-training")
    convert(saved(model, tmp_path), tmp_path / "timm", "timm")
    name = f"local-dir:{tmp_path / 'timm'}"
    peer = timm.create_model(name, pretrained=True, pretrained_strict=False, num_classes=0).eval()
    with torch.no_grad():
        theirs, ours = peer.forward_features(IMAGES), model.forward_features(IMAGES)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_timm_creates_published_models_from_a_checkpoint_of_ours(tmp_path):
    # The way its users know, with a registered name; a shallow one, for speed.
    model = randomise(
        VisionTransformer(
            img_size=224, depth=1, num_classes=3, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1
        )
    )
    convert(saved(model, tmp_path), tmp_path / "timm.pth", "timm")
    peer = timm.create_model(
        "beit_base_patch16_224", checkpoint_path=str(tmp_path / "timm.pth"), depth=1, num_classes=3
    ).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(peer(images), model(images), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (64, 96)], ids=["square", "non-square"])
def test_we_open_what_timm_saved(size, tmp_path):
    peer = Beit(
        img_size=size, embed_dim=32, depth=2, num_heads=2, num_classes=5, use_abs_pos_emb=False, use_rel_pos_bias=True
    )
    randomise(peer)
    save_checkpoint(tmp_path / "timm.pth", {"state_dict": peer.state_dict(), "args": {"input_size": list(size)}})
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(get_model(tmp_path / "timm.pth")(images), peer(images), rtol=1e-5, atol=1e-5)


def test_a_classifier_that_kept_its_mask_token_opens_as_a_classifier(tmp_path, caplog):
    # Breaks when a mask token alone makes a pre-training model: the classifier would be dropped.
    config = BeitConfig(
        **HF_SIZES, num_labels=5, use_mask_token=True, use_shared_relative_position_bias=True, layer_norm_eps=1e-12
    )
    peer = randomise(BeitForImageClassification(config))
    peer.save_pretrained(tmp_path)
    model = get_model(tmp_path)
    assert isinstance(model, VisionTransformer)
    torch.testing.assert_close(outputs(model), outputs(peer).logits, rtol=1e-4, atol=1e-4)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "assuming images of mean" in warning  # which are in a file beside it that was not written
    convert(tmp_path, tmp_path / "converted.pth", "unilm")
    torch.testing.assert_close(outputs(get_model(tmp_path / "converted.pth")), outputs(model))


@pytest.mark.parametrize("to", ["unilm", "mmpretrain", "timm", "timm .safetensors", "timm folder"])
def test_what_no_shape_tells_survives_a_conversion(to, tmp_path, caplog):
    # Breaks when heads, eps, size or interpolation are lost: the file opens, and computes something else.
    config = BeitConfig(
        **{**HF_SIZES, "num_attention_heads": 4},
        num_labels=5,
        layer_norm_eps=1e-2,
        use_absolute_position_embeddings=False,
    )
    peer = randomise(BeitForImageClassification(config))
    peer.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/preprocessor_config.json").write_text('{"resample": 2, "image_mean": [0.4, 0.5, 0.6]}')
    format_, _, kind = to.partition(" ")
    path = tmp_path / f"converted{ {'folder': ''}.get(kind, kind or '.pth') }"
    convert(tmp_path / "hf", path, format_)
    assert ("timm's layer norms have an eps of 1e-06" in caplog.text) == (format_ == "timm")
    model = get_model(path)
    assert (model.num_heads, model.img_size, model.metadata["layer_norm_eps"]) == (4, (64, 64), 1e-2)
    assert (model.metadata["interpolation"], model.metadata["mean"]) == ("bilinear", (0.4, 0.5, 0.6))
    torch.testing.assert_close(outputs(model), outputs(peer).logits, rtol=1e-4, atol=1e-4)

    sizes = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_classes": 5, "use_rel_pos_bias": False}
    with pytest.raises(InputError, match="of 4 heads and not 2: build it with num_heads=4"):
        create_model("beit_tiny_patch16_224", pretrained=path, **sizes, num_heads=2)
    started = create_model("beit_tiny_patch16_224", pretrained=path, **sizes, num_heads=4)
    torch.testing.assert_close(outputs(started), outputs(peer).logits, rtol=1e-4, atol=1e-4)


def test_the_crop_comes_back_from_transformers_as_it_was(small, tmp_path):
    # Breaks when it is read off the sizes, which are whole pixels: 64 / 73 is not 0.875.
    path = saved(small("per-layer tables"), tmp_path, crop_pct=0.875)
    convert(path, tmp_path / "hf", "huggingface")
    assert read_weights(tmp_path / "hf")[1]["crop_pct"] == 0.875
    described = tmp_path / "hf" / "preprocessor_config.json"
    described.write_text(described.read_text().replace('"shortest_edge": 73', '"shortest_edge": 80'))
    assert read_weights(tmp_path / "hf")[1]["crop_pct"] == 0.8  # somebody changed the sizes, which count then
    assert AutoImageProcessor.from_pretrained(tmp_path / "hf").size["shortest_edge"] == 80


def photo(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prepared(model, image):
    """What our model is given of an image."""
    how = preprocessing_of(model, model.metadata)
    pixels = how.transform(image)["image"].float() / 255
    return (pixels - torch.tensor(how.mean).view(3, 1, 1)) / torch.tensor(how.std).view(3, 1, 1)


@pytest.mark.parametrize(
    ("processor", "settings"),
    [
        (BeitImageProcessorPil, {"size": {"height": 64, "width": 64}, "do_center_crop": False}),
        (BeitImageProcessorPil, {"size": {"height": 80, "width": 80}, "do_center_crop": True}),
        (BeitImageProcessorPil, {"size": {"height": 64, "width": 64}, "do_normalize": False}),
        (
            BeitImageProcessorPil,
            {"size": {"height": 64, "width": 64}, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3},
        ),
        (BeitImageProcessorPil, {"size": {"height": 64, "width": 64}, "do_rescale": False, "image_std": [99.0] * 3}),
        (BeitImageProcessorPil, {"size": {"height": 64, "width": 64}, "resample": 2}),
        (BitImageProcessorPil, {"size": {"shortest_edge": 80}, "do_center_crop": True}),
    ],
    ids=["squash", "squash and crop", "no normalization", "other scale", "no scale", "bilinear", "shorter edge"],
)
def test_images_are_prepared_as_the_file_beside_the_weights_says(processor, settings, small, tmp_path):
    # Breaks when the aspect ratio is kept where transformers does not, or when a key is half read.
    convert(saved(small("per-layer tables"), tmp_path, mean=[0.5] * 3, std=[0.5] * 3), tmp_path / "hf", "huggingface")
    theirs = processor(crop_size={"height": 64, "width": 64}, **settings)
    theirs.save_pretrained(tmp_path / "hf")
    image = photo(70, 131)
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(prepared(get_model(tmp_path / "hf"), image), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_the_kind_of_crop_travels_through_every_format(mode, small, tmp_path):
    path = saved(small("per-layer tables"), tmp_path, crop_mode=mode, crop_pct=0.8)
    image = photo(70, 130)
    expected = prepared(get_model(path), image)
    resized = image.resize((80, 80) if mode == "squash" else (80, 148), Image.Resampling.BICUBIC)  # 64 / 0.8
    top = 8 if mode == "squash" else 42
    by_hand = np.asarray(resized.crop((8, top, 72, top + 64)), dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(expected, torch.from_numpy(by_hand), rtol=1e-5, atol=1e-5)
    for to, name in (("huggingface", "hf"), ("timm", "timm"), ("timm", "a.safetensors"), ("unilm", "a.pth")):
        convert(path, tmp_path / name, to)
        assert torch.equal(prepared(get_model(tmp_path / name), image), expected)
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "hf", use_fast=False)
    torch.testing.assert_close(theirs(image, return_tensors="pt")["pixel_values"][0], expected, rtol=1e-5, atol=1e-5)
    peer = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=peer))
    torch.testing.assert_close(transform(image), expected, rtol=1e-5, atol=1e-5)


def test_what_of_the_images_cannot_be_followed_is_named(small, tmp_path, caplog):
    convert(saved(small("per-layer tables"), tmp_path), tmp_path / "hf", "huggingface")
    file = tmp_path / "hf/preprocessor_config.json"
    for key, value, named in (
        ("resample", 4, "resample"),
        ("do_resize", False, "do_resize"),
        ("size", [64], "size"),
    ):
        caplog.clear()
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        get_model(tmp_path / "hf")
        assert [named in record.getMessage() for record in caplog.records if "passed over" in record.getMessage()] == [
            True
        ]
        convert(tmp_path / "source.pth", tmp_path / "hf", "huggingface")


@pytest.mark.parametrize("activation", ["relu", "quick_gelu", "gelu_new"])
def test_another_activation_is_refused(activation, tmp_path):
    peer = BeitForImageClassification(BeitConfig(**HF_SIZES, hidden_act=activation, use_relative_position_bias=True))
    peer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"activation '{activation}', and BEiT's is gelu"):
        get_model(tmp_path)


@pytest.mark.parametrize("table", ["use_relative_position_bias", "use_shared_relative_position_bias"])
def test_tables_that_transformers_reads_otherwise_are_refused(table, tmp_path):
    config = BeitConfig(**{**HF_SIZES, "image_size": [64, 96]}, **{table: True}, num_labels=5)
    BeitForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="as those of a square, unlike BEiT"):
        get_model(tmp_path)


TIMM_VITS = {  # name -> arguments; all but their registered class tokens and LayerScale are made small
    "vit_tiny_patch16_224": {"num_classes": 5},
    "vit_base_patch16_224.mae": {"global_pool": "avg", "num_classes": 5},
    "vit_small_patch8_224.dino": {},
    "vit_small_patch14_dinov2": {"patch_size": 16},
    "deit3_small_patch16_224": {"num_classes": 5},
}


@pytest.mark.parametrize(("name", "options"), TIMM_VITS.items(), ids=TIMM_VITS)
def test_a_vit_of_timm_opens_with_equal_features(name, options, tmp_path):
    # Breaks when a bias of the keys is taken for another, LayerScale is lost, or positions are shifted by a token.
    sizes = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 1}
    peer = randomise(timm.create_model(name, pretrained=False, **{**sizes, **options}))
    torch.save(peer.state_dict(), tmp_path / "vit.pth")
    ours = get_model(tmp_path / "vit.pth")
    with torch.no_grad():
        theirs = list(peer.forward_intermediates(IMAGES, norm=False, return_prefix_tokens=True, output_fmt="NLC")[1])
    for (patches, cls), tokens in zip(theirs, ours.get_intermediate_layers(IMAGES), strict=True):
        torch.testing.assert_close(tokens, torch.cat((cls, patches), dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs(ours), outputs(peer), rtol=1e-5, atol=1e-5)


VIT_SIZES = HF_SIZES | {"image_size": 64}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "mask_ratio": 0.0,
}
HF_VITS = {
    "ViTModel": VIT_SIZES | {"layer_norm_eps": 0.1},
    "ViTForImageClassification": VIT_SIZES,
    "ViTMAEModel": VIT_SIZES | DECODER,
    "ViTMAEForPreTraining": VIT_SIZES | DECODER,
    "Dinov2Model": VIT_SIZES,
    "Dinov2ForImageClassification": VIT_SIZES,
}


def hf_vit(kind, options):
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    return randomise(model_class(model_class.config_class(**options)))


@pytest.mark.parametrize(("kind", "options"), HF_VITS.items(), ids=HF_VITS)
def test_a_vit_of_transformers_opens_with_equal_features(kind, options, tmp_path, caplog):
    # Breaks with another eps than the config's, or with names that only the installed version has in memory.
    peer = hf_vit(kind, options)
    peer.save_pretrained(tmp_path)
    with caplog.at_level("INFO"):
        ours = get_model(tmp_path)
    in_order = {"noise": torch.arange(16.0).expand(2, -1)} if "MAE" in kind else {}  # MAE shuffles the patches
    with torch.no_grad():
        theirs = (peer if kind.endswith("Model") else peer.base_model)(IMAGES, **in_order).last_hidden_state
    tokens, _ = ours.forward_blocks(ours.embed(IMAGES))
    torch.testing.assert_close(ours.norm(tokens), theirs, rtol=1e-5, atol=1e-5)
    if kind == "ViTForImageClassification":
        torch.testing.assert_close(outputs(ours), outputs(peer).logits, rtol=1e-5, atol=1e-5)
    report = next(message for message in caplog.messages if "tensors loaded" in message)
    assert "dropped (a bias of the keys cancels in the softmax): blocks.0.attn.k_bias, blocks.1.attn.k_bias" in report
    assert "no place" not in report
    assert "not in the checkpoint" not in report


REFUSED_VITS = {
    "DINOv2 with registers, DINOv3": (
        *("vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "DINOv3ViTModel"),
        *("vit_small_patch14_reg4_dinov2", "Dinov2WithRegistersModel"),
    ),
    "a CLIP tower": ("vit_base_patch16_clip_quickgelu_224", "CLIPVisionModel"),
    "a ViT without class token or positions": (
        *("vit_base_patch16_siglip_224", "IJepaModel", "vit_small_patch16_rope_224"),
        *("deit_tiny_distilled_patch16_224", "DeiTModel"),
    ),
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in REFUSED_VITS.items() for kind in kinds])
def test_other_vits_are_refused_by_name(name, kind, tmp_path):
    # Breaks when a model that computes something else is opened as if its other tensors were not there.
    if "_" in kind:
        source = tmp_path / "a.pth"
        torch.save(timm.create_model(kind, depth=1, img_size=112, embed_dim=96, num_heads=2).state_dict(), source)
    else:
        source = tmp_path
        hf_vit(kind, VIT_SIZES).save_pretrained(source)
    with pytest.raises(InputError, match=f"is {name}.*, not BEiT: ") as refused:
        get_model(source)
    assert "\n" not in str(refused.value)


def test_dinov2_giant_is_refused_by_its_gated_mlp(tmp_path):
    hf_vit("Dinov2Model", VIT_SIZES | {"use_swiglu_ffn": True}).save_pretrained(tmp_path)
    giant = timm.create_model("vit_giant_patch14_dinov2", depth=1, img_size=56, embed_dim=96, num_heads=2)
    torch.save(giant.state_dict(), tmp_path / "giant.pth")
    for source in (tmp_path, tmp_path / "giant.pth"):
        with pytest.raises(InputError, match="another model with a gated MLP, not BEiT"):
            get_model(source)


def test_a_vit_with_other_patches_and_another_grid_starts_a_model(tmp_path, caplog):
    # Breaks when the kernel is resized like a picture: features at the same content would change by its area.
    peer = hf_vit("Dinov2Model", VIT_SIZES | {"patch_size": 8})
    peer.save_pretrained(tmp_path)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.1, "num_classes": 0, "patch_size": 16}
    with pytest.raises(InputError, match=r"bias tables: build the model with .*--abs_pos_emb --disable_rel_pos_bias"):
        create_model("beit_tiny_patch16_224", pretrained=tmp_path, **sizes, img_size=64)
    sizes |= {"use_abs_pos_emb": True, "use_rel_pos_bias": False}
    with caplog.at_level("INFO"):
        ours = create_model("beit_tiny_patch16_224", pretrained=tmp_path, **sizes, img_size=128)
        create_model("beit_tiny_patch16_224", pretrained=tmp_path, **sizes, img_size=64)
    resized = caplog.messages[0], caplog.messages[1]
    assert "patches of 8 x 8 to 16 x 16 pixels" in resized[0]
    assert "8 x 8 to 4 x 4 patches" in resized[1]
    kernel = peer.embeddings.patch_embeddings.projection.weight.detach()
    assert torch.equal(ours.patch_embed.proj.weight, resample_patch_embed(kernel, [16, 16]))
    smooth = torch.nn.functional.interpolate(torch.randn(1, 3, 4, 4), 64, mode="bicubic")
    enlarged = torch.nn.functional.interpolate(smooth, 128, mode="bicubic")
    with torch.no_grad():
        theirs = peer.embeddings(smooth)[:, 1:]
        difference = (ours.embed(enlarged)[:, 1:] - theirs).norm() / theirs.norm()
    assert difference < 0.05


def test_timms_eva_giant_opens_with_its_heads(tmp_path):
    # 1408 channels make 22 heads of 64: features would be those of another model.
    peer = timm.create_model("eva_giant_patch14_224", depth=1, num_classes=3, img_size=28).eval()
    torch.nn.init.normal_(peer.blocks[0].attn.qkv.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    torch.save(peer.state_dict(), tmp_path / "eva.pth")
    images = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        theirs = peer.forward_features(images)
    model = get_model(tmp_path / "eva.pth")
    torch.testing.assert_close(model.get_intermediate_layers(images, n=1)[0], theirs, rtol=1e-3, atol=1e-3)
