"""Scores of a representation in training: each against naive code, in a run, and the alarms."""

import json
import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from beit.commands import knn
from beit.commands.settings import KnnConfig
from beit.launch import launch
from beit.storage import load_checkpoint
from beit.targets import entropy
from beit.tasks.pretraining import main
from beit.tasks.representation import PENALTY, RepresentationProbe, effective_rank, neighbours, ridge
from beit.tasks.settings import PretrainingConfig
from beit.training.checkpoint import RunFolder


@pytest.fixture(scope="module")
def clusters():
    """Features of length 1 in 4 classes that overlap: 60 of a bank, 30 held out."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (90,), generator=generator)
    centres = torch.randn(4, 12, generator=generator)
    features = F.normalize(centres[labels] + 1.2 * torch.randn(90, 12, generator=generator), dim=1)
    return (features[:60], labels[:60]), (features[60:], labels[60:])


def test_the_ridge_regression_is_the_naive_one(clusters):
    # Least squares on the same data with rows added for the penalty, one class at a time.
    (features, labels), (others, truth) = ((x.double().numpy(), y.numpy()) for x, y in clusters)
    mean, deviation = features.mean(0), features.std(0, ddof=1)
    penalty = math.sqrt(PENALTY * len(features)) * np.eye(12)
    scores = []
    for number in range(4):
        target = (labels == number).astype(float)
        rows = np.concatenate([(features - mean) / deviation, penalty])
        solution, *_ = np.linalg.lstsq(rows, np.concatenate([target - target.mean(), np.zeros(12)]), rcond=None)
        scores.append((others - mean) / deviation @ solution + target.mean())
    expected = 100 * (np.argmax(scores, axis=0) == truth).mean()
    assert 40 < expected < 100
    assert ridge(*clusters) == pytest.approx(expected)


def test_neighbours_tell_classes_apart(clusters):
    bank, held_out = clusters
    assert 40 < neighbours(bank, held_out) < 100
    assert neighbours(bank, (bank[0], bank[1])) > 80  # each is its own nearest
    few = bank[0][:3], bank[1][:3]
    assert neighbours(few, few) >= 100 / 3  # fewer than there are neighbours to ask


def test_ranks_and_entropies_of_known_features():
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1)
    spectrum = torch.tensor([4.0, 2.0, 1.0, 1.0])
    shares = [0.5, 0.25, 0.125, 0.125]
    expected = -sum(share * math.log(share) for share in shares)
    assert effective_rank(torch.diag(spectrum)) == pytest.approx(math.exp(expected), rel=1e-6)
    assert entropy(torch.tensor([8, 4, 2, 2, 0])).item() == pytest.approx(expected, rel=1e-6)


def watched(*runs):
    """The warnings that scores give rise to, one list for each probe of a run."""
    probe = RepresentationProbe.__new__(RepresentationProbe)
    probe._highest = {}
    return [probe.watch(scores) for scores in runs]


def test_a_collapse_is_warned_of_and_a_good_run_is_not(caplog):
    good = [{"rankme": 1.2 + step, "token_entropy": 0.6 * step, "codebook_perplexity": 60.0} for step in range(5)]
    assert watched(*good)[-1] == {
        "probe_rankme": 5.2, "probe_token_entropy": pytest.approx(2.4), "probe_codebook_perplexity": 60.0
    }  # fmt: skip
    watched(good[-1], {"rankme": 3.0, "token_entropy": 0.6})  # less, but no collapse
    assert not caplog.messages
    for collapsed in ({"rankme": 1.5}, {"token_entropy": 0.1}, {"token_entropy_2": 0.1}):
        caplog.clear()
        watched({**good[-1], "token_entropy_2": 4.0}, collapsed)
        (message,) = caplog.messages
        assert message.startswith(next(iter(collapsed)))
        assert "--lr" in message
    caplog.clear()
    watched(
        {"rankme": 1.0, "codebook_perplexity": 2.0, "token_entropy": 0.0}
    )  # from the start, where one token is usual
    assert len(caplog.messages) == 2


def test_an_alarm_remembers_what_the_log_has_from_before_a_resume(tmp_path, caplog):
    entries = ({"epoch": 0}, {"epoch": 1, "test_probe_rankme": 9.0}, {"epoch": 2, "test_probe_rankme": None})
    (tmp_path / "log.txt").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    probe = RepresentationProbe.__new__(RepresentationProbe)
    probe._highest = {}
    probe.watch({"rankme": 2.0}, RunFolder(str(tmp_path)))
    assert "rankme 2, at its highest 9" in caplog.text


# In a run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes that colour hardly tells, 12 + 8 images each; of 32 pixels, so that crops are the same."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 8)):
        for label in range(3):
            (folder / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (32, 32, 3)) + rng.integers(0, 100, 3)
                pixels[..., label] += 30
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / f"class{label}" / f"{number}.png")
    return folder


def pretrain(images, folder, *more):
    flags = ("--data_path", images / "train", "--target", "pixels", "--model", "beit_tiny_patch16_224_8k_vocab")
    flags += ("--model_kwargs", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2", "--input_size", 32)
    flags += ("--num_mask_patches", 6, "--min_mask_patches_per_block", 2, "--batch_size", 12, "--epochs", 3)
    flags += ("--num_workers", 0, "--device", "cpu", "--warmup_epochs", 0, "--output_dir", folder, *more)
    return launch(PretrainingConfig, main, "", [str(flag) for flag in flags], "run_beit_pretraining.py")


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_a_watched_run_takes_the_same_steps_and_logs_what_knn_finds(images, tmp_path, caplog):
    # Breaks when the probe draws a random number of the run's, leaves the model frozen, or scores other features.
    with caplog.at_level(logging.INFO):
        watch = ("--probe_data_path", images, "--probe_freq", 2, "--log_dir", tmp_path / "tensorboard")
        assert pretrain(images, tmp_path / "watched", *watch) == 0
    assert pretrain(images, tmp_path / "alone") == 0
    names = ("knn_acc1", "linear_acc1", "rankme", "layer")
    alone, entries = log_of(tmp_path / "alone"), log_of(tmp_path / "watched")
    assert [{f"test_probe_{name}" for name in names} <= entry.keys() for entry in entries] == [False, True, True]
    assert [entry["train_loss"] for entry in entries] == [entry["train_loss"] for entry in alone]
    weights, same = (load_checkpoint(tmp_path / name / "checkpoint-2.pth")["model"] for name in ("watched", "alone"))
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert any("test_probe_rankme" in message for message in caplog.messages)

    command = KnnConfig(
        checkpoint=str(tmp_path / "watched/checkpoint-2.pth"), data_path=str(images), pool=("mean",), k=(20,),
        device="cpu", num_workers=0,
    )  # fmt: skip
    accuracies = [result.acc1 for result in knn.evaluate(command)]
    assert 40 < max(accuracies) < 95
    assert entries[-1]["test_probe_knn_acc1"] == pytest.approx(max(accuracies), abs=1e-3)
    assert entries[-1]["test_probe_layer"] == accuracies.index(max(accuracies))
    assert 1 < entries[-1]["test_probe_rankme"] < 24

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("perf/test_probe_rankme")] == [1, 2]


@pytest.mark.slow
def test_of_plain_class_folders_every_other_image_is_held_out(images, tmp_path):
    folders = [tmp_path / "split" / name for name in ("train", "val")]
    for number, path in enumerate(sorted((images / "train").glob("*/*.png"))):
        folder = folders[number % 2] / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).symlink_to(path)
    for name, watched in (("plain", images / "train"), ("split", tmp_path / "split")):
        assert pretrain(images, tmp_path / name, "--probe_data_path", watched, "--epochs", 1) == 0
    plain, split = (log_of(tmp_path / name)[0] for name in ("plain", "split"))
    scores = [name for name in plain if "probe" in name]
    assert {name: plain[name] for name in scores} == {name: split[name] for name in scores}


def test_what_cannot_be_scored_is_one_line(images, tmp_path, capsys):
    cases = {"nowhere": "nowhere", str(images / "train/class0"): "without a class"}
    for path, part in cases.items():
        assert pretrain(images, tmp_path / "run", "--probe_data_path", path) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert part in line
