"""``beit visualize attention``, ``distance`` and ``bias``: what is drawn of which model, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from beit.__main__ import main as beit
from beit.commands import visualize_attention
from beit.commands.settings import AttentionConfig, BiasConfig, ViewerOptions
from beit.commands.shards import write_shards
from beit.commands.visualize_attention import (
    attention,
    attention_rows,
    bias,
    distances_of,
    parse_heads,
    parse_query,
)
from beit.commands.visualize_inputs import open_viewer
from beit.data.datasets import index_images
from beit.data.index import image_files
from beit.errors import InputError
from beit.storage import save_checkpoint
from beit.tokenizers.dvae import DiscreteVAE, save_dvae
from beit.visualization.attention import mean_distances, patch_distances
from beit.zoo import create_model
from semantic_segmentation.modeling import build_segmentor
from tests.shell import run

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def random_model(name, **options):
    torch.manual_seed(0)
    model = create_model(name, **{**TINY, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return model


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Three images, and checkpoints of several kinds."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(folder / "images" / f"{number}.png")
    models = {
        "pretrained": random_model("beit_tiny_patch16_224_8k_vocab", vocab_size=16),
        "pixels": random_model("beit_tiny_patch16_224_8k_vocab", vocab_size=192),
        "classifier": random_model("beit_tiny_patch16_224", num_classes=3),
        "positions": random_model("beit_tiny_patch16_224", num_classes=3, use_rel_pos_bias=False, use_abs_pos_emb=True),
    }
    for name, model in models.items():
        save_checkpoint(folder / f"{name}.pth", {"model": model.state_dict(), "args": {"model_kwargs": TINY}})
    save_checkpoint(folder / "other.pth", {"conv1.weight": torch.zeros(3)})
    (folder / "text.png").write_text("no image")
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """What the commands hand to the drawing, in place of a picture."""
    calls = []
    for name in ("draw_pictures", "draw_heads"):
        monkeypatch.setattr(visualize_attention, name, lambda *args, **options: calls.append((args, options)))
    return calls


def fails(arguments, capsys):
    """Runs a command that must refuse in one line, and returns it."""
    assert beit(["visualize", *map(str, arguments)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("checkpoint", ["pretrained", "pixels", "classifier", "positions"])
@pytest.mark.parametrize("size", [None, (32, 64)])
def test_the_pictures_are_the_models_attention(site, drawn, checkpoint, size):
    # Broken by another block, another head, another patch, an image that is not normalised, or the class token's row.
    image = str(site / "images" / "1.png")
    source = str(site / f"{checkpoint}.pth")
    attention(
        AttentionConfig(
            images=(image,), checkpoint=source, block=1, heads=("mean", "1"), query=("2,3", "0,1"), input_size=size
        )
    )
    viewer = open_viewer(ViewerOptions(checkpoint=source, input_size=size))
    height, width = viewer.model.patch_embed.grid_size
    pixels = viewer.view(image)[0].float() / 255
    maps = viewer.model.get_attention_maps((pixels[None] - 0.5) / 0.5, 1)[0]  # (heads, N+1, N+1)
    ((_, rows, _), _) = drawn[0]
    assert [len(row) for row in rows] == [3, 3]
    for row, (y, x) in zip(rows, [(2, 3), (0, 1)], strict=True):
        expected = maps[:, 1 + y * width + x, 1:].view(2, height, width)
        torch.testing.assert_close(row[0].image, pixels)
        torch.testing.assert_close(row[1].heat, expected.mean(0))
        torch.testing.assert_close(row[2].heat, expected[1])
        for picture in row:
            assert picture.marks[0][:2] == ((x + 0.5) / width, (y + 0.5) / height)
        assert row[2].title == f"head 1, max {expected[1].max().item():.1%}"


def test_hidden_patches_are_drawn_and_change_the_attention(site, drawn):
    for patches in (0, 6):
        attention(
            AttentionConfig(
                images=(str(site / "images"),), checkpoint=str(site / "pretrained.pth"), heads=("mean",),
                mask_patches=patches, limit=1,
            )
        )  # fmt: skip
    (seen, _), (hidden, _) = ((call[0][1][0][0], call) for call in drawn)
    grey = (hidden.image == 0.5).all(dim=0) & (seen.image != 0.5).any(dim=0)
    assert grey.sum() > 64 * 2
    first, second = (call[0][1][0][1].heat for call in drawn)
    assert not torch.allclose(first, second)


def test_each_images_rows_begin_with_its_name(site, drawn):
    attention(AttentionConfig(images=(str(site / "images"),), checkpoint=str(site / "pixels.pth"), limit=2))
    ((_, rows, _), options) = drawn[0]
    assert len(rows) == 6  # three queries an image
    assert options["headings"] == {0: "images/0.png", 3: "images/1.png"}


def test_one_map_a_query_stands_in_one_row_several_in_a_row_each():
    maps, image = torch.rand(3, 2, 4, 4), torch.rand(3, 8, 8)
    queries = [(0, 0), (1, 1), (3, 2)]
    (row,) = attention_rows(image, maps, queries, [None])
    assert [picture.title.split(",")[0] for picture in row] == ["image", "patch 0", "patch 1", "patch 3"]
    assert len(row[0].marks) == 3
    assert [len(row) for row in attention_rows(image, maps, queries, [None, 0, 1])] == [4, 4, 4]
    wide = attention_rows(image, torch.rand(1, 12, 4, 4), queries[:1], [None, *range(12)])
    assert [len(row) for row in wide] == [7, 7]


def test_heads_and_patches_are_read():
    assert parse_heads(["all"], 3) == [0, 1, 2]
    assert parse_heads(["mean", "2", "all"], 3) == [None, 2, 0, 1]
    assert parse_query("3,15") == (3, 15)
    for wrong in ("3", "3,", "-1,2", "3x4", "1,2,3"):
        with pytest.raises(InputError, match="ROW,COLUMN"):
            parse_query(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block", "3"], "layer 3: the model has 3 blocks, numbered from 0"),
        (["--block", "-4"], "layer -4: the model has 3 blocks"),
        (["--heads", "2"], "--heads 2: the model has heads 0 to 1"),
        (["--heads", "most"], "--heads most: the model has heads 0 to 1"),
        (["--query", "4,0"], "--query 4,0 is outside the image's 4 x 4 patches"),
        (["--query", "here"], "--query here: give patches as ROW,COLUMN"),
        (["--size", "36x64"], "36 x 64 pixels cannot be cut into patches of 8 x 8"),
        (["--limit", "0"], "--limit 0"),
        (["--mask_patches", "4"], "--mask_patches needs a pre-trained model"),
        (["--mask_patches", "17", "--checkpoint", "{site}/pretrained.pth"], "--mask_patches 17: num_mask_patches 17"),
        (["--mask_patches", "1", "--checkpoint", "{site}/pretrained.pth", "--size", "8"], "--mask_patches 1: no mask"),
        (["--mask_patches", "-5", "--checkpoint", "{site}/nowhere.pth"], "--mask_patches -5: must be 0 or more"),
        (["--device", "tpux", "--checkpoint", "{site}/nowhere.pth"], "--device tpux: use cuda, cpu or mps"),
        (["--query", "here", "--checkpoint", "{site}/nowhere.pth"], "--query here"),
        (["-o", "picture.jpeg"], "picture.jpeg: let its name end in .png or .svg"),
        (["--checkpoint", "{site}/other.pth"], "holds no BEiT"),
        (["--checkpoint", "{site}/nowhere.pth"], "nowhere.pth"),
        (["--checkpoint", ""], "no checkpoint is given"),
        (["{site}/text.png"], "cannot read the image"),
        (["{site}/nowhere.png"], "nowhere.png: no such file or folder"),
    ],
)
def test_a_mistake_is_refused_in_one_line(site, capsys, arguments, message):
    given = [argument.format(site=site) for argument in arguments]
    images = [] if given[0].endswith(".png") else [site / "images"]
    command = ["attention", *images, "--checkpoint", site / "classifier.pth"] if images else ["attention"]
    if not images:
        given += ["--checkpoint", str(site / "classifier.pth")]
    assert message in fails([*command, *given], capsys)


@pytest.mark.parametrize("to", ["huggingface", "timm", "unilm"])
@pytest.mark.parametrize("checkpoint", ["pretrained", "classifier"])
def test_other_libraries_files_give_the_same_pictures(site, tmp_path, drawn, checkpoint, to):
    source = site / f"{checkpoint}.pth"
    converted = tmp_path / ("folder" if to == "huggingface" else "file.pth")
    assert beit(["convert", str(source), str(converted), "--to", to]) == 0
    for path in (source, converted):
        for command in (
            ["attention", str(site / "images"), "--size", "32x48"],
            ["distance", str(site / "images")],
            ["bias"],
        ):
            assert beit(["visualize", *command, "--checkpoint", str(path)]) == 0
    ours, theirs = drawn[:3], drawn[3:]
    for first, second in zip(ours[0][0][1], theirs[0][0][1], strict=True):
        assert all(torch.equal(a.heat, b.heat) for a, b in zip(first[1:], second[1:], strict=True))
    assert torch.equal(ours[1][0][1], theirs[1][0][1])
    for first, second in zip(ours[2][0][1], theirs[2][0][1], strict=True):
        assert all(torch.equal(a.heat, b.heat) for a, b in zip(first, second, strict=True))


def test_of_a_segmentor_the_backbone_is_drawn(site, tmp_path, drawn):
    sizes = {**TINY, "depth": 4, "use_rel_pos_bias": True}
    segmentor = build_segmentor(**sizes, out_indices=(0, 1, 2, 3), num_classes=4, channels=8)
    args = {"out_indices": [0, 1, 2, 3], "crop_size": 32, "model_kwargs": {"num_heads": 2}}
    save_checkpoint(tmp_path / "segmentor.pth", {"model": segmentor.state_dict(), "args": args})
    attention(AttentionConfig(images=(str(site / "images"),), checkpoint=str(tmp_path / "segmentor.pth"), limit=1))
    ((_, rows, _), _) = drawn[0]
    assert [len(row) for row in rows] == [4, 4, 4]


def test_the_distance_is_the_mean_over_images(site):
    viewer = open_viewer(ViewerOptions(checkpoint=str(site / "classifier.pth"), input_size=(32, 48)))
    paths = [str(site / "images" / f"{number}.png") for number in range(3)]
    found = distances_of(viewer, paths)
    distances = patch_distances((4, 6), (8, 8))
    for block in range(3):
        expected = []
        for path in paths:
            inputs = (viewer.view(path).float() / 255 - 0.5) / 0.5
            expected.append(mean_distances(viewer.model.get_attention_maps(inputs, block), distances)[0])
        torch.testing.assert_close(found[block], torch.stack(expected).mean(0))


def test_images_in_shards_are_looked_at_too(site, drawn, tmp_path):
    pattern = write_shards(index_images(site / "images", tmp_path / "cache"), tmp_path / "shards")
    checkpoint = str(site / "classifier.pth")
    for images in (str(site / "images"), pattern):
        attention(AttentionConfig(images=(images,), checkpoint=checkpoint, limit=2))
    (files, _), (members, options) = ((rows, options) for (_, rows, _), options in drawn)
    assert all(
        torch.equal(a.image, b.image) for pair in zip(files, members, strict=True) for a, b in zip(*pair, strict=True)
    )
    assert list(options["headings"].values()) == ["shards-000000.tar/00000000.png", "shards-000000.tar/00000001.png"]
    viewer = open_viewer(ViewerOptions(checkpoint=checkpoint))
    found = [distances_of(viewer, image_files([images], 9)) for images in (str(site / "images"), pattern)]
    assert torch.equal(*found)


def test_distances_are_written_out(site, drawn, capsys):
    assert beit(["visualize", "distance", str(site / "images"), "--checkpoint", str(site / "pretrained.pth")]) == 0
    lines = capsys.readouterr().out.splitlines()
    ((_, values, _, _, reference), _) = drawn[0]
    assert [line.split()[:2] for line in lines] == [["block", "0"], ["block", "1"], ["block", "2"]]
    assert [float(line.split()[3]) for line in lines] == pytest.approx(values.mean(1).tolist(), abs=0.051)
    assert [float(word) for word in lines[1].split()[-2:]] == pytest.approx(values[1].tolist(), abs=0.051)
    assert reference[1] == pytest.approx(patch_distances((4, 4), (8, 8)).mean().item())


@pytest.mark.parametrize(
    ("checkpoint", "names"), [("pretrained", ["all blocks"]), ("classifier", ["block 0", "block 1", "block 2"])]
)
def test_a_row_a_table_and_a_column_a_head(site, drawn, checkpoint, names):
    bias(BiasConfig(checkpoint=str(site / f"{checkpoint}.pth")))
    ((_, rows, _), options) = drawn[0]
    assert options["row_names"] == names
    assert [[tuple(picture.heat.shape) for picture in row] for row in rows] == [[(7, 7)] * 2] * len(names)
    pictures = [picture for row in rows for picture in row]
    most = max(picture.heat.abs().max().item() for picture in pictures)
    assert all(picture.limits == (-most, most) for picture in pictures)  # of all rows alike: they share the bar
    model = open_viewer(ViewerOptions(checkpoint=str(site / f"{checkpoint}.pth"))).model
    table = (model.rel_pos_bias or model.blocks[0].attn).relative_position_bias_table
    named, numbers = pictures[1].caption.split("\n")
    assert named.split() == ["c→p", "p→c", "c→c"]
    assert [float(word.replace("−", "-")) for word in numbers.split()] == pytest.approx(
        table[-3:, 1].tolist(), abs=6e-3
    )


def test_tables_are_resized_on_demand(site, drawn):
    bias(BiasConfig(checkpoint=str(site / "pretrained.pth"), input_size=(48, 64)))
    assert tuple(drawn[0][0][1][0][0].heat.shape) == (11, 15)


def test_a_model_without_tables_is_refused_in_one_line(site, capsys):
    assert "has no relative position bias" in fails(["bias", "--checkpoint", site / "positions.pth"], capsys)
    assert ".png or .svg" in fails(["bias", "--checkpoint", site / "pretrained.pth", "-o", "a"], capsys)


def test_a_tokenizers_folder_is_named_for_what_it_is(tmp_path, capsys):
    save_dvae(tmp_path, DiscreteVAE(image_size=16, num_tokens=8, codebook_dim=8, num_layers=1, hidden_dim=8))
    assert f"{tmp_path} is a discrete VAE, not BEiT: a tokenizer" in fails(["bias", "--checkpoint", tmp_path], capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "command"),
    [
        (
            "svg",
            ("attention", "{site}/images/0.png", "{site}/images/1.png", "--query", "0,0", "2,3", "--size", "32x64"),
        ),
        ("png", ("attention", "{site}/images", "--heads", "mean", "--block", "0", "--mask_patches", "5")),
        ("svg", ("distance", "{site}/images", "--limit", "2")),
        ("png", ("bias",)),
    ],
)
def test_whole_commands(site, tmp_path, command, ending):
    output = tmp_path / "new" / f"picture.{ending}"
    words = [word.format(site=site) for word in command]
    run("-m", "beit", "visualize", *words, "--checkpoint", site / "pretrained.pth", "-o", output)
    if ending == "svg":
        assert "pretrained.pth" in output.read_text()
    else:
        with Image.open(output) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 10
