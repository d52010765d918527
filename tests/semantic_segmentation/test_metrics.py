"""Scores against a naive implementation that looks at every pixel."""

import math

import numpy as np
import pytest
import torch

from semantic_segmentation.data import reduce_zero
from semantic_segmentation.metrics import Confusion, scores

IGNORED = 255


def naive_scores(predictions, labels, num_classes):
    """The definitions, pixel by pixel: per class IoU and accuracy, and the share of right pixels."""
    right, of_label, of_prediction = ([0] * num_classes for _ in range(3))
    for prediction, label in zip(predictions, labels, strict=True):
        for found, wanted in zip(prediction.flatten().tolist(), label.flatten().tolist(), strict=True):
            if wanted == IGNORED:
                continue
            of_label[wanted] += 1
            of_prediction[found] += 1
            right[wanted] += found == wanted
    iou, accuracy = [], []
    for k in range(num_classes):
        union = of_label[k] + of_prediction[k] - right[k]
        iou.append(right[k] / union if union else math.nan)
        accuracy.append(right[k] / of_label[k] if of_label[k] else math.nan)
    return iou, accuracy, sum(right) / sum(of_label) if sum(of_label) else math.nan


def mean_of_numbers(values):
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def make_maps(num_classes, absent, seed, ignored=0.2):
    """Images of odd sizes whose labels have none of ``absent``, half of it predicted rightly."""
    rng = np.random.default_rng(seed)
    present = [k for k in range(num_classes) if k not in absent]
    predictions, labels = [], []
    for _ in range(4):
        size = tuple(rng.integers(3, 20, 2))
        label = rng.choice(present, size)
        prediction = np.where(rng.random(size) < 0.5, label, rng.choice(present, size))
        label[rng.random(size) < ignored] = IGNORED
        predictions.append(torch.from_numpy(prediction.astype(np.uint8)))
        labels.append(torch.from_numpy(label.astype(np.uint8)))
    return predictions, labels


def measured(predictions, labels, num_classes):
    confusion = Confusion(num_classes)
    for prediction, label in zip(predictions, labels, strict=True):
        confusion.update(prediction, label)
    return scores(confusion.matrix)


def assert_as_naive(predictions, labels, num_classes):
    found = measured(predictions, labels, num_classes)
    iou, accuracy, all_accuracy = naive_scores(predictions, labels, num_classes)
    assert found.iou == pytest.approx(iou, nan_ok=True, rel=1e-12)
    assert found.accuracy == pytest.approx(accuracy, nan_ok=True, rel=1e-12)
    assert found.mIoU == pytest.approx(mean_of_numbers(iou), nan_ok=True, rel=1e-12)
    assert found.mAcc == pytest.approx(mean_of_numbers(accuracy), nan_ok=True, rel=1e-12)
    assert found.aAcc == pytest.approx(all_accuracy, nan_ok=True, rel=1e-12)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_the_naive_ones(seed):
    # Broken by ignored pixels that count, rows and columns exchanged, means over images, absent classes that count.
    found = assert_as_naive(*make_maps(7, absent={2, 5}, seed=seed), 7)
    assert [k for k in range(7) if math.isnan(found.iou[k])] == [2, 5]


def test_a_class_that_is_only_predicted_counts_against_miou_alone():
    label = torch.tensor([[0, 0, 1, 255]])
    prediction = torch.tensor([[0, 2, 1, 3]])  # class 2 is nowhere right; class 3 only where nothing counts
    found = assert_as_naive([prediction], [label], 5)
    assert found.iou == pytest.approx([1 / 2, 1, 0, math.nan, math.nan], nan_ok=True)
    assert found.accuracy == pytest.approx([1 / 2, 1, math.nan, math.nan, math.nan], nan_ok=True)
    assert (found.mIoU, found.mAcc) == (1 / 2, 3 / 4)
    assert found.aAcc == pytest.approx(2 / 3)


def test_label_reduction():
    # Stored labels count from 1; 0 is nothing. Broken by a reduction that turns 0 or 255 into a class.
    rng = np.random.default_rng(0)
    stored = torch.from_numpy(rng.integers(0, 6, (9, 13)).astype(np.uint8))
    stored[0, :3] = 255
    prediction = torch.from_numpy(rng.integers(0, 5, (9, 13)).astype(np.uint8))
    by_hand = torch.tensor([[255 if k in (0, 255) else k - 1 for k in row] for row in stored.tolist()]).to(torch.uint8)
    assert torch.equal(reduce_zero(stored), by_hand)
    assert_as_naive([prediction], [reduce_zero(stored)], 5)


def test_nothing_to_score_is_nan():
    found = assert_as_naive([torch.zeros(2, 3)], [torch.full((2, 3), 255)], 3)
    assert math.isnan(found.mIoU)
    assert math.isnan(found.aAcc)


def test_counts_are_exact_beyond_float32():
    # mmsegmentation's histograms are float32 per image; a count kept so would stop at 2**24.
    confusion = Confusion(2)
    confusion.matrix[0, 0] = 2**24
    confusion.update(torch.tensor([[0]]), torch.tensor([[0]]))
    assert confusion.matrix.tolist() == [[2**24 + 1, 0], [0, 0]]
    assert confusion.matrix.dtype == torch.int64


def test_two_processes_add_up():
    # Broken by a `matrix` that is a copy: what is added to it over processes would be lost.
    predictions, labels = make_maps(6, absent={1}, seed=3)
    halves = [Confusion(6), Confusion(6)]
    for number, (prediction, label) in enumerate(zip(predictions, labels, strict=True)):
        halves[number % 2].update(prediction, label)
    halves[0].matrix.add_(halves[1].matrix)
    together, alone = scores(halves[0].matrix), measured(predictions, labels, 6)
    assert together.iou == pytest.approx(alone.iou, nan_ok=True, rel=0)


def test_the_table_has_every_class_and_the_means():
    found = measured([torch.tensor([[0, 1, 1]])], [torch.tensor([[0, 0, 1]])], 3)
    lines = found.table(["wall", "crt screen", "sea"]).splitlines()
    assert [line.split() for line in lines] == [
        ["class", "IoU", "Acc"],
        ["wall", "50.00", "50.00"],
        ["crt", "screen", "50.00", "100.00"],
        ["sea", "nan", "nan"],
        ["mean", "50.00", "75.00"],
        ["all", "66.67"],
    ]
    assert len({len(line) for line in lines}) == 1
    assert found.summary() == "mIoU 50.00 mAcc 75.00 aAcc 66.67"


@pytest.mark.gpu
def test_an_update_does_not_wait_for_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    confusion = Confusion(5, "cuda")
    prediction, label = (torch.randint(0, 5, (20, 30), device="cuda") for _ in range(2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        confusion.update(prediction, label)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = Confusion(5)
    expected.update(prediction.cpu(), label.cpu())
    assert torch.equal(confusion.matrix.cpu(), expected.matrix)
