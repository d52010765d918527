"""``beit app`` behind its page: which checkpoints, what is shown of them, and what odd images do to it."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from beit.__main__ import main as beit
from beit.commands.app import LOOK, MASK, SEE, Page, after_click, find_examples, markup, segmentation
from beit.commands.app_models import find_checkpoints, open_exhibit
from beit.commands.settings import AppConfig
from beit.errors import InputError
from beit.inference import decoded, inference_model
from beit.visualization.attention import query_maps
from semantic_segmentation import build_segmentor, init_model
from semantic_segmentation import inference_model as inference_model_of_pixels
from tests.commands.test_visualize import TOKENS, site  # noqa: F401  (a fixture)
from tests.semantic_segmentation.test_api import BIASES, COLOURS, SIZES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def folder(site, tmp_path_factory):  # noqa: F811
    """What a demo leaves: runs of each kind, their tokenizer, images; and a link that leads out of it."""
    root = tmp_path_factory.mktemp("demo")
    for name, source in (
        ("pretrain", "tokens"),
        ("finetune", "classifier"),
        ("regression", "pixels"),
        ("without", "moved"),
    ):
        (root / name).mkdir()
        (root / name / "checkpoint-0.pth").write_bytes((site / f"{source}.pth").read_bytes())
    torch.manual_seed(0)
    heads = {"out_indices": (0, 1, 2, 3), "channels": 4, "auxiliary_channels": 0}
    segmentor = build_segmentor(**SIZES, **BIASES, **heads, num_classes=3)
    recorded = {"image_size": [32, 32], "num_heads": 2, "labels": ["sky", "road", "tree"], "palette": COLOURS}
    torch.save({"model": segmentor.state_dict(), **recorded}, root / "segmentor.pth")
    (root / "dvae").symlink_to(site / "dvae")
    (root / "link.pth").symlink_to(site / "bare.pth")
    (root / "images").symlink_to(site / "images")
    (root / "notes.pth").write_text("no checkpoint")
    return root


@pytest.fixture(scope="module")
def image(folder):
    return str(next((folder / "images").rglob("*.png")))


def exhibit(folder, name):
    return open_exhibit(find_checkpoints(str(folder))[name], "cpu")


PRETRAINED, CLASSIFIER = "pretrain/checkpoint-0.pth · pre-trained", "finetune/checkpoint-0.pth · classifier"


def test_only_models_inside_the_folder_are_listed(folder, site, tmp_path):  # noqa: F811
    (site / "dvae" / "checkpoint-1.pth").write_bytes((site / "dvae" / "pytorch_model.bin").read_bytes())
    assert list(find_checkpoints(str(folder))) == [
        CLASSIFIER,
        PRETRAINED,
        "regression/checkpoint-0.pth · pre-trained",
        "segmentor.pth · segmentor",
        "without/checkpoint-0.pth · pre-trained",
    ]
    assert list(find_checkpoints(str(folder / "segmentor.pth")).values()) == [str(folder / "segmentor.pth")]
    with pytest.raises(InputError, match="no checkpoint of a model"):
        find_checkpoints(str(tmp_path))
    with pytest.raises(InputError, match="dvae is a discrete VAE, not BEiT: a tokenizer"):
        find_checkpoints(str(folder / "dvae"))
    with pytest.raises(InputError, match="did you mean 'segmentor"):  # did you mean
        find_checkpoints(str(folder / "segmentr.pth"))
    page = Page(AppConfig(path=str(folder)))
    with pytest.raises(KeyError):
        page.exhibit(str(site / "bare.pth"))


def test_masked_patches_are_predicted_with_their_confidence(folder, image):
    shown, mask = exhibit(folder, PRETRAINED), np.zeros((4, 6), dtype=bool)
    assert shown.predict(decoded(image), mask, 1) == ([], "")
    mask[1, 2:5] = True
    pictures, score = shown.predict(decoded(image), mask, 1)
    titles = ["image", "masked", "tokens decoded", "predicted tokens decoded", "predictions in the image", "confidence"]
    assert [title for _, title in pictures] == titles
    assert score in [f"{right} of 3 tokens right" for right in range(4)]
    by_title = {title: np.asarray(picture) for picture, title in pictures}
    changed = (by_title["masked"] != by_title["image"]).any(axis=2)
    assert changed[8:16, 16:40].mean() > 0.9
    assert changed.sum() == changed[8:16, 16:40].sum()
    batch = shown.batch(decoded(image), mask)
    inputs = (batch["image"] / 255 - torch.tensor(shown.mean).view(3, 1, 1)) / torch.tensor(shown.std).view(3, 1, 1)
    logits = shown.model(inputs, batch["mask"], return_all_tokens=True)
    torch.testing.assert_close(shown.target.confidence(logits).exp(), logits.softmax(-1).amax(-1))
    assert logits.shape == (1, 24, TOKENS)


def test_a_target_without_confidence_is_drawn_without(folder, image):
    shown = exhibit(folder, "regression/checkpoint-0.pth · pre-trained")
    pictures, score = shown.predict(decoded(image), shown.blocks(8, 0), 1)
    assert [title for _, title in pictures] == ["image", "masked", "predicted pixels"]
    assert score.startswith("r2 ")


def test_without_its_tokenizer_attention_is_left_and_the_page_says_so(folder, image):
    shown = exhibit(folder, "without/checkpoint-0.pth · pre-trained")
    assert shown.target is None
    assert "--tokenizer is missing" in shown.missing
    assert shown.attend(decoded(image), np.zeros((4, 6), dtype=bool), (3, 5), 1, "all").size > (100, 50)
    given = open_exhibit(str(folder / "without/checkpoint-0.pth"), "cpu", str(folder / "dvae"))
    assert given.target is not None


def test_blocks_follow_number_and_seed(folder):
    shown = exhibit(folder, PRETRAINED)
    assert not shown.blocks(0, 0).any()
    assert 0 < shown.blocks(8, 0).sum() <= 8
    assert (shown.blocks(8, 0) == shown.blocks(8, 0)).all()
    assert any((shown.blocks(8, 0) != shown.blocks(8, seed)).any() for seed in range(1, 4))


def test_the_canvas_hides_masked_patches_and_frames_the_query(folder, image):
    shown, mask = exhibit(folder, PRETRAINED), np.zeros((4, 6), dtype=bool)
    mask[3, 5] = True
    picture = np.asarray(shown.canvas(decoded(image), mask, (1, 2)))
    height, width = picture.shape[0] // 4, picture.shape[1] // 6
    assert (np.abs(picture[3 * height :, 5 * width :].astype(int) - 127) <= 1).all()
    assert (picture[height, 2 * width : 3 * width] == (214, 94, 0)).all()
    assert not (picture[height - 1, 2 * width : 3 * width] == (214, 94, 0)).all()
    for row, column in ((0, 0), (1, 2), (3, 5)):
        assert shown.patch_at(column * width + width - 1, row * height + height - 1) == (row, column)
    assert shown.patch_at(picture.shape[1], picture.shape[0]) == (3, 5)


def test_the_attention_is_that_of_the_patch_block_and_head(folder, image, monkeypatch):
    from beit.commands import app_models

    drawn = []
    monkeypatch.setattr(app_models, "attention_rows", lambda *arguments: drawn.append(arguments) or ["rows"])
    monkeypatch.setattr(app_models, "pictures_figure", lambda rows, title: title)
    monkeypatch.setattr(app_models, "figure_image", lambda figure: figure)
    shown, mask = exhibit(folder, CLASSIFIER), np.zeros((4, 4), dtype=bool)
    assert shown.attend(decoded(image), mask, (2, 1), 0, "1") == "Attention in block 0"
    ((_, maps, queries, heads),) = drawn
    assert (queries, heads) == ([(2, 1)], [1])
    batch = shown.batch(decoded(image), mask)
    inputs = (batch["image"] / 255 - torch.tensor(shown.mean).view(3, 1, 1)) / torch.tensor(shown.std).view(3, 1, 1)
    expected = query_maps(shown.model.get_attention_maps(inputs, 0), [(2, 1)], (4, 4))[0]
    torch.testing.assert_close(maps, expected)


def test_classes_and_segmentation_are_those_of_the_commands(folder, image):
    shown = exhibit(folder, CLASSIFIER)
    top = shown.classify(decoded(image))
    assert list(top.items()) == inference_model(str(folder / "finetune/checkpoint-0.pth"), image)["top5"]
    assert shown.segmentation(decoded(image)) is None
    segmentor = exhibit(folder, "segmentor.pth · segmentor")
    assert segmentor.classify(decoded(image)) is None
    painted, legend = segmentor.segmentation(decoded(image))
    model = init_model(checkpoint=folder / "segmentor.pth", device="cpu")
    classes = inference_model_of_pixels(model, image)
    pixels = torch.from_numpy(np.asarray(decoded(image))).float()
    expected = (pixels + torch.tensor(COLOURS)[classes.long()]) / 2
    assert (torch.from_numpy(np.asarray(painted)) - expected).abs().max() <= 0.5
    assert dict(legend) == {name: tuple(COLOURS[["sky", "road", "tree"].index(name)]) for name, _ in legend}
    text = segmentation(painted, [("<b>sky", (1, 2, 3)), *legend])
    assert '<span style="border-color: rgb(1, 2, 3)">&lt;b&gt;sky</span>' in text


def test_a_large_image_is_segmented_smaller(folder, monkeypatch):
    from dataclasses import replace

    sizes = []
    segmentor = exhibit(folder, "segmentor.pth · segmentor")
    spy = replace(segmentor, segment=lambda image: sizes.append(image.size) or segmentor.segment(image))
    spy.segmentation(Image.new("RGB", (3000, 600)))
    assert sizes == [(1024, 205)]


@pytest.mark.parametrize(
    ("tool", "brush", "place", "painted"),
    [(MASK, 1, (1, 2), {(1, 2)}), (MASK, 2, (3, 5), {(3, 5)}), (MASK, 3, (0, 0), {(0, 0), (0, 1), (1, 0), (1, 1)})],
)
def test_a_brush_paints_a_square(tool, brush, place, painted):
    empty = np.zeros((4, 6), dtype=bool)
    mask, query = after_click(place, empty, (0, 0), tool, brush)
    assert {tuple(map(int, patch)) for patch in np.argwhere(mask)} == painted
    assert query == (0, 0)
    assert not empty.any()
    assert not after_click(place, mask, query, SEE, brush)[0].any()
    assert after_click(place, mask, query, LOOK, brush) == (mask, place)


ODD = {
    "cmyk.jpg": lambda: Image.new("CMYK", (40, 30), (10, 200, 30, 0)),
    "alpha.png": lambda: Image.new("RGBA", (40, 30), (255, 0, 0, 0)),
    "deep.png": lambda: Image.fromarray(np.full((30, 40), 40000, dtype=np.uint16)),
    "tiny.png": lambda: Image.new("RGB", (1, 1), "red"),
    "long.png": lambda: Image.new("RGB", (4000, 1), "blue"),
    "huge.png": lambda: Image.new("RGB", (6000, 5000), "green"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_odd_images_are_shown(folder, tmp_path, name):
    ODD[name]().save(tmp_path / name)
    page, path = Page(AppConfig(path=str(folder))), str(tmp_path / name)
    for checkpoint in (PRETRAINED, "segmentor.pth · segmentor"):
        mask, query, *_ = page.start(checkpoint, path)
        canvas, predicted, attention = page.draw(checkpoint, path, mask, query, 2, 0, "mean")
        assert min(canvas.size) >= 448
        assert ("confidence" in predicted) == (checkpoint == PRETRAINED)
        assert attention.size > (100, 50)


def test_an_image_that_cannot_be_read_is_told_on_the_page(folder, tmp_path):
    import gradio

    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    page = Page(AppConfig(path=str(folder)))
    with pytest.raises(gradio.Error, match=r"cannot read the image .*broken\.png"):
        page.start(PRETRAINED, str(tmp_path / "broken.png"))
    with pytest.raises(gradio.Error, match="--mask_patches needs a pre-trained model"):
        page.blocks(CLASSIFIER, 4, 0)


def test_without_an_image_or_between_two_checkpoints_nothing_is_drawn(folder, image):
    page = Page(AppConfig(path=str(folder)))
    mask, query, *_ = page.start(PRETRAINED, None)
    assert page.draw(PRETRAINED, None, mask, query, 1, 0, "mean") == (None, "", None)
    assert page.draw(CLASSIFIER, image, mask, query, 1, 0, "mean") == (None, "", None)


def test_examples_are_the_given_images_or_the_folders(folder, site, tmp_path):  # noqa: F811
    assert len(find_examples(AppConfig(path=str(folder)))) == 5
    one = str(site / "images" / "c" / "1.png")
    assert find_examples(AppConfig(path=str(folder), images=(one,))) == [one]
    assert find_examples(AppConfig(path=str(tmp_path))) == []
    assert find_examples(AppConfig(path=str(folder / "segmentor.pth"))) == []


def test_pictures_become_html():
    assert markup([], "") == ""
    text = markup([(Image.new("RGB", (2, 2)), "image")], "1 of 2 tokens right")
    assert text.count('src="data:image/png;base64,') == text.count("<figure>") == 1
    assert "<figcaption>image</figcaption>" in text
    assert "<p>1 of 2 tokens right</p>" in text


def test_what_is_missing_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert beit(["app", str(folder / "nowhere")]) == 2  # before Gradio is imported
    assert capsys.readouterr().err.startswith("error: there is no checkpoint ")
    assert beit(["app", str(folder)]) == 2
    assert "error: beit app needs Gradio: pip install gradio" in capsys.readouterr().err
