"""``beit features``: the vectors of a folder, a list and shards, against those of images taken one by one."""

import numpy as np
import pytest
import torch
from PIL import Image

from beit.__main__ import main as beit
from beit.commands.shards import write_shards
from beit.data.index import index_images
from beit.inference import extract_feat
from beit.storage import save_checkpoint
from beit.zoo import create_model

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Two classes of three images of different sizes, and a model that was only pre-trained."""
    folder = tmp_path_factory.mktemp("site")
    rng = np.random.default_rng(0)
    for number in range(6):
        path = folder / "images" / "ab"[number // 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40 + 7 * number, 60), Image.Resampling.BICUBIC).save(path)
    torch.manual_seed(0)
    model = create_model("beit_tiny_patch16_224_8k_vocab", vocab_size=16, **TINY)
    torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    args = {"input_size": 32, "model_kwargs": TINY, "imagenet_default_mean_and_std": True}
    save_checkpoint(folder / "model.pth", {"model": model.state_dict(), "args": args})
    return folder


def written(site, data, output, *flags, status=0):
    words = [str(data), "--checkpoint", str(site / "model.pth"), "-o", str(output), *flags]
    assert beit(["features", *words]) == status
    return np.load(output)


@pytest.mark.parametrize(("block", "pool", "width"), [(-1, "mean", 32), (1, "cls_mean", 64)])
def test_features_are_those_of_images_taken_one_by_one(site, tmp_path, block, pool, width):
    # Broken by another crop or mean than the checkpoint's, vectors of length 1, or batches out of order.
    flags = ("--block", str(block), "--pool", pool, "--batch_size", "4", "--num_workers", "1")
    found = written(site, site / "images", tmp_path / "out.npz", *flags)
    paths = [str(path) for path in sorted((site / "images").glob("*/*"))]
    assert found["paths"].tolist() == paths
    alone = [extract_feat(site / "model.pth", path, block, pool).numpy() for path in paths]
    assert found["features"].dtype == np.float32
    assert found["features"].shape == (6, width)
    np.testing.assert_allclose(found["features"], np.concatenate(alone), rtol=1e-4, atol=1e-5)
    assert found["labels"].tolist() == [0, 0, 0, 1, 1, 1]
    assert found["class_names"].tolist() == ["a", "b"]


def test_any_listing_gives_the_same(site, tmp_path):
    paths = sorted((site / "images").glob("*/*"))
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    pattern = write_shards(index_images(site / "images"), tmp_path / "shards", 4)
    folder, listed, shards = (
        written(site, data, tmp_path / "out.npz") for data in (site / "images", tmp_path / "list.txt", pattern)
    )
    assert np.array_equal(folder["features"], listed["features"])
    assert np.array_equal(folder["features"], shards["features"])
    assert np.array_equal(folder["paths"], listed["paths"])
    assert "labels" not in listed
    assert shards["labels"].tolist() == folder["labels"].tolist()


def test_a_damaged_image_costs_its_own_row_and_no_other(site, tmp_path, capsys):
    folder = tmp_path / "images"
    for path in (site / "images").glob("*/*"):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    whole = written(site, folder, tmp_path / "whole.npz")
    (folder / "a" / "1.png").write_bytes(b"cut short")
    found = written(site, folder, tmp_path / "out.npz", status=2)
    assert "1 of 6 images could not be read: " in capsys.readouterr().err.splitlines()[-1]
    kept = [0, 2, 3, 4, 5]
    assert found["paths"].tolist() == whole["paths"][kept].tolist()
    assert found["labels"].tolist() == [0, 0, 1, 1, 1]
    np.testing.assert_allclose(found["features"], whole["features"][kept], rtol=1e-4, atol=1e-5)


def test_a_file_of_others_is_not_replaced_and_an_own_one_is(site, tmp_path, capsys):
    output = tmp_path / "out.npz"
    for _ in range(2):
        written(site, site / "images", output)
    np.savez(output, mine=np.zeros(3))
    words = ["--checkpoint", "nowhere.pth", "-o", str(output)]
    assert beit(["features", str(site / "images"), *words]) == 2  # found before the checkpoint is
    assert "out.npz exists and was not written by beit" in capsys.readouterr().err
    assert np.load(output).files == ["mine"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ((), "-o is missing"),
        (("-o", "features.txt"), "-o features.txt: give the file to write, ending in .npz"),
        (("-o", "OUT", "--block", "3"), "3 blocks, numbered from 0"),
        (("-o", "OUT", "--pool", "maen"), "did you mean 'mean'"),
        (("-o", "OUT", "--input_size", "33"), "33 x 33 pixels"),
        (("-o", "OUT", "--batch_size", "0"), "--batch_size 0"),
    ],
)
def test_mistakes_are_said_in_one_line(site, tmp_path, capsys, flags, part):
    given = [str(tmp_path / "out.npz") if flag == "OUT" else flag for flag in flags]
    assert beit(["features", str(site / "images"), "--checkpoint", str(site / "model.pth"), *given]) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert part in error
    assert not (tmp_path / "out.npz").exists()
