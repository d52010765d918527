"""Reading logs and sorting their numbers into diagrams."""

import json

import pytest

from beit.errors import InputError
from beit.visualization.curves import Curve, overlaid, read_log

ENTRIES = [
    {"epoch": 0, "train_loss": 3.0, "train_lr": 0.1, "n_parameters": 5},
    {"epoch": 1, "train_loss": 2.0, "train_lr": 0.2, "test_loss": 2.5, "test_acc": 0.1, "n_parameters": 5},
]


def write_log(path, entries=ENTRIES, tail=""):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)
    return path


def test_a_folder_stands_for_its_log_and_a_line_cut_off_at_the_end_is_left_out(tmp_path):
    write_log(tmp_path / "log.txt", tail='{"epoch": 2, "train_lo')
    assert read_log(tmp_path) == read_log(tmp_path / "log.txt") == ENTRIES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("", "no finished epoch"),
        ("hello\nworld\n", "not a run's log"),
        ("[1]\n{}\n", "not a run's log"),
        ('{"epoch": "x"}\n', "not a run's log: each line must be a JSON object whose 'epoch' is a number"),
        ('{"epoch": null}\n{"epoch": 1}\n', "not a run's log"),
    ],
)
def test_what_is_no_log_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "log.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_log(path)
    assert "\n" not in str(error.value)


def test_a_metric_has_a_curve_for_training_and_one_for_test():
    assert overlaid({"run": ENTRIES}) == {
        "loss": [Curve("train", [1, 2], [3.0, 2.0]), Curve("test", [2], [2.5])],
        "lr": [Curve("train", [1, 2], [0.1, 0.2])],
        "acc": [Curve("test", [2], [0.1])],
    }  # n_parameters is bookkeeping


def test_several_runs_are_told_apart_and_gaps_are_left_out():
    other = [{"epoch": 0, "train_loss": float("nan")}, {"epoch": 1, "train_loss": 1.0}]
    assert overlaid({"a": ENTRIES, "b": other}, ["loss"])["loss"] == [
        Curve("a train", [1, 2], [3.0, 2.0]),
        Curve("a test", [2], [2.5]),
        Curve("b train", [2], [1.0], run=1),
    ]


def test_a_metric_nobody_has_is_named_with_near_ones():
    with pytest.raises(InputError, match="did you mean 'loss'"):
        overlaid({"run": ENTRIES}, ["los"])


@pytest.mark.parametrize(
    "entries",
    [
        [{"epoch": 0, "n_parameters": 5, "step": 10, "images_per_second": 3.0}],
        [{"epoch": 0, "train_loss": None}, {"epoch": 1, "train_loss": None}],
        [{"epoch": 0, "train_loss": float("nan"), "test_loss": float("inf")}],
    ],
)
def test_a_log_without_a_metric_is_refused_in_one_line(entries):
    with pytest.raises(InputError, match="nothing to draw: run logged no metric") as error:
        overlaid({"run": entries})
    assert "\n" not in str(error.value)


def test_what_has_to_be_cleared_stands_beside_what_clears_it():
    entries = [{"epoch": 0, "train_mlm_acc": 0.1, "test_mlm_acc": 0.2, "test_most_frequent_acc": 0.05}]
    own = [Curve("train", [1], [10.0]), Curve("test", [1], [20.0]), Curve("most frequent token", [1], [5.0])]
    assert overlaid({"run": entries}) == overlaid({"run": entries}, ["mlm_acc"]) == {"mlm_acc (%)": own}
    assert [curve.part for curve in own] == ["train", "test", "baseline"]
    both = overlaid({"a": entries, "b": entries})["mlm_acc (%)"]
    assert [(curve.label, curve.run) for curve in both[-2:]] == [
        ("a most frequent token", 0),
        ("b most frequent token", 1),
    ]
    numbered = [{"epoch": 0, "train_mlm_acc_2": 0.1, "test_mlm_acc_2": 0.2, "test_most_frequent_acc_2": 0.05}]
    assert overlaid({"run": numbered}) == {"mlm_acc_2 (%)": own}
    alone = overlaid({"run": entries}, ["most_frequent_acc"])
    assert alone == {"most_frequent_acc (%)": [Curve("test", [1], [5.0])]}


def test_segmentation_is_drawn_over_steps_and_beside_epochs_over_those():
    segmentation = [
        {"epoch": 0, "step": 200, "train_loss": 2.0, "train_pixel_acc": 0.5, "test_mIoU": 0.3},
        {"epoch": 1, "step": 300, "train_loss": 1.0, "train_pixel_acc": 0.6, "test_mIoU": None},
    ]
    assert overlaid({"run": segmentation}) == {
        "loss": [Curve("train", [200, 300], [2.0, 1.0], unit="step")],
        "pixel_acc (%)": [Curve("train", [200, 300], [50.0, 60.0], unit="step")],
        "mIoU (%)": [Curve("test", [200], [30.0], unit="step")],
    }
    found = overlaid({"a": segmentation, "b": [{"epoch": 4, "train_loss": 3.0, "test_acc1": 50.0}]})
    assert found["loss"] == [Curve("a train", [1, 2], [2.0, 1.0]), Curve("b train", [5], [3.0], 1)]
    assert found["mIoU (%)"][0].epochs == [200]
    assert found["acc1 (%)"] == [Curve("b test", [5], [50.0], 1)]
