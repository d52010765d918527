"""`python -m examples.demo --quick`: `make demo` on a tiny budget leaves what it promises and can be run again."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit.errors import InputError
from examples.demo import main
from examples.demo_runs import Demo, DemoConfig
from tests.shell import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    return folder, run("-m", "examples.demo", "--quick", "--output_dir", folder).stderr


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
    learnt = pretraining["test_unigram_entropy"] - pretraining["test_loss"]
    assert summary["nats_below_unigram"] == pytest.approx(learnt)
    assert summary["nats_ok"] == (learnt >= 1)
    runs = {start: folder / "segmentation" / start / "log.txt" for start in ("pretrained", "scratch")}
    mean_iou = {start: last_entry(log)["test_mIoU"] for start, log in runs.items()}
    assert json.loads((folder / "segmentation.json").read_text()) == {"mIoU": mean_iou}
    assert summary["perplexity_ok"] == (summary["codebook_perplexity"] >= 102.4)
    for picture in ("curves.png", "reconstructions.png", "segmentation.png", "dvae/reconstructions.png"):
        with Image.open(folder / picture) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 20


def test_it_says_what_it_found_and_whether_that_is_enough(demo):
    _, said = demo
    assert "masked tokens of held-out images: loss " in said
    assert "perplexity " in said
    assert "mIoU on held-out scenes: " in said
    assert said.count("reached)") + said.count("reached; ") >= 2


def test_held_out_images_are_not_training_images(demo):
    folder, _ = demo
    training, held_out = (
        {path.read_bytes() for path in (folder / "images" / split).rglob("*.jpg")} for split in ("train", "held_out")
    )
    assert len(training) == 64
    assert len(held_out) == 24
    assert not training & held_out


def test_run_again_it_makes_and_trains_nothing_anew(demo, monkeypatch):
    folder, _ = demo
    kept = [path for suffix in ("jpg", "png", "pth", "log.txt") for path in folder.rglob(f"*{suffix}")]
    assert len(kept) > 100
    before = {path: path.stat().st_mtime_ns for path in kept}
    summary = (folder / "summary.json").read_text()
    monkeypatch.setattr("examples.demo.draw", lambda demo: None)  # pictures are drawn again
    main(DemoConfig(output_dir=str(folder), quick=True))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (folder / "summary.json").read_text() == summary


def test_images_made_with_other_settings_are_refused(demo):
    folder, _ = demo
    with pytest.raises(InputError, match="another --output_dir"):
        Demo(DemoConfig(output_dir=str(folder))).make_images()


def test_a_folder_of_the_users_own_is_left_alone(tmp_path):
    # `--output_dir .` where ./images are the user's photographs
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(InputError, match="another --output_dir"):
        Demo(DemoConfig(output_dir=str(tmp_path), quick=True)).make_images()
    assert (tmp_path / "images" / "holiday.jpg").read_bytes() == b"precious"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot create"):
        Demo(DemoConfig(output_dir=str(tmp_path / "file"), quick=True)).make_images()
