"""The names of mmseg.apis: a checkpoint opened, images segmented, the result drawn."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as F

import semantic_segmentation
from beit.checkpoints.formats.segmentation import leaves_zero_out
from beit.config import read_command_line
from beit.data.preprocessing import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from beit.data.transforms import normalize
from beit.errors import InputError
from semantic_segmentation import Segmentor, build_segmentor, inference_model, init_model, show_result_pyplot
from semantic_segmentation.api import classes_of, settings_of
from semantic_segmentation.config import PredictConfig
from semantic_segmentation.data import ade20k_classes
from semantic_segmentation.predict import RECORDED

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "depth": 4, "num_heads": 2}
BIASES = {"use_rel_pos_bias": True, "use_abs_pos_emb": False}
COLOURS = [[200, 0, 0], [0, 200, 0], [0, 0, 200]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    segmentor = build_segmentor(
        **SIZES, **BIASES, out_indices=(0, 1, 2, 3), num_classes=3, channels=4, auxiliary_channels=0
    )
    for parameter in segmentor.parameters():
        if parameter.ndim > 1:  # as drawn, it would see one class everywhere
            nn.init.normal_(parameter, std=1.2 / parameter[0].numel() ** 0.5)
    path = tmp_path_factory.mktemp("api") / "segmentor.pth"
    recorded = {"image_size": [32, 32], "num_heads": 2, "labels": ["sky", "road", "tree"], "palette": COLOURS}
    torch.save({"model": segmentor.state_dict(), **recorded}, path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return init_model(checkpoint=checkpoint, device="cpu")


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_importing_the_package_does_without_torch():
    # Breaks when a name is imported eagerly.
    code = "import sys, semantic_segmentation; assert not {'torch', 'numpy'} & {*sys.modules}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="init_modle"):
        semantic_segmentation.init_modle  # noqa: B018
    assert all(hasattr(semantic_segmentation, name) for name in semantic_segmentation.__all__)


def test_a_checkpoint_opens_as_a_segmentor_in_evaluation_mode(model):
    assert isinstance(model, Segmentor)
    assert not model.training
    assert model.segment(torch.randn(2, 3, 32, 32)).shape == (2, 3, 32, 32)
    assert model.metadata["labels"] == ("sky", "road", "tree")


def test_a_config_describes_the_model(tmp_path, checkpoint, model):
    # Breaks when the config's model is not the one that is built, or the checkpoint is not loaded into it.
    settings = """
model_kwargs: {patch_size: 8, embed_dim: 8, depth: 4, num_heads: 2}
out_indices: [0, 1, 2, 3]
crop_size: 32
slide_stride: 20
head_channels: 4
auxiliary_channels: 0
layer_scale_init_value: 0.0
"""
    (tmp_path / "classes.txt").write_text("sky\nroad\ntree\n")
    (tmp_path / "tiny.yaml").write_text(f"{settings}classes: {tmp_path / 'classes.txt'}\n")
    images = torch.randn(1, 3, 32, 32)
    fresh = init_model(tmp_path / "tiny.yaml", device="cpu")
    assert fresh.segment(images).shape == (1, 3, 32, 32)
    loaded = init_model(tmp_path / "tiny.yaml", checkpoint, device="cpu")
    torch.testing.assert_close(loaded.segment(images), model.segment(images), rtol=0, atol=0)
    with pytest.raises(InputError, match="needs a checkpoint or a config"):
        init_model(device="cpu")


def test_images_of_every_kind_are_segmented(tmp_path, model):
    # Breaks when an image is not normalised, its axes change places, or one image comes back as a list.
    pixels = picture(32, 32)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    inputs = normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None], IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    expected = model.segment(inputs).argmax(dim=1)[0]
    assert len(expected.unique()) > 1
    kinds = (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(pixels),
        pixels,
        F.pil_to_tensor(Image.fromarray(pixels)),
    )
    for image in kinds:
        result = inference_model(model, image)
        assert (result == expected).all()
    results = inference_model(model, [*kinds, picture(40, 61)])
    assert [tuple(result.shape) for result in results] == [(32, 32)] * 5 + [(40, 61)]
    assert (results[2] == expected).all()
    with pytest.raises(InputError, match="cannot read the image"):
        inference_model(model, tmp_path / "missing.png")


def test_settings_change_how_an_image_is_segmented(model):
    image = picture(50, 70, seed=1)
    usual = inference_model(model, image)
    assert (inference_model(model, image, settings=settings_of(model)) == usual).all()
    assert (inference_model(model, image, settings=settings_of(model, test_mode="whole")) != usual).any()


def test_the_result_is_drawn_with_the_checkpoints_classes(tmp_path, model):
    # Breaks when the figure lacks a panel, or the legend names other classes or other colours.
    image = picture(32, 48)
    result = torch.zeros(32, 48, dtype=torch.uint8)
    result[:, 20:] = 2
    # As an array, which it was in mmsegmentation 0.x.
    drawn = {"opacity": 1.0, "title": "a scene", "out_file": tmp_path / "new" / "a.png"}
    figure = show_result_pyplot(model, image, result.numpy(), **drawn)
    assert [axes.get_title() for axes in figure.axes] == ["image", "prediction"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["tree", "sky"]  # the largest first
    with Image.open(tmp_path / "new" / "a.png") as file:
        drawn = {tuple(colour) for colour in np.asarray(file.convert("RGB")).reshape(-1, 3).tolist()}
    assert {(200, 0, 0), (0, 0, 200)} <= drawn
    assert (0, 200, 0) not in drawn
    with pytest.raises(InputError, match="the image is 32x48 pixels and its segmentation 48x32"):
        show_result_pyplot(model, image, result.T)


def segmentor_of(num_classes, img_size=(48, 32), **metadata):
    return SimpleNamespace(num_classes=num_classes, img_size=img_size, metadata=metadata)


def test_classes_are_those_of_the_file_then_of_the_checkpoint(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("sky 1 2 3\na road\n")
    recorded = {"labels": ("ground", "air"), "palette": ((9, 8, 7), (6, 5, 4))}
    given = classes_of(segmentor_of(2, **recorded), file)
    assert (given.names, given.colours[0]) == (("sky", "a road"), (1, 2, 3))
    own = classes_of(segmentor_of(2, **recorded))
    assert (own.names, own.colours) == (("ground", "air"), ((9, 8, 7), (6, 5, 4)))
    with pytest.raises(InputError, match=r"classes\.txt has 2 classes and the checkpoint 3"):
        classes_of(segmentor_of(3, **recorded), file)


def test_150_classes_without_names_are_ade20ks_and_others_numbers(caplog):
    assert classes_of(segmentor_of(150)) == ade20k_classes()
    numbered = classes_of(segmentor_of(3))
    assert numbered.names == ("class 0", "class 1", "class 2")
    assert len(set(numbered.colours)) == 3
    # names of another task, such as those of the ImageNet classes that the backbone was fine-tuned on
    assert not caplog.text
    assert classes_of(segmentor_of(3, labels=("tench",) * 1000)).names == numbered.names
    assert "1,000 names in the checkpoint, which has 3 classes: left out" in caplog.text


@pytest.mark.parametrize(
    ("metadata", "count", "expected"),
    [
        ({"reduce_zero_label": True}, 3, True),
        ({"reduce_zero_label": False}, 150, False),
        ({}, 150, True),  # a released checkpoint
        ({}, 3, False),
    ],
)
def test_label_maps_are_numbered_as_the_training_data(metadata, count, expected):
    assert leaves_zero_out(metadata, count) is expected


def test_images_are_segmented_as_the_run_tested_them():
    recorded = {"args": {"slide_stride": [24, 16], "image_scale": [256, 64]}}
    settings = settings_of(segmentor_of(3, **recorded), test_batch_size=7)
    assert (settings.crop, settings.stride, settings.image_scale) == ((48, 32), (24, 16), (256, 64))
    assert (settings.mode, settings.ratios, settings.flip, settings.batch_size) == ("slide", (1.0,), False, 7)
    assert settings.short_at_least == 0


TESTED = {
    "test_mode": "whole",
    "test_ratios": [0.5, 1.0],
    "test_flip": True,
    "test_short_at_least_crop": False,
}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ("whole", (0.5, 1.0), True, 0)),
        ({"test_mode": "slide", "test_flip": False}, ("slide", (0.5, 1.0), False, 0)),
        ({"test_short_at_least_crop": True}, ("whole", (0.5, 1.0), True, 32)),
        ({"test_ratios": (0.5, 2.0)}, ("whole", (0.5, 2.0), True, 32)),
        ({"test_ratios": (2.0,)}, ("whole", (2.0,), True, 0)),
    ],
)
def test_what_no_flag_says_is_as_the_run_tested(flags, expected):
    # Broken by defaults of our own in the place of what the checkpoint records.
    settings = settings_of(segmentor_of(3, args=TESTED), **flags)
    assert (settings.mode, settings.ratios, settings.flip, settings.short_at_least) == expected


def test_flags_can_say_what_the_run_did_not_do():
    words = "a.jpg --checkpoint x.pth --no_test_flip --test_mode slide --no_test_short_at_least_crop --test_ratios 1 2"
    config = read_command_line(PredictConfig, words.split(), "", "")
    settings = settings_of(segmentor_of(3, args=TESTED), **{name: getattr(config, name) for name in RECORDED})
    assert (settings.mode, settings.ratios, settings.flip, settings.short_at_least) == ("slide", (1.0, 2.0), False, 0)


def test_of_a_published_checkpoint_they_are_the_published_ones():
    settings = settings_of(segmentor_of(150, (640, 640)), test_ratios=(0.5, 1.0), test_flip=True)
    assert (settings.crop, settings.stride, settings.image_scale) == ((640, 640), (426, 426), (2560, 640))
    assert (settings.ratios, settings.flip, settings.short_at_least) == ((0.5, 1.0), True, 640)
