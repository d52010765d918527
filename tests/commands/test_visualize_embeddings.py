"""``beit visualize embeddings``: whose features are drawn, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

import beit as library
from beit.__main__ import main as beit
from beit.commands import visualize
from beit.commands.settings import EmbeddingsConfig
from beit.commands.shards import write_shards
from beit.commands.visualize import embeddings
from beit.data.datasets import index_images
from beit.storage import save_checkpoint
from beit.visualization.embeddings import pca
from beit.zoo import create_model
from tests.shell import run

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Three classes of four images of the model's size, and a checkpoint."""
    folder = tmp_path_factory.mktemp("site")
    rng = np.random.default_rng(0)
    for name in ("apple", "pear", "plum"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    torch.manual_seed(0)
    model = create_model("beit_tiny_patch16_224_8k_vocab", vocab_size=16, **TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    save_checkpoint(folder / "model.pth", {"model": model.state_dict(), "args": {"model_kwargs": TINY}})
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """What the command hands to the drawing, in place of a picture."""
    calls = []
    monkeypatch.setattr(visualize, "draw_points", lambda *args: calls.append(args))
    return calls


def fails(arguments, capsys):
    """Runs a command that must refuse in one line, and returns it."""
    assert beit(["visualize", "embeddings", *map(str, arguments)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(("block", "pool"), [(-1, "mean"), (0, "cls")])
def test_each_class_has_its_images_features(site, drawn, block, pool):
    # Broken by features of another block or pool, and by points under another class's name.
    embeddings(
        EmbeddingsConfig(
            data_path=str(site / "images"), checkpoint=str(site / "model.pth"), block=block, pool=pool, batch_size=5
        )
    )
    paths = [str(site / "images" / name / f"{number}.png") for name in ("apple", "pear", "plum") for number in range(4)]
    features = library.extract_feat(str(site / "model.pth"), paths, layer=block, pool=pool)
    expected, _ = pca(features.double())
    (_, groups, _, _, others) = drawn[0]
    assert [name for name, _ in groups] == ["apple", "pear", "plum"]
    assert others is None
    torch.testing.assert_close(torch.cat([points for _, points in groups]), expected, atol=1e-4, rtol=1e-4)


def test_classes_in_shards_are_those_of_folders(site, drawn, tmp_path):
    # Broken by images that are looked for in files, or by classes that only folders have.
    pattern = write_shards(index_images(site / "images", tmp_path / "cache"), tmp_path / "shards", images_per_shard=5)
    for data_path in (str(site / "images"), pattern):
        embeddings(EmbeddingsConfig(data_path=data_path, checkpoint=str(site / "model.pth")))
    files, members = (groups for _, groups, *_ in drawn)
    assert [name for name, _ in members] == ["apple", "pear", "plum"]
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in zip(files, members, strict=True))


def test_few_images_are_taken_from_all_classes(site, drawn):
    embeddings(EmbeddingsConfig(data_path=str(site / "images"), checkpoint=str(site / "model.pth"), limit=6))
    assert [len(points) for _, points in drawn[0][1]] == [2, 2, 2]


def test_classes_that_are_too_many_are_the_rest(site, drawn, monkeypatch):
    few = visualize.group_by_class
    monkeypatch.setattr(visualize, "group_by_class", lambda labels, names: few(labels, names, most=2))
    embeddings(EmbeddingsConfig(data_path=str(site / "images"), checkpoint=str(site / "model.pth")))
    (_, groups, _, _, others) = drawn[0]
    assert [name for name, _ in groups] == ["apple", "pear"]
    assert others[0] == "1 other class"
    assert len(others[1]) == 4


def test_what_cannot_be_read_is_left_out_and_said(site, drawn, tmp_path, caplog):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        for number in range(3):
            image = (site / "images" / "plum" / f"{number}.png").read_bytes()
            (tmp_path / name / f"{number}.png").write_bytes(image)
    (tmp_path / "x" / "9.png").write_text("no image")
    embeddings(EmbeddingsConfig(data_path=str(tmp_path), checkpoint=str(site / "model.pth")))
    assert [len(points) for _, points in drawn[0][1]] == [3, 3]
    assert "9.png" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_path", "{site}/images/plum"], "has no classes"),
        (["--data_path", "{site}/nowhere"], "no such file or folder"),
        (["--data_path", ""], "--data_path is missing"),
        (["--block", "3"], "layer 3: the model has 3 blocks, numbered from 0"),
        (["--pool", "map"], "map"),
        (["--method", "umap"], "umap"),
        (["--size", "33"], "33 x 33 pixels"),
        (["--limit", "3", "--checkpoint", "{site}/nowhere.pth"], "3 images make no picture"),
        (["--seed", "-1", "--checkpoint", "{site}/nowhere.pth"], "--seed -1: must be between 0 and"),
        (["--device", "tpux", "--checkpoint", "{site}/nowhere.pth"], "--device tpux"),
        (["--checkpoint", ""], "no checkpoint is given"),
        (["-o", "a.eps"], ".png or .svg"),
    ],
)
def test_a_mistake_is_refused_in_one_line(site, capsys, arguments, message):
    given = [argument.format(site=site) for argument in arguments]
    whole = ["--data_path", site / "images", "--checkpoint", site / "model.pth", "-o", site / "a.png", *given]
    assert message in fails(whole, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "ending"), [("pca", "png"), ("tsne", "svg")])
def test_embeddings_as_a_whole_command(site, tmp_path, method, ending):
    output = tmp_path / "new" / f"picture.{ending}"
    run("-m", "beit", "visualize", "embeddings", "--data_path", site / "images", "--checkpoint", site / "model.pth",
        "--method", method, "--block", "1", "-o", output)  # fmt: skip
    if ending == "svg":
        assert "<!-- plum -->" in output.read_text()
    else:
        with Image.open(output) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 10
