"""Segmentation on two processes: no image too often, none left out, none that only one of them sees."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from examples.toy_images import SHAPES, write_segmentation_scenes
from semantic_segmentation.__main__ import main
from semantic_segmentation.testing import build_model
from tests.command_lines import read_test
from tests.integration.test_segmentation import CPU, OFFICIAL_PATH, TINY, shell
from tests.shell import run

pytestmark = pytest.mark.slow

SIZES = (
    *("--model_kwargs", "patch_size=8", "embed_dim=32", "depth=4", "num_heads=2"),
    *("--head_channels", "16", "--auxiliary_channels", "0"),
)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """Three validation images, wider than the windows."""
    folder = tmp_path_factory.mktemp("three")
    write_segmentation_scenes(folder, 2, (64, 72), validation_count=3)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A segmentor that has learnt nothing, and still sees several classes."""
    path = tmp_path_factory.mktemp("checkpoint") / "segmentor.pth"
    torch.manual_seed(0)
    segmentor = build_model(read_test([TINY, "x.pth", *SIZES]), len(SHAPES))
    segmentor.decode_head.conv_seg.weight.data.normal_(std=1.0)
    torch.save({"model": segmentor.state_dict()}, path)
    return path


def drop(data: Path, count: int) -> None:
    """Takes the last validation images away."""
    for kind in ("images", "annotations"):
        for path in sorted((data / kind / "validation").iterdir())[-count:]:
            path.unlink()


@pytest.mark.parametrize("dropped", [0, 2], ids=["3 images", "1 image: a process without any"])
def test_the_official_multi_scale_test_counts_the_same_on_two_processes(
    tmp_path, three, checkpoint, free_port, dropped
):
    # Broken by an image that is taken twice to make the shares even, and by a process that waits for one it has not.
    data = shutil.copytree(three, tmp_path / "data")
    drop(data, dropped) if dropped else None
    flags = ("--eval", "mIoU", "--aug-test", *SIZES, *CPU, "--options", f"data_root={data}")
    done = shell("dist_test.sh", OFFICIAL_PATH, checkpoint, 2, "--out", tmp_path / "two.json", *flags, port=free_port)
    assert done.stderr.count("per class, in percent") == 1
    assert main(["test", OFFICIAL_PATH, str(checkpoint), "--out", str(tmp_path / "one.json"), *map(str, flags)]) == 0
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two
    counts = torch.tensor(one["confusion"])
    assert 0 < counts.sum() <= (3 - dropped) * 64 * 72
    assert (counts.sum(dim=0) > 0).sum() > 1  # several classes are predicted, so that a lost view would show


def test_processes_with_other_files_stop_with_a_line(tmp_path, three, free_port):
    # Broken by a machine whose copy of the data is not whole: with it the processes would count other images.
    fewer = shutil.copytree(three, tmp_path / "fewer")
    drop(fewer, 1)
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port}")
    command = ("tests/integration/segmentation_apart.py", f"{three},{fewer}", "train", TINY, *SIZES, *CPU)
    done = run(*launcher, *command, "--work-dir", tmp_path / "run", check=False)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said
    assert all("the processes see different data; process " in line for line in said)
