"""The worked examples do what the documentation says they do."""

import json
import runpy
from functools import partial

import numpy as np
import pytest
import torch

import beit.launch
from beit.errors import InputError
from beit.launch import launch
from beit.registry import MASK_STRATEGIES, TARGETS
from beit.tasks.settings import PretrainingConfig
from examples import rotation
from examples.rotation import RotatedCrop, Rotation, RotationConfig
from examples.toy_images import write_scenes
from tests.shell import ROOT

SMALL = ["--model_kwargs", "patch_size=8", "depth=2", "embed_dim=32", "num_heads=2", "--input_size", "32"]
SHORT = ["--device", "cpu", "--num_workers", "0", "--batch_size", "8", "--warmup_epochs", "0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("worked") / "images"
    write_scenes(folder, 16, 40)
    return str(folder)


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def rotate(images, folder, epochs: int) -> int:
    paths = ["--data_path", images, "--eval_data_path", images, "--output_dir", str(folder)]
    argv = [*paths, "--epochs", str(epochs), "--model", "beit_tiny_patch16_224", *SMALL, *SHORT]
    return launch(RotationConfig, lambda config: rotation.run(Rotation(config)), rotation.__doc__, argv)


def test_a_new_job_is_one_short_file():
    assert len((ROOT / "examples" / "rotation.py").read_text().splitlines()) < 120


def test_the_new_job_trains_evaluates_and_resumes(images, tmp_path):
    assert rotate(images, tmp_path, 1) == 0
    first = torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)
    assert first["model"]["head.weight"].shape == (4, 32)
    assert log_of(tmp_path)[0]["train_loss"] == pytest.approx(np.log(4), abs=0.05)  # an untrained head guesses
    assert rotate(images, tmp_path, 2) == 0
    log = log_of(tmp_path)
    assert [entry["epoch"] for entry in log] == [0, 1]
    # 16 images: accuracies are multiples of 1/16, so none is counted twice or left out.
    assert all((entry["test_acc1"] / 100 * 16) == pytest.approx(round(entry["test_acc1"] / 100 * 16)) for entry in log)


def test_the_label_is_the_number_of_quarter_turns():
    # Red above, blue below: after k turns counter-clockwise, red is above, left, below, right.
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:16, :, 0] = pixels[16:, :, 2] = 255
    transform = RotatedCrop(RotationConfig(input_size=32, min_crop=1.0))
    transform.crop = lambda image: image
    seen = set()
    for seed in range(20):
        sample = transform(rotation.Image.fromarray(pixels), np.random.default_rng(seed))
        red = sample["image"][0] > 0
        halves = [red[:16].all(), red[:, :16].all(), red[16:].all(), red[:, 16:].all()]
        assert halves.index(True) == sample["turns"].item()
        seen.add(sample["turns"].item())
    assert seen == {0, 1, 2, 3}


def test_a_size_that_is_not_square_is_refused():
    with pytest.raises(InputError, match="must be square"):
        Rotation(RotationConfig(input_size=(32, 64))).check()


@pytest.mark.slow
def test_a_target_and_masks_are_registered_from_outside(images, tmp_path, monkeypatch):
    for table, name in ((MASK_STRATEGIES, "stripes"), (TARGETS, "thumbnails")):
        monkeypatch.setitem(table, name, "taken away again at the end")
    monkeypatch.setattr(beit.launch, "launch", partial(launch, owns_process=False))
    paths = ["--data_path", images, "--output_dir", tmp_path, "--model", "beit_tiny_patch16_224_8k_vocab"]
    chosen = ["--mask_strategy", "stripes", "--target", "thumbnails", "--num_mask_patches", "8", "--epochs", "1"]
    script = str(ROOT / "examples" / "own_target_and_masks.py")
    monkeypatch.setattr("sys.argv", [script, *chosen, *map(str, paths), *SMALL, *SHORT])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 0
    checkpoint = torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)
    assert checkpoint["target"] == "thumbnails of 2 x 2 pixels"
    assert checkpoint["model"]["lm_head.weight"].shape == (12, 32)


def test_without_the_example_the_names_are_unknown(capfd):
    assert launch(PretrainingConfig, "beit.tasks.pretraining:main", "", ["--target", "thumbnails"]) == 2
    assert "thumbnails" in capfd.readouterr().err
