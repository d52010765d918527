"""Teachers of every library give the features that their own library computes, on images prepared as it would."""

import re
from functools import partial

import pytest
import timm
import torch
import transformers
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models.vision_transformer import checkpoint_filter_fn

from beit.errors import InputError
from beit.modeling import VisionTransformer, VisionTransformerForMaskedImageModeling
from beit.storage import save_checkpoint
from beit.teachers import Teacher, load_teacher

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
HALF = torch.full((3, 1, 1), 0.5)


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def channels(values):
    return torch.tensor(values).view(3, 1, 1)


@pytest.mark.parametrize(
    ("kind", "mean", "std"),
    [("clip", OPENAI_CLIP_MEAN, OPENAI_CLIP_STD), ("dino", IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)],
)
def test_timm_teachers_give_the_targets_of_the_official_code(golden, kind, mean, std):
    stored = torch.load(golden / "v2" / "teacher_small.pt", weights_only=True)[kind]
    config, clip = stored["config"], kind == "clip"
    model = timm.models.VisionTransformer(
        img_size=config["img"],
        patch_size=config["patch"],
        embed_dim=config["width"],
        depth=config["layers"],
        num_heads=config["heads"],
        num_classes=config["output_dim"] if clip else 0,
        pre_norm=clip,
        norm_layer=partial(torch.nn.LayerNorm, eps=config["layer_norm_eps"]),
        act_layer="quick_gelu" if clip else "gelu",
    )
    weights = {f"visual.{name}" if clip else name: tensor for name, tensor in stored["state_dict"].items()}
    model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)
    tokens = (lambda images: model.head(model.forward_features(images))) if clip else model.forward_features
    teacher = Teacher(kind, model, tokens, img_size=(64, 64), grid=(4, 4), mean=mean, std=std)
    assert (teacher.dim, teacher.grid) == (config["output_dim"], (4, 4))
    features = teacher((stored["preprocessed"] + 1) / 2)
    torch.testing.assert_close(features.flatten(1, 2), stored["target"], atol=1e-5, rtol=1e-5)


def timm_folder(folder, architecture, **arguments):
    model = timm.create_model(architecture, **arguments)
    timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return model.eval()


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "eva02_base_patch14_224", "vit_base_patch16_clip_224.openai"])
def test_a_folder_of_timm(name, images, tmp_path):
    # Breaks with class tokens taken for patches, another mean, or a CLIP tower without its projection.
    arguments = {**SIZES, "num_classes": 7}
    model = timm_folder(tmp_path / "teacher", name, **arguments)
    teacher = load_teacher(str(tmp_path / "teacher"))
    config = timm.data.resolve_data_config(model=model)
    tokens = model.forward_features((images - channels(config["mean"])) / channels(config["std"]))
    expected = (model.head(tokens) if "clip" in name else tokens)[:, 1:]
    assert teacher.dim == (7 if "clip" in name else 24)
    torch.testing.assert_close(teacher(images).flatten(1, 2), expected, atol=1e-5, rtol=1e-5)


def save_with_images(model, folder):
    model.eval().save_pretrained(folder)
    transformers.ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)


@pytest.mark.parametrize("registers", [0, 3])
def test_a_folder_of_transformers(images, tmp_path, registers):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    save_with_images(model, tmp_path)
    expected = model(pixel_values=(images - 0.5) / 0.25).last_hidden_state[:, 1 + registers :]
    torch.testing.assert_close(load_teacher(str(tmp_path))(images).flatten(1, 2), expected, atol=1e-5, rtol=1e-5)


def test_clip_of_transformers_is_projected_like_its_class_token(images, tmp_path):
    config = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=12,
    )  # fmt: skip
    model = transformers.CLIPVisionModelWithProjection(config)
    save_with_images(model, tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert (teacher.dim, teacher.grid) == (12, (4, 4))
    normalised = (images - 0.5) / 0.25
    class_token = teacher._tokens(normalised)[:, 0]
    torch.testing.assert_close(class_token, model(pixel_values=normalised).image_embeds, atol=1e-5, rtol=1e-5)
    assert torch.equal(teacher(images).flatten(1, 2), teacher._tokens(normalised)[:, 1:])


@pytest.mark.parametrize("masked", [True, False])
def test_a_checkpoint_of_our_own(images, masked, tmp_path):
    kind = VisionTransformerForMaskedImageModeling if masked else VisionTransformer
    model = kind(**SIZES, **({"vocab_size": 5} if masked else {"num_classes": 5})).eval()
    save_checkpoint(tmp_path / "own.pth", {"model": model.state_dict(), "args": {"model_kwargs": {"num_heads": 2}}})
    teacher = load_teacher(str(tmp_path / "own.pth"))
    tokens = model.forward_blocks(model.embed((images - HALF) / HALF))[0][:, 1:]
    expected = (model.norm if masked else model.fc_norm)(tokens)
    torch.testing.assert_close(teacher(images).flatten(1, 2), expected, atol=1e-5, rtol=1e-5)


def test_other_sizes_and_grids(images, tmp_path):
    timm_folder(tmp_path, "vit_base_patch16_224", **SIZES, num_classes=0)
    teacher = load_teacher(str(tmp_path))
    assert teacher(images, grid=(6, 3)).shape == (2, 6, 3, 24)
    flat = torch.full((1, 3, 48, 80), 0.3)  # resized, it is the same picture
    torch.testing.assert_close(teacher(flat), teacher(flat[..., :32, :32]), atol=1e-5, rtol=1e-5)


def test_a_teacher_stays_frozen(images, tmp_path):
    timm_folder(tmp_path, "vit_base_patch16_224", **SIZES, num_classes=0)
    teacher = torch.nn.Sequential(load_teacher(str(tmp_path))).train()
    assert not any(module.training for module in teacher[0].modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(images.requires_grad_()).requires_grad


def test_what_cannot_teach_is_refused_in_one_line(tmp_path):
    timm_folder(tmp_path / "resnet", "resnet10t", num_classes=0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "vit"}')
    for name, message in {
        str(tmp_path / "resnet"): "has no grid of patches",
        str(tmp_path / "empty"): "holds no model.safetensors",
        str(tmp_path / "broken"): "cannot be opened: ",
        str(tmp_path / "missing.pth"): "there is no checkpoint",
        "vit_base_patch16_224.dinoo": "cannot be opened: Invalid pretrained tag (dinoo)",
        "vitt_base_patch16_224": "no teacher 'vitt_base_patch16_224' (did you mean 'vit_base_patch16_224",
    }.items():
        with pytest.raises(InputError, match=re.escape(message)) as failure:
            load_teacher(name)
        assert "\n" not in str(failure.value)
