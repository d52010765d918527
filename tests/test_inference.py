"""A model put to use: predictions, features, and the images they are made of."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from beit.__main__ import main
from beit.commands.settings import BiasConfig, ConvertConfig, PredictConfig
from beit.commands.shards import write_shards
from beit.data.classification import ClassificationEvalTransform
from beit.data.datasets import ImageDataset
from beit.data.index import index_files, index_images
from beit.errors import InputError
from beit.inference import batch_size_of, decoded, extract_feat, inference_model
from beit.modeling import VisionTransformer, VisionTransformerForMaskedImageModeling
from beit.storage import save_checkpoint

SMALL = {
    "img_size": (32, 48),
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "init_values": 0.1,
    "use_abs_pos_emb": False,
    "use_rel_pos_bias": True,
}
RECORDED = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "crop_pct": 0.7, "interpolation": "bilinear"}
LABELS = ("ant", "bee", "cat", "dog", "emu", "fox")


def make_classifier(num_classes=6, **overrides):
    torch.manual_seed(0)
    model = VisionTransformer(num_classes=num_classes, **{**SMALL, **overrides})
    nn.init.normal_(model.head.weight, std=0.3)  # a fresh head answers nearly the same for all images
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make_classifier()


@pytest.fixture(scope="module")
def picture():
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((90, 70), Image.Resampling.BICUBIC)


@pytest.fixture
def checkpoint(model, tmp_path):
    args = {"input_size": [32, 48], "model_kwargs": {"num_heads": 2}}
    content = {"model": model.state_dict(), "args": args, "labels": list(LABELS), **RECORDED}
    save_checkpoint(tmp_path / "model.pth", content)
    return tmp_path / "model.pth"


def naive_logits(model, picture, mean=(0.5,) * 3, std=(0.5,) * 3, **transform):
    view = ClassificationEvalTransform((32, 48), **transform)(picture)["image"]
    pixels = (view / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    return model(pixels[None])[0]


def test_a_prediction_is_the_softmax_of_the_prepared_image(model, picture):
    # Broken by another crop, normalisation or order of the classes, and by dropout or gradients left on.
    found = inference_model(model, picture)
    expected = naive_logits(model, picture).softmax(0)
    order = expected.argsort(descending=True)[:5].tolist()
    assert found["class"] == order[0]
    assert found["name"] == f"class {order[0]}"
    assert [name for name, _ in found["top5"]] == [f"class {number}" for number in order]
    assert [score for _, score in found["top5"]] == pytest.approx(expected[order].tolist(), rel=1e-5)
    assert found["score"] == found["top5"][0][1]


def test_what_the_checkpoint_records_is_used(checkpoint, model, picture):
    # Broken by a mean, crop or interpolation that is not the one of training, and by labels out of order.
    found = inference_model(checkpoint, picture)
    kept = {key: RECORDED[key] for key in ("crop_pct", "interpolation")}
    expected = naive_logits(model, picture, RECORDED["mean"], RECORDED["std"], **kept).softmax(0)
    assert not torch.allclose(expected, naive_logits(model, picture).softmax(0), atol=1e-3)
    assert found["score"] == pytest.approx(expected.max().item(), rel=1e-5)
    assert found["name"] == LABELS[int(expected.argmax())]
    opened = make_classifier()
    opened.metadata = {**RECORDED, "labels": LABELS}
    assert inference_model(opened, picture) == found
    other = inference_model(opened, picture, metadata={"mean": (0.5,) * 3, "std": (0.5,) * 3})
    expected = naive_logits(model, picture, **kept).softmax(0)  # all else stays as recorded
    assert (other["score"], other["name"]) == (
        pytest.approx(expected.max().item(), rel=1e-5),
        LABELS[expected.argmax()],
    )


@pytest.mark.parametrize(
    ("key", "value"), [("mean", "x"), ("mean", (1, 2)), ("std", (0, 0, 0)), ("std", 0), ("labels", ["a"])]
)
def test_metadata_that_do_not_fit_are_one_line(checkpoint, picture, key, value):
    with pytest.raises(InputError, match=f"metadata: {key} .* does not fit the model"):
        inference_model(checkpoint, picture, metadata={key: value})


def test_a_model_of_another_library_is_one_line(picture):
    with pytest.raises(InputError, match="a Linear is no model of this library"):
        inference_model(nn.Linear(2, 2), picture)


def test_imagenets_names_are_known(picture):
    found = inference_model(make_classifier(1000), picture)
    assert "class" not in found["name"]
    large = inference_model(make_classifier(21841), picture)
    assert "class" not in large["name"]


def test_several_images_are_a_list_and_one_is_not(model, picture, monkeypatch):
    monkeypatch.setattr("beit.inference.TOKENS_AT_ONCE", 60)  # two images of 25
    others = [picture.rotate(angle) for angle in (0, 90, 180, 270, 45)]
    together = inference_model(model, others, topk=2)
    assert len(together) == 5
    for image, prediction in zip(others, together, strict=True):
        alone = inference_model(model, image, topk=2)
        assert prediction["class"] == alone["class"]
        assert prediction["score"] == pytest.approx(alone["score"], rel=1e-4)
        assert len(prediction["top2"]) == 2
    assert isinstance(inference_model(model, [picture]), list)


def test_more_names_than_classes(picture):
    assert len(inference_model(make_classifier(3), picture)["top5"]) == 3


def test_every_kind_of_image_is_the_same_image(model, picture, tmp_path):
    picture.save(tmp_path / "a.png")
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = [str(tmp_path / "a.png"), tmp_path / "a.png", array, array / 255, tensor, tensor.float() / 255]
    expected = inference_model(model, picture)
    for kind in kinds:
        assert inference_model(model, kind) == expected
    for kind in (torch.stack([tensor, tensor]), np.stack([array, array])):
        both = inference_model(model, kind)
        assert [prediction["class"] for prediction in both] == [expected["class"]] * 2
        assert both[1]["score"] == pytest.approx(expected["score"], rel=1e-4)
    grey = np.asarray(picture.convert("L"))
    assert decoded(grey).tobytes() == decoded(torch.tensor(grey)[None]).tobytes()


def unusual(picture):
    """The same picture in modes and orientations that trip decoders up, with the tolerance of each."""
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: turn it by 90 degrees clockwise to view it
    grey = picture.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    yield "cmyk.tif", picture.convert("CMYK"), picture, {}, 3
    yield "deep.png", deep, grey.convert("RGB"), {}, 1
    yield "palette.png", grey.convert("P"), grey.convert("RGB"), {}, 1
    yield "side.png", picture.transpose(Image.Transpose.ROTATE_90), picture, {"exif": exif}, 1
    yield "alpha.png", picture.convert("RGBA"), picture, {}, 1


@pytest.mark.parametrize("number", range(5))
def test_unusual_images_are_shown_as_a_viewer_shows_them(number, picture, tmp_path):
    # Broken by convert("RGB") alone: 16-bit greys turn white, photographs lie on their side.
    name, image, expected, options, tolerance = list(unusual(picture))[number]
    image.save(tmp_path / name, **options)
    with Image.open(tmp_path / name) as opened:
        assert opened.size == image.size
        from_object = np.asarray(decoded(opened)).astype(int)
    from_path = np.asarray(decoded(tmp_path / name)).astype(int)
    assert (from_object == from_path).all()
    assert np.abs(from_path - np.asarray(expected).astype(int)).max() <= tolerance


def make_pretrained():
    torch.manual_seed(0)
    shared = {**SMALL, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
    return VisionTransformerForMaskedImageModeling(vocab_size=16, **shared)


@pytest.mark.parametrize("make", [make_classifier, make_pretrained])
def test_features_are_those_of_the_block(make, picture):
    # Broken by a layer counted otherwise, the class token among the patches, or rows and columns swapped.
    model = make()
    images = [picture, picture.rotate(90)]
    views = [ClassificationEvalTransform((32, 48))(image)["image"] / 127.5 - 1 for image in images]
    with torch.no_grad():
        blocks = model.eval().get_intermediate_layers(torch.stack(views))
    for layer in (0, 1, 2, -1, -3):
        tokens = blocks[layer]
        mean, cls = tokens[:, 1:].mean(1), tokens[:, 0]
        torch.testing.assert_close(extract_feat(model, images, layer), mean)
        torch.testing.assert_close(extract_feat(model, images, layer, pool="cls"), cls)
        torch.testing.assert_close(extract_feat(model, images, layer, "cls_mean"), torch.cat([cls, mean], 1))
    grid = extract_feat(model, images, pool="map")
    assert grid.shape == (2, 32, 4, 6)
    torch.testing.assert_close(grid[:, :, 1, 2], blocks[-1][:, 1 + 6 + 2])
    assert extract_feat(model, picture).shape == (1, 32)


def test_the_model_is_left_as_it_was(picture):
    # Broken by a model that trains on in evaluation mode, or by dropout during a prediction.
    model = make_classifier(drop_rate=0.5)
    model.train()
    model.blocks[1].eval()
    first, second = inference_model(model, picture), inference_model(model, picture)
    assert first == second
    assert model.training
    assert model.blocks[0].training
    assert not model.blocks[1].training
    assert not extract_feat(model, picture).requires_grad
    assert torch.is_grad_enabled()


def test_a_model_in_half_precision(picture, model):
    score = inference_model(make_classifier().to(torch.bfloat16), picture)["score"]
    assert score == pytest.approx(inference_model(model, picture)["score"], abs=0.05)


def backbone_of_a_segmentor():
    model = VisionTransformer(num_classes=0, **SMALL)
    model.metadata = {"segmentation": True}
    return model


MISTAKES = {
    "no such file": (lambda: inference_model(make_classifier(), "nowhere.jpg"), "nowhere.jpg: no such file"),
    "a folder": (lambda: inference_model(make_classifier(), "/"), "is a folder"),
    "no image": (lambda: inference_model(make_classifier(), []), "no image"),
    "a number": (lambda: inference_model(make_classifier(), 3), "not of type int"),
    "one channel": (lambda: inference_model(make_classifier(in_chans=1), torch.rand(3, 8, 8)), "not of 1 channel"),
    "normalised": (lambda: inference_model(make_classifier(), torch.randn(3, 32, 48)), "normalised already"),
    "numbers of 64 bits": (lambda: inference_model(make_classifier(), torch.ones(3, 8, 8).long()), "uint8"),
    "channels last": (lambda: inference_model(make_classifier(), torch.rand(8, 8, 3)), "(3, height, width)"),
    "a vector": (lambda: inference_model(make_classifier(), np.zeros(3)), "(height, width, 3)"),
    "a pre-trained model": (lambda: inference_model(make_pretrained(), "a.jpg"), "run_class_finetuning.py"),
    "no head": (lambda: inference_model(VisionTransformer(num_classes=0, **SMALL), "a.jpg"), "no classes"),
    "a segmentor": (lambda: inference_model(backbone_of_a_segmentor(), "a.jpg"), "semantic_segmentation predict"),
    "no classes wanted": (lambda: inference_model(make_classifier(), "a.jpg", topk=0), "topk"),
    "no such model": (lambda: inference_model("nowhere.pth", "a.jpg"), "nowhere.pth"),
    "a block too many": (lambda: extract_feat(make_classifier(), "a.jpg", layer=3), "3 blocks, numbered from 0"),
    "a block too few": (lambda: extract_feat(make_classifier(), "a.jpg", layer=-4), "layer -4"),
    "unknown pool": (lambda: extract_feat(make_classifier(), "a.jpg", pool="maen"), "did you mean 'mean'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_said_in_one_line(mistake):
    call, part = MISTAKES[mistake]
    with pytest.raises(InputError) as caught:
        call()
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# The command


def test_predict_writes_names_and_scores(checkpoint, picture, tmp_path, capsys):
    picture.save(tmp_path / "a.png")
    picture.rotate(180).save(tmp_path / "b.png")
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    assert main(["predict", *paths, "--model", str(checkpoint), "--topk", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = inference_model(checkpoint, paths, topk=2)
    assert lines[::3] == paths
    assert lines[1] == f"  {expected[0]['score']:6.1%}  {expected[0]['name']}"
    assert main(["predict", *paths, "--checkpoint", str(checkpoint), "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["image"] for entry in printed] == paths
    assert [entry["name"] for entry in printed] == [prediction["name"] for prediction in expected]
    assert printed[0]["score"] == pytest.approx(expected[0]["score"], rel=1e-4)
    assert len(printed[0]["top5"]) == 5


def test_predict_takes_folders_and_leaves_out_what_cannot_be_read(checkpoint, picture, tmp_path, capsys):
    # Breaks when one broken file among many costs the answers for those after it, or is passed over in silence.
    (tmp_path / "in").mkdir()
    for name in ("a.png", "c.png"):
        picture.save(tmp_path / "in" / name)
    (tmp_path / "in" / "b.png").write_bytes(b"cut short")
    assert main(["predict", str(tmp_path / "in"), "--model", str(checkpoint), "--json"]) == 2
    told = capsys.readouterr()
    assert [Path(json.loads(line)["image"]).name for line in told.out.splitlines()] == ["a.png", "c.png"]
    assert "1 of 3 images could not be read" in told.err.splitlines()[-1]
    assert "b.png" in told.err.splitlines()[-1]


def test_an_image_whose_output_is_no_number_is_named_and_costs_no_other(tmp_path, capsys):
    # Breaks when NaN is written as a score, which is no JSON.
    content = {"model": make_classifier(in_chans=5).state_dict(), "image_size": [32, 48]}
    save_checkpoint(tmp_path / "a.pth", content)
    for name, scale in (("good", 1.0), ("huge", 1e30)):
        np.save(tmp_path / f"{name}.npy", np.full((32, 48, 5), scale, dtype=np.float32))
    images = [str(tmp_path / f"{name}.npy") for name in ("good", "huge")]
    assert main(["predict", *images, "--checkpoint", str(tmp_path / "a.pth"), "--json"]) == 2
    told = capsys.readouterr()
    assert [json.loads(line)["image"] for line in told.out.splitlines()] == images[:1]
    assert "huge.npy: the model's output is NaN or infinite" in told.err
    (tmp_path / "list.txt").write_text("good.npy\nhuge.npy\n")
    words = [str(tmp_path / "list.txt"), "--checkpoint", str(tmp_path / "a.pth"), "-o", str(tmp_path / "a.npz")]
    assert main(["features", *words]) == 2
    assert np.load(tmp_path / "a.npz")["paths"].tolist() == images[:1]
    with pytest.raises(InputError, match="image 1: the model's output is NaN"):
        inference_model(tmp_path / "a.pth", images)
    with pytest.raises(InputError, match="is an array, and the model is for 8-bit RGB"):
        ImageDataset(index_files(images), ClassificationEvalTransform(32))


@pytest.mark.slow
def test_predict_finds_the_same_however_it_reads(checkpoint, picture, tmp_path, capsys, monkeypatch):
    # Broken by answers under other images' names, where batches come from several processes or some are left out.
    monkeypatch.setattr("beit.inference.TOKENS_AT_ONCE", 60)
    (tmp_path / "in").mkdir()
    for number in range(7):  # of a size each
        picture.rotate(30 * number).crop((0, 0, 40 + 5 * number, 60)).save(tmp_path / "in" / f"{number}.png")
    expected = {str(path): inference_model(checkpoint, path) for path in sorted((tmp_path / "in").iterdir())}
    for number in (2, 3):  # a whole batch
        (tmp_path / "in" / f"{number}.png").write_bytes(b"cut short")
        del expected[str(tmp_path / "in" / f"{number}.png")]
    (tmp_path / "list.txt").write_text("".join(f"in/{number}.png\n" for number in range(7)))
    pattern = write_shards(index_images(tmp_path / "in"), tmp_path / "shards", 4)
    for given, *flags in (["in"], ["in", "--num_workers", "0"], ["in", "--batch_size", "3"], ["list.txt"], [pattern]):
        words = [str(tmp_path / given), "--checkpoint", str(checkpoint), "--json", *flags]
        assert main(["predict", *words]) == 2
        told = capsys.readouterr()
        assert "2 of 7 images could not be read" in told.err.splitlines()[-1]
        found = [json.loads(line) for line in told.out.splitlines()]
        if given != pattern:  # which has names of its own
            assert [entry["image"] for entry in found] == list(expected)
        assert [entry["name"] for entry in found] == [prediction["name"] for prediction in expected.values()]
        scores = [prediction["score"] for prediction in expected.values()]
        assert [entry["score"] for entry in found] == pytest.approx(scores, rel=1e-4)


def test_larger_images_come_in_smaller_batches(model):
    assert batch_size_of(make_classifier(img_size=224, patch_size=16)) == 32
    assert batch_size_of(make_classifier(img_size=640, patch_size=16)) == 3
    assert batch_size_of(make_classifier(img_size=1024, patch_size=16)) == 1


def test_a_name_cannot_act_on_the_terminal(checkpoint, picture, tmp_path, capsys):
    picture.save(tmp_path / "\x1b[2J.png")
    (tmp_path / "\x1b]0;x\x07.png").write_bytes(b"cut short")
    assert main(["predict", str(tmp_path), "--checkpoint", str(checkpoint)]) == 2
    told = capsys.readouterr()
    assert "\\x1b[2J.png" in told.out
    assert "\\x1b]0;x\\x07.png" in told.err
    assert not set("\x1b\x07") & set(told.out + told.err)


@pytest.mark.parametrize("command", ["predict PICTURE --checkpoint", "inspect", "visualize bias -o OUT --checkpoint"])
def test_commands_take_the_weights_that_are_asked_for(command, model, picture, tmp_path, capsys):
    # Broken where a command reads what comes first: the first of these cannot be used.
    picture.save(tmp_path / "a.png")
    good, bad = model.state_dict(), {name: tensor * torch.nan for name, tensor in model.state_dict().items()}
    prefixed = {f"student.{name}": t for name, t in bad.items()} | {f"teacher.{name}": t for name, t in good.items()}
    places = {"PICTURE": str(tmp_path / "a.png"), "OUT": str(tmp_path / "b.png")}
    words = [places.get(word, word) for word in command.split()]
    for content, flags in (
        ({"model": bad, "model_ema": good}, ["--model_key", "model_ema"]),
        ({"model": prefixed}, ["--model_prefix", "teacher."]),
    ):
        save_checkpoint(tmp_path / "a.pth", {**content, "args": {"input_size": [32, 48]}})
        assert main([*words, str(tmp_path / "a.pth")]) == 2
        assert main([*words, str(tmp_path / "a.pth"), *flags]) == 0


def test_settings_of_commands_made_in_python_are_read_like_flags(tmp_path):
    assert PredictConfig(images=[tmp_path], topk="3").topk == 3
    assert ConvertConfig(checkpoint=tmp_path).checkpoint == str(tmp_path)
    for make in (lambda: PredictConfig(topk=0), lambda: BiasConfig(overwrite="maybe"), lambda: ConvertConfig(to="tim")):
        with pytest.raises(InputError, match=r"^--(topk 0: must be|overwrite: cannot use|to: .*did you mean 'timm')"):
            make()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["predict", "CHECKPOINT"], "no checkpoint is given"),
        (["predict", "--checkpoint", "m.pth"], "IMAGES"),
        (["predict", "nowhere.png", "--checkpoint", "CHECKPOINT"], "nowhere.png: no such file or folder"),
        (["predict", "CHECKPOINT", "--checkpoint", "CHECKPOINT"], "1 of 1 images could not be read"),
        (["predict", "CHECKPOINT", "--checkpoint", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_status_2(arguments, part, checkpoint, capsys):
    assert main([str(checkpoint) if argument == "CHECKPOINT" else argument for argument in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert part in errors[0]
