"""Segmentation as a user runs it: trained, tested, on two processes, and killed."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.toy_images import SHAPES, write_segmentation_scenes
from semantic_segmentation.__main__ import main
from tests.shell import ROOT, run

pytestmark = pytest.mark.slow

TINY = "upernet_beit_tiny_64_slide_ade20k"
OFFICIAL_PATH = f"configs/beit/upernet/{TINY}.py"
TRAIN, TEST = "semantic_segmentation/tools/train.py", "semantic_segmentation/tools/test.py"
KILLED = "tests/integration/killed_segmentation.py"
KILL_SEED = 20210615
ITERATIONS = 12
CPU = ("--device", "cpu", "--num_workers", "0")
# 10 scenes are 2 batches of 4: epochs of the data, evaluations and checkpoints end at different steps.
SMALL = (
    *("--model_kwargs", "patch_size=8", "embed_dim=32", "depth=4", "num_heads=2", "--head_channels", "16"),
    *("--auxiliary_channels", "8", "--drop_path", "0.1", "--samples_per_gpu", "4", "--update_freq", "1"),
    *("--warmup_iters", "3", "--max_iters", str(ITERATIONS)),
    *("--eval_interval", "4", "--checkpoint_interval", "6", *CPU),
)
SPEED = {"images_per_second", "data_wait"}


def log_of(folder: Path) -> list[dict]:
    """The lines of a log, without what the machine's load decides."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SPEED} for line in lines]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def shell(script: str, *command: object, port: str) -> subprocess.CompletedProcess:
    """Runs one of the official scripts in its folder, on CPUs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PORT": port}
    done = subprocess.run(
        ["bash", f"tools/{script}", *map(str, command)],
        cwd=ROOT / "semantic_segmentation",
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_segmentation_scenes(folder, 160, 64, validation_count=24, coloured=True)
    return folder


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    write_segmentation_scenes(folder, 10, (64, 72), validation_count=3, coloured=True)
    return folder


# A model that learns


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scenes) -> Path:
    """A run of the tiny config, shortened with the options of the official README."""
    folder = tmp_path_factory.mktemp("trained")
    shorter = ("runner.max_iters=120", "evaluation.interval=60", "checkpoint_config.interval=120")
    shorter += ("lr_config.warmup_iters=10", "data.samples_per_gpu=8")
    run(TRAIN, TINY, "--work-dir", folder, *CPU, "--options", f"data_root={scenes}", *shorter)
    return folder


def test_it_learns_to_segment(trained):
    first, last = log_of(trained)
    assert [first["step"], last["step"]] == [60, 120]
    assert last["test_mIoU"] >= 0.6
    assert last["train_loss"] < first["train_loss"]
    names = {"loss", "decode_loss", "aux_loss", "pixel_acc", "lr", "grad_norm"}
    assert {f"train_{name}" for name in names} | {"test_mAcc", "test_aAcc", "n_parameters"} <= last.keys()
    files = {path.name for path in trained.iterdir()}
    assert {"checkpoint-120.pth", "checkpoint-best.pth", "config.yaml", "log.txt"} <= files
    best = torch.load(trained / "checkpoint-best.pth", weights_only=True)
    assert best["labels"] == list(SHAPES)
    assert len(best["palette"]) == len(SHAPES)


@pytest.fixture(scope="module")
def scored(tmp_path_factory, trained, scenes) -> dict:
    """The scores of the best checkpoint, tested by one process with the run's own settings."""
    out = tmp_path_factory.mktemp("scored") / "scores.json"
    done = run(TEST, trained / "config.yaml", trained / "checkpoint-best.pth", "--eval", "mIoU", "--out", out)
    content = json.loads(out.read_text())
    assert f"mIoU {100 * content['mIoU']:.2f} mAcc {100 * content['mAcc']:.2f}" in done.stderr
    for name in SHAPES:
        assert re.search(rf"^{name} +{100 * content['IoU'][name]:.2f}", done.stderr, re.MULTILINE)
    return content


def test_the_test_reports_what_the_run_did(trained, scored):
    best = max(log_of(trained), key=lambda line: line["test_mIoU"])
    assert {name: scored[name] for name in ("mIoU", "mAcc", "aAcc")} == {
        name: best[f"test_{name}"] for name in ("mIoU", "mAcc", "aAcc")
    }


def test_two_processes_count_what_one_counts(tmp_path, trained, scenes, scored, free_port):
    # 23 images do not come out even. Broken by images that are padded in or left out to make them.
    odd = shutil.copytree(scenes, tmp_path / "odd")
    for kind, extension in (("images", "jpg"), ("annotations", "png")):
        (odd / kind / "validation" / f"ADE_val_00000005.{extension}").unlink()
    flags = (OFFICIAL_PATH, trained / "checkpoint-best.pth")
    options = ("--eval", "mIoU", *CPU, "--options", f"data_root={odd}")
    done = shell("dist_test.sh", *flags, 2, "--out", tmp_path / "two.json", *options, port=free_port)
    assert done.stderr.count("per class, in percent") == 1
    assert main(["test", *map(str, flags), "--out", str(tmp_path / "one.json"), *options]) == 0
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    pixels = [np.asarray(scores["confusion"]) for scores in (one, two, scored)]
    # Other windows go through the model together, so that a pixel between two classes may fall to the other one.
    assert np.abs(pixels[0] - pixels[1]).sum() <= 4
    assert pixels[0].sum() == pixels[1].sum() < pixels[2].sum()
    assert one["mIoU"] == pytest.approx(two["mIoU"], abs=1e-3)


def label_maps(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found[path.stem] = np.asarray(image)
    return found


@pytest.fixture(scope="module")
def submission(tmp_path_factory, trained, scenes) -> dict[str, np.ndarray]:
    """The label maps that `--format-only` writes for images that have none."""
    unlabelled, folder = tmp_path_factory.mktemp("unlabelled"), tmp_path_factory.mktemp("maps")
    shutil.copytree(scenes / "images", unlabelled / "images")
    shutil.copy(scenes / "classes.txt", unlabelled)
    flags = (trained / "config.yaml", trained / "checkpoint-best.pth", "--data_root", unlabelled)
    run(TEST, *flags, "--format-only", "--eval-options", f"imgfile_prefix={folder}")
    return label_maps(folder)


def test_label_maps_for_a_server_are_what_the_scores_are_of(submission, scenes, scored):
    # The scores anew, from the files, numbered as the annotations are. Broken by numbers that are one off.
    ours, truth = submission, label_maps(scenes / "annotations" / "validation")
    assert ours.keys() == truth.keys()
    found, right = (np.concatenate([maps[name].ravel() for name in truth]) for maps in (ours, truth))
    found, right = found[right > 0], right[right > 0]
    for number, name in enumerate(SHAPES, 1):
        intersection, union = (
            ((found == number) & (right == number)).sum(),
            ((found == number) | (right == number)).sum(),
        )
        assert scored["IoU"][name] == pytest.approx(intersection / union, rel=1e-12)
    assert scored["aAcc"] == pytest.approx((found == right).mean(), rel=1e-12)


def test_several_sizes_and_pictures(tmp_path, trained, scored):
    flags = [str(trained / "config.yaml"), str(trained / "checkpoint-best.pth")]
    more = ["--aug-test", "--show-dir", str(tmp_path / "shown"), "--out", str(tmp_path / "scores.json")]
    assert main(["test", *flags, *more]) == 0
    several = json.loads((tmp_path / "scores.json").read_text())
    assert several["mIoU"] >= 0.6
    assert several["confusion"] != scored["confusion"]
    pictures = sorted((tmp_path / "shown").iterdir())
    assert [path.name for path in pictures] == [f"ADE_val_{number:08d}.png" for number in range(1, 25)]
    with Image.open(pictures[0]) as picture:
        assert np.asarray(picture.convert("RGB")).std() > 20


def test_images_are_predicted_as_they_are_tested(tmp_path, trained, scenes, submission):
    # Broken by sizes or numbers that the checkpoint does not tell, and by a backbone that is built otherwise.
    images = [scenes / "images" / "validation" / f"ADE_val_{number:08d}.jpg" for number in (1, 2)]
    flags = ("--checkpoint", trained / "checkpoint-best.pth", "--output_dir", tmp_path, "--device", "cpu")
    run("-m", "semantic_segmentation", "predict", *images, *flags)
    stems = [path.stem for path in images]
    files = [stem + end for stem in stems for end in (".png", "_figure.png", "_overlay.png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    predicted = label_maps(tmp_path)
    assert all(np.array_equal(predicted[stem], submission[stem]) for stem in stems)


def test_a_new_run_starts_from_a_whole_segmentor(tmp_path, trained, scenes, capfd):
    # At a rate of 0 the weights stay; without validation there need be no images for it.
    flags = ["--work-dir", str(tmp_path), "--data_root", str(scenes), "--val_images", "nowhere", "--no-validate", *CPU]
    rate = ["--lr", "0", "--max_iters", "1", "--checkpoint_interval", "1", "--eval_interval", "1"]
    assert main(["train", TINY, *flags, *rate, "--load-from", str(trained / "checkpoint-best.pth")]) == 0
    assert "tensors loaded from" in capfd.readouterr().err
    ours, theirs = weights_of(tmp_path / "checkpoint-1.pth"), weights_of(trained / "checkpoint-best.pth")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if not name.endswith(statistics))
    assert not (tmp_path / "checkpoint-best.pth").exists()
    assert "test_mIoU" not in log_of(tmp_path)[0]


# Runs that are stopped


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, few_scenes) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(TRAIN, TINY, *SMALL, "--data_root", few_scenes, "--work-dir", folder)
    return folder


def assert_same_bits(folder: Path, reference: Path) -> None:
    ours, theirs = (
        torch.load(run_folder / f"checkpoint-{ITERATIONS}.pth", weights_only=True) for run_folder in (folder, reference)
    )
    assert ours["model"].keys() == theirs["model"].keys()
    assert all(torch.equal(tensor, theirs["model"][name]) for name, tensor in ours["model"].items())
    assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()
    for index, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(value, ours["optimizer"]["state"][index][key]) for key, value in state.items())
    assert ours["best"] == theirs["best"]


def test_evaluations_and_checkpoints_keep_their_intervals(undisturbed):
    entries = log_of(undisturbed)
    assert [entry["step"] for entry in entries] == [4, 6, 8, 12]
    assert [entry["step"] for entry in entries if "test_mIoU" in entry] == [4, 8, 12]
    files = {path.name for path in undisturbed.glob("checkpoint-*.pth")}
    # The last one is from before the last evaluation.
    assert files == {"checkpoint-6.pth", "checkpoint-12.pth", "checkpoint-best.pth", "checkpoint-last.pth"}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, few_scenes, undisturbed, workers):
    # Broken by crops, colours, dropout or stochastic depth that depend on what ran before, and by lost statistics.
    steps = sorted(random.Random(KILL_SEED + int(workers)).sample(range(1, ITERATIONS), 2 - int(workers) // 2))
    print(f"seed {KILL_SEED}, {workers} workers: SIGKILL at steps {steps}")
    flags = (TINY, *SMALL, "--data_root", few_scenes, "--work-dir", tmp_path, "--num_workers", workers)
    for step in steps:
        killed = run(KILLED, "step", str(step), "--", *flags, "--save_ckpt_steps", "1", check=False)
        assert killed.returncode == -9, killed.stderr
    assert "resuming" in run(TRAIN, *flags).stderr
    assert_same_bits(tmp_path, undisturbed)
    assert log_of(tmp_path) == log_of(undisturbed)
    ours, theirs = (weights_of(folder / "checkpoint-best.pth") for folder in (tmp_path, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_sigterm_saves_exits_and_goes_on(tmp_path, few_scenes, undisturbed):
    flags = (TINY, *SMALL, "--data_root", few_scenes, "--work-dir", tmp_path)
    stopped = run(KILLED, "term", "4", "--", *flags, check=False)
    assert stopped.returncode == 143
    assert "stopped at step 5; the same command resumes from there" in stopped.stderr
    run(TRAIN, *flags)
    assert_same_bits(tmp_path, undisturbed)
    assert log_of(tmp_path) == log_of(undisturbed)


def test_a_run_is_continued_in_another_folder(tmp_path, few_scenes, undisturbed):
    checkpoint = undisturbed / "checkpoint-6.pth"
    flags = (TINY, *SMALL, "--data_root", few_scenes, "--work-dir", tmp_path)
    done = run(TRAIN, *flags, "--resume-from", checkpoint)
    assert f"resuming {checkpoint} at step 6" in done.stderr
    assert_same_bits(tmp_path, undisturbed)
    assert log_of(tmp_path) == [entry for entry in log_of(undisturbed) if entry["step"] > 6]


@pytest.mark.parametrize(
    ("first", "changes", "steps", "said"),
    [
        (12, "--max_iters 16 --eval_interval 5 --checkpoint_interval 16", [4, 6, 8, 12, 15, 16], ""),
        (12, "--max_iters 14 --eval_interval 1 --checkpoint_interval 7", [4, 6, 8, 12, 13, 14], ""),
        (6, "--eval_interval 5 --checkpoint_interval 12", [4, 6, 10, 12], ""),
        (6, "--max_iters 8 --samples_per_gpu 2", [4, 6, 8], "images_per_step went from 4 to 2"),
    ],
)
def test_another_length_interval_or_batch_continues_at_the_step(
    tmp_path, few_scenes, undisturbed, capfd, first, changes, steps, said
):
    # Broken by a position in units that depend on the length, on the intervals or on the batch.
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    for path in () if first == ITERATIONS else (folder / "checkpoint-12.pth", folder / "checkpoint-last.pth"):
        path.unlink()
    flags = (*SMALL, "--data_root", few_scenes, "--work-dir", folder, *changes.split())
    assert main(["train", TINY, *map(str, flags)]) == 0
    output = capfd.readouterr().err
    assert f"checkpoint-{first}.pth at step {first}" in output
    assert said in output
    assert [entry["step"] for entry in log_of(folder)] == steps
    assert (folder / f"checkpoint-{steps[-1]}.pth").is_file()


def test_a_continued_run_knows_the_best_it_has_seen(tmp_path, few_scenes, undisturbed):
    checkpoint = torch.load(undisturbed / "checkpoint-6.pth", weights_only=True)
    torch.save({**checkpoint, "best": {"mIoU": 0.99}}, tmp_path / "checkpoint.pth")
    flags = (*SMALL, "--data_root", few_scenes, "--work-dir", tmp_path / "run")
    assert main(["train", TINY, *map(str, flags), "--resume-from", str(tmp_path / "checkpoint.pth")]) == 0
    assert "test_mIoU" in log_of(tmp_path / "run")[-1]
    assert not (tmp_path / "run" / "checkpoint-best.pth").exists()


def test_two_processes_learn_what_one_learns(tmp_path, few_scenes, free_port):
    # Broken by batch normalisation over each process's own images, and by gradients that are summed.
    # A bias before a normalisation has no gradient but rounding: Adam makes a step of it, unless epsilon hides it.
    same = ("--head_dropout", "0", "--drop_path", "0", "--opt_eps", "1e-4", "--data_root", few_scenes)
    assert main(["train", TINY, *SMALL, *map(str, same), "--work-dir", str(tmp_path / "one")]) == 0
    shared = (*SMALL, "--samples_per_gpu", "2", *same, "--seed", "0", "--deterministic")
    done = shell("dist_train.sh", OFFICIAL_PATH, 2, "--work-dir", tmp_path / "two", *shared, port=free_port)
    assert "batch 4 = 2 images x 2 processes x 1 batch per step" in done.stderr
    for ours, theirs in zip(log_of(tmp_path / "two"), log_of(tmp_path / "one"), strict=True):
        # The processes' shares of right pixels are averaged, though they have different numbers of labelled ones.
        assert ours.pop("train_pixel_acc") == pytest.approx(theirs.pop("train_pixel_acc"), abs=0.05)
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    one, two = (weights_of(tmp_path / name / f"checkpoint-{ITERATIONS}.pth") for name in ("one", "two"))
    for name, tensor in one.items():
        assert torch.allclose(two[name].double(), tensor.double(), rtol=1e-4, atol=1e-5), name
