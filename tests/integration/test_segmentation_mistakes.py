"""What is wrong with the data or the command of a segmentation is one line and exit status 2."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit.training.checkpoint import RunFolder
from beit.zoo import create_model
from examples.toy_images import write_segmentation_scenes
from semantic_segmentation.__main__ import main
from semantic_segmentation.config import SETTINGS
from tests.integration.test_segmentation import CPU, SMALL, TINY
from tests.shell import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    write_segmentation_scenes(folder, 10, (64, 72), validation_count=3)
    return folder


def refused(capfd, *command: object) -> str:
    """Runs a command in this process, which has to refuse, and returns what it says."""
    capfd.readouterr()
    assert main([str(word) for word in command]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert said.endswith(f"{line}\n")
    return line


@pytest.fixture
def data(tmp_path, few_scenes) -> Path:
    """Scenes to spoil."""
    return shutil.copytree(few_scenes, tmp_path / "data")


@pytest.fixture
def training(tmp_path, data) -> tuple:
    return ("train", TINY, *SMALL, "--data_root", data, "--work-dir", tmp_path / "run")


def annotation(data: Path, split: str = "training") -> Path:
    return next((data / "annotations" / split).glob("*3.png"))


def rewrite(path: Path, change) -> None:
    with Image.open(path) as image:
        labels = np.array(image)
    Image.fromarray(change(labels)).save(path)


@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_label_beyond_the_classes(capfd, data, training, split):
    rewrite(path := annotation(data, split), lambda labels: np.where(labels == 0, 9, labels).astype(np.uint8))
    assert refused(capfd, *training) == (
        f"error: {path} has the label 9, but the 8 classes have the labels 1 to 8 (0 and 255 are no class)"
    )


def test_a_label_map_of_another_size(capfd, data, training):
    rewrite(path := annotation(data), lambda labels: labels[:-1])
    line = refused(capfd, *training)
    assert line.startswith(f"error: the label map {path} is 63x72 pixels (height x width), but its image ")
    assert line.endswith(f"{path.stem}.jpg 64x72")


def test_a_missing_annotation(capfd, data, training):
    (path := annotation(data)).unlink()
    line = refused(capfd, *training)
    assert f"error: 1 of 10 images in {data}/images/training have no label map: {path.stem} (" in line


def test_an_empty_folder_and_one_that_is_not_there(capfd, data, training):
    shutil.rmtree(data / "images" / "training")
    line = refused(capfd, *training)
    assert line.startswith(f"error: no such folder or list of images: {data}/images/training")
    (data / "images" / "training").mkdir()
    line = refused(capfd, *training)
    assert line.startswith("error: no images in ")
    assert f"{data}/images/training" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--options data.sample_per_gpu=4", "data.sample_per_gpu(.*)did you mean 'data.samples_per_gpu'"),
        ("--options optimizer.lrs=4", "optimizer.lrs(.*)did you mean 'optimizer.lr'"),
        ("--max_iter 4", "--max.iter(.*)did you mean '--max_iters'"),
        ("--crop_size 60", "--crop_size 60: must be a multiple of the model's patches, 8 8 pixels"),
        ("--load-from nowhere.pth", "nowhere.pth"),
        ("--resume-from nowhere.pth", "nowhere.pth"),
        ("--options model.pretrained=nowhere.pth", "nowhere.pth"),
    ],
)
def test_a_misspelt_setting_names_the_nearest_and_what_cannot_be_is_said(capfd, training, words, message):
    assert re.search(message, refused(capfd, *training, *words.split()))


def test_a_misspelt_key_in_a_settings_file(capfd, tmp_path, training):
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {SETTINGS.folder / TINY}.yaml\nsample_per_gpu: 4\n")
    line = refused(capfd, "train", file, *training[2:])
    assert "sample_per_gpu" in line
    assert "did you mean 'samples_per_gpu'" in line


def test_a_misspelt_config(capfd, training):
    line = refused(capfd, "train", f"{TINY}s", *training[2:])
    assert f"did you mean '{TINY}'" in line


def test_a_classification_checkpoint_is_not_tested(capfd, tmp_path, few_scenes):
    sizes = {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
    model = create_model("beit_tiny_patch16_224", img_size=64, num_classes=8, **sizes)
    torch.save({"model": model.state_dict()}, tmp_path / "classifier.pth")
    line = refused(capfd, "test", TINY, tmp_path / "classifier.pth", "--data_root", few_scenes, *CPU)
    assert f"{tmp_path}/classifier.pth is a backbone (a pre-training or classification checkpoint), not a seg" in line
    line = refused(capfd, "test", TINY, tmp_path / "nowhere.pth", "--data_root", few_scenes, *CPU)
    assert "nowhere.pth" in line


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, training):
    folder = RunFolder(tmp_path / "run")
    done = run("-m", "semantic_segmentation", *training, check=False)
    folder.close()
    assert done.returncode == 2
    assert re.search(r"^error: --\S+ \S+ is in use by process \d+ on ", done.stderr, re.MULTILINE)
