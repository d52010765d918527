"""``beit visualize reconstruct`` and ``curves``: commands on tiny models, and what they refuse."""

import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from beit.__main__ import main as beit
from beit.commands.shards import write_shards
from beit.commands.visualize import open_pretrained, reconstruct_files
from beit.config import to_plain
from beit.data.datasets import index_images
from beit.data.index import image_files, spread
from beit.data.shards import add_member
from beit.errors import InputError
from beit.storage import load_checkpoint, save_checkpoint
from beit.tasks.pretraining import PretrainingConfig, build_model
from beit.tokenizers.dvae import DiscreteVAE, save_dvae
from beit.zoo import create_model
from tests.shell import run

TOKENS, CPU = 16, torch.device("cpu")
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SETTINGS = PretrainingConfig(
    model="beit_tiny_patch16_224_8k_vocab",
    model_kwargs=TINY,
    input_size=(32, 48),
    second_input_size=(16, 24),
    discrete_vae_type="customized",
    num_mask_patches=8,
    min_mask_patches_per_block=2,
)


def save_run(path, settings, outputs, **more):
    torch.manual_seed(0)
    model = build_model(settings, outputs)
    save_checkpoint(path, {"model": model.state_dict(), "args": to_plain(settings), **more})
    return path


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Images, a tokenizer, and checkpoints of pre-training on its tokens and on pixels."""
    folder = tmp_path_factory.mktemp("site")
    rng = np.random.default_rng(0)
    for name in ("a/1", "a/2", "b/1", "b/2", "c/1"):
        path = folder / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    dvae = DiscreteVAE(image_size=(16, 24), num_tokens=TOKENS, codebook_dim=8, num_layers=2, hidden_dim=8)
    save_dvae(folder / "dvae", dvae)
    tokens = replace(SETTINGS, discrete_vae_weight_path=str(folder / "dvae"))
    save_run(folder / "tokens.pth", tokens, TOKENS, target="visual tokens")
    pixels = replace(SETTINGS, target="pixels")
    save_run(folder / "pixels.pth", pixels, 192, target="pixels normalised per patch")
    save_run(folder / "features.pth", pixels, 192, target="a teacher's features")
    save_run(folder / "hog.pth", replace(SETTINGS), 192, target="HOG of 9 directions")
    registered = {"args": {**to_plain(pixels), "target": "hog"}, "target": "HOG of 9 directions"}
    save_checkpoint(folder / "registered.pth", {**load_checkpoint(folder / "hog.pth"), **registered})
    moved = replace(SETTINGS, discrete_vae_weight_path="elsewhere/dvae")
    save_run(folder / "moved.pth", moved, TOKENS, target="visual tokens")
    save_run(folder / "elsewhere.pth", SETTINGS, TOKENS)
    classifier = create_model("beit_tiny_patch16_224", img_size=32, num_classes=3, **TINY)
    save_checkpoint(folder / "classifier.pth", {"model": classifier.state_dict(), "args": {"model": "beit_tiny"}})
    save_checkpoint(folder / "bare.pth", build_model(SETTINGS, TOKENS).state_dict())
    (folder / "text.png").write_text("no image")
    return folder


def fails(arguments, capsys):
    """Runs a command that must refuse in one line, and returns it."""
    assert beit(["visualize", *map(str, arguments)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("checkpoint", "columns"),
    [
        (
            "tokens.pth",
            ["image", "masked", "tokens decoded", "predicted tokens decoded", "predictions in the image"],
        ),
        ("pixels.pth", ["image", "masked", "predicted pixels"]),
    ],
)
def test_whatever_a_run_predicted_is_drawn(site, checkpoint, columns):
    config, model, target = open_pretrained(site / checkpoint, "", CPU)
    paths = image_files([str(site / "images")], 3)
    panels, captions = reconstruct_files(paths, config, model, target)
    assert list(panels) == columns
    assert [tuple(images.shape[:2]) for images in panels.values()] == [(3, 3)] * len(columns)
    assert len(captions) == 3
    assert (panels["masked"][0] == 0.5).all(dim=0).sum() >= 64 * SETTINGS.min_mask_patches_per_block
    again, _ = reconstruct_files(paths, config, model, target)
    other, _ = reconstruct_files(paths, config, model, target, seed=1)
    assert torch.equal(panels["masked"], again["masked"])
    assert not torch.equal(panels["masked"], other["masked"])


def test_a_tokenizer_elsewhere_is_given_by_hand(site):
    with pytest.raises(InputError, match="--tokenizer is missing"):
        open_pretrained(site / "elsewhere.pth", "", CPU)
    _, model, target = open_pretrained(site / "elsewhere.pth", str(site / "dvae"), CPU)
    assert model.vocab_size == target.output_size == TOKENS


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("features.pth", "was trained to predict a teacher's features, which this command cannot draw"),
        ("hog.pth", "was trained to predict HOG of 9 directions, which this command cannot draw"),
        ("registered.pth", "was trained to predict HOG of 9 directions, which this command cannot draw"),
        (
            "moved.pth",
            "--tokenizer is missing: the folder of the tokenizer the model was trained with; elsewhere/dvae, ",
        ),
        ("classifier.pth", "has nothing to reconstruct: needed is"),
        ("bare.pth", "80 rows, no square, and no image size"),
        ("nowhere.pth", "nowhere.pth"),
        ("images", "images"),
        ("text.png", "text.png"),
    ],
)
def test_what_holds_nothing_to_reconstruct_is_refused_in_one_line(site, capsys, checkpoint, message):
    assert message in fails(["reconstruct", "--checkpoint", site / checkpoint, "--images", site / "images"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "{site}/nowhere.png"], "nowhere.png: no such file or folder"),
        (["--images", "{site}/text.png"], "cannot read the image"),
        (["--images", "{site}/images", "-o", "{site}/a.gif"], "let its name end in .png or .svg"),
        (["--images", "{site}/images", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--images", "{site}/dvae"], "dvae"),
        (["--images", "{site}/images", "--device", "tpux"], "--device tpux"),
    ],
)
def test_wrong_images_and_outputs_are_refused_in_one_line(site, capsys, arguments, message):
    given = [argument.format(site=site) for argument in arguments]
    assert message in fails(["reconstruct", "--checkpoint", site / "pixels.pth", *given], capsys)


def test_of_a_folder_images_at_even_distances_are_shown(site):
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 8) == [0, 1, 2]
    shown = image_files([str(site / "images")], 3)
    assert [path.split("/")[-2] for path in shown] == ["a", "a", "b"]
    assert image_files([str(site / "text.png"), str(site / "images")], 2)[0] == str(site / "text.png")


def test_images_in_shards_are_drawn_as_those_in_files(site, tmp_path, capsys):
    # Broken by a shard's path that is taken for an image, or by other images than those of the folder.
    pattern = write_shards(index_images(site / "images", tmp_path / "cache"), tmp_path / "shards", images_per_shard=2)
    config, model, target = open_pretrained(site / "pixels.pth", "", CPU)
    files, members = (image_files([path], 3) for path in (str(site / "images"), pattern))
    assert [str(member).rpartition(".tar/")[2] for member in members] == [
        "00000000.png",
        "00000001.png",
        "00000003.png",
    ]
    ours, theirs = (reconstruct_files(images, config, model, target)[0] for images in (files, members))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    command = ["reconstruct", "--checkpoint", site / "pixels.pth", "--images"]
    assert beit(["visualize", *map(str, [*command, pattern, "-o", tmp_path / "drawn.png"])]) == 0
    assert (tmp_path / "drawn.png").exists()
    assert "no-such-00.tar (and 3 more)" in fails([*command, f"{tmp_path}/no-such-{{00..03}}.tar"], capsys)
    with tarfile.open(tmp_path / "damaged.tar", "w") as archive:
        add_member(archive, "7.jpg", b"no image")
    assert "damaged.tar/7.jpg" in fails([*command, tmp_path / "damaged.tar"], capsys)


def write_logs(folder):
    for name, last in (("first", 1.0), ("second", 2.0)):
        (folder / name).mkdir()
        entries = [{"epoch": epoch, "train_loss": 4 - epoch * last, "train_lr": 0.1} for epoch in range(3)]
        (folder / name / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_curves_of_runs_are_overlaid_and_metrics_chosen(tmp_path):
    write_logs(tmp_path)
    output = tmp_path / "new" / "curves.svg"
    assert beit(["visualize", "curves", *(str(tmp_path / run) for run in ("first", "second")), "--metrics", "loss",
                 "-o", str(output)]) == 0  # fmt: skip
    svg = output.read_text()
    assert "<!-- first train -->" in svg
    assert "<!-- second train -->" in svg
    assert "<!-- lr -->" not in svg


def test_a_metric_that_no_log_has_and_an_unknown_ending_are_refused(tmp_path, capsys):
    write_logs(tmp_path)
    assert "did you mean 'loss'" in fails(["curves", tmp_path / "first", "--metrics", "losss"], capsys)
    assert ".png or .svg" in fails(["curves", tmp_path / "first", "-o", "a.pdf"], capsys)
    (tmp_path / "log.txt").write_text('{"epoch": 0, "n_parameters": 5, "train_loss": null}\n')
    assert "nothing to draw" in fails(["curves", tmp_path, "-o", tmp_path / "a.png"], capsys)
    (tmp_path / "log.txt").write_text('{"epoch": "x", "train_loss": 1.0}\n')
    assert "is not a run's log" in fails(["curves", tmp_path, "-o", tmp_path / "a.png"], capsys)


@pytest.mark.parametrize("command", ["curves", "reconstruct", "attention", "distance", "bias", "embeddings"])
def test_a_picture_takes_the_place_of_no_photograph(tmp_path, capsys, command):
    # Breaks when the output is looked at after the work, or not at all: nothing else that is given here exists.
    photo = tmp_path / "photo.png"
    Image.new("RGB", (4, 4)).save(photo)
    before = photo.read_bytes()
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": 1.0}\n{"epoch": 1, "train_loss": 0.5}\n')
    first = {"curves": [tmp_path], "attention": [photo], "distance": [photo]}.get(command, [])
    more = {"embeddings": ["--data_path", tmp_path], "reconstruct": ["--images", photo]}.get(command, [])
    more += [] if command == "curves" else ["--checkpoint", photo]
    assert "photo.png exists and was not written by beit" in fails([command, *first, *more, "-o", photo], capsys)
    assert photo.read_bytes() == before
    if command == "curves":
        for overwrite in (["--overwrite"], []):  # then it is ours
            assert beit(["visualize", command, str(tmp_path), "-o", str(photo), *overwrite]) == 0
        assert photo.read_bytes() != before


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["tokens.pth", "pixels.pth"])
def test_reconstruct_as_a_whole_command(site, tmp_path, checkpoint):
    output = tmp_path / "new" / "picture.png"
    run("-m", "beit", "visualize", "reconstruct", "--checkpoint", site / checkpoint, "--images", site / "images",
        "--limit", "2", "-o", output)  # fmt: skip
    with Image.open(output) as picture:
        assert np.asarray(picture.convert("RGB")).std() > 20


@pytest.mark.slow
def test_curves_as_a_whole_command(tmp_path):
    write_logs(tmp_path)
    run("-m", "beit", "visualize", "curves", tmp_path / "first", tmp_path / "second", "-o", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 300


def test_patches_are_filled_in_over_several_passes_where_the_model_is_sure_of_some(site, tmp_path, capsys):
    def status(checkpoint, output, *flags):
        files = ("--checkpoint", site / checkpoint, "--images", site / "images", "-o", tmp_path / output)
        return beit(["visualize", "reconstruct", *map(str, files), *flags])

    assert status("tokens.pth", "4.png", "--steps", "4") == 0
    assert (tmp_path / "4.png").is_file()
    assert status("pixels.pth", "p.png", "--steps", "4") == 2
    assert "pixels normalised per patch have no confidence: fill in the patches in one step" in capsys.readouterr().err


def test_a_checkpoint_without_settings_is_drawn_with_a_tokenizer_that_fits(site, tmp_path):
    square = replace(SETTINGS, input_size=32, second_input_size=16)
    file = tmp_path / "bare.pth"
    save_checkpoint(file, build_model(square, TOKENS).state_dict())
    run, model, target = open_pretrained(file, str(site / "dvae"), CPU)
    panels, _ = reconstruct_files(image_files([str(site / "images")], 2), run, model, target)
    assert len(panels) == 5
    assert 0.3 < (panels["masked"] == 0.5).all(dim=1).float().mean() < 0.5
    with pytest.raises(InputError, match="--tokenizer is missing"):
        open_pretrained(file, "", CPU)
    save_dvae(tmp_path / "dvae", DiscreteVAE(16, num_tokens=TOKENS + 1, codebook_dim=8, num_layers=2, hidden_dim=8))
    with pytest.raises(InputError, match="not the tokenizer of this model"):
        open_pretrained(file, str(tmp_path / "dvae"), CPU)
