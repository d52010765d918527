"""`beit demo --quick`, which is `make demo` on a small budget: all it promises is there, and it can be run again."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.shell import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    return folder, run("-m", "beit", "demo", "--quick", "--output_dir", folder).stderr


def last_entry(log: Path) -> dict:
    return json.loads(log.read_text().splitlines()[-1])


def test_it_leaves_logs_pictures_and_a_summary_that_agree(demo):
    folder, _ = demo
    summary = json.loads((folder / "summary.json").read_text())
    tokenizer, pretraining = (last_entry(folder / run / "log.txt") for run in ("dvae", "pretrain"))
    assert summary["codebook_perplexity"] == tokenizer["test_perplexity"]
    assert summary["masked_token_accuracy"] == pretraining["test_mlm_acc"]
    assert summary["most_frequent_token_accuracy"] == pretraining["test_most_frequent_acc"]
    assert summary["accuracy_ratio"] == pytest.approx(
        pretraining["test_mlm_acc"] / pretraining["test_most_frequent_acc"]
    )
    assert summary["accuracy_ok"] == (summary["accuracy_ratio"] >= 3)
    assert summary["perplexity_ok"] == (summary["codebook_perplexity"] >= 25.6)
    for picture in ("curves.png", "reconstructions.png", "dvae/reconstructions.png"):
        with Image.open(folder / picture) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 20


def test_it_says_what_it_found_and_whether_that_is_enough(demo):
    _, said = demo
    assert "masked-token accuracy on held-out images: " in said
    assert "codebook perplexity: " in said
    assert said.count("reached)") + said.count("reached; ") >= 2


def test_held_out_images_are_not_training_images(demo):
    folder, _ = demo
    training, held_out = (
        {path.read_bytes() for path in (folder / "images" / split).rglob("*.jpg")} for split in ("train", "held_out")
    )
    assert len(training) > 100
    assert len(held_out) > 20
    assert not training & held_out


def test_run_again_it_makes_and_trains_nothing_anew(demo):
    folder, _ = demo
    before = {path: path.stat().st_mtime_ns for path in (folder / "images").rglob("*.jpg")}
    weights = (folder / "dvae" / "checkpoint-0.pth").stat().st_mtime_ns
    summary = (folder / "summary.json").read_text()
    said = run("-m", "beit", "demo", "--quick", "--output_dir", folder).stderr
    assert "step" not in [word for line in said.splitlines() if "Epoch [" in line for word in line.split()]
    assert {path: path.stat().st_mtime_ns for path in (folder / "images").rglob("*.jpg")} == before
    assert (folder / "dvae" / "checkpoint-0.pth").stat().st_mtime_ns == weights
    assert (folder / "summary.json").read_text() == summary


def test_any_checkpoint_and_images_can_be_drawn(demo, tmp_path):
    folder, _ = demo
    images = sorted((folder / "images" / "held_out").rglob("*.jpg"))[:2]
    checkpoint, output = folder / "pretrain" / "checkpoint-0.pth", tmp_path / "out.png"
    run("-m", "beit", "visualize", "reconstruct", "--checkpoint", checkpoint, "--images", *images, "-o", output)
    with Image.open(output) as picture:
        assert np.asarray(picture.convert("RGB")).std() > 20


def test_another_budget_does_not_go_on_in_the_same_folder(demo):
    folder, _ = demo
    refused = run("-m", "beit", "demo", "--output_dir", folder, check=False)
    assert refused.returncode == 2
    assert "another --output_dir" in refused.stderr


def test_a_folder_of_the_users_own_is_left_alone(tmp_path):
    # `beit demo --output_dir .` where ./images are the user's photographs
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "holiday.jpg").write_bytes(b"precious")
    refused = run("-m", "beit", "demo", "--quick", "--output_dir", tmp_path, check=False)
    assert refused.returncode == 2
    assert (tmp_path / "images" / "holiday.jpg").read_bytes() == b"precious"
