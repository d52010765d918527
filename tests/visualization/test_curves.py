"""Reading logs and sorting their numbers into diagrams."""

import json

import pytest

from beit.errors import InputError
from beit.visualization.curves import Curve, diagrams, read_log

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
        ("hello\nworld\n", "no run's log"),
        ("[1]\n{}\n", "no run's log"),
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
    assert diagrams({"run": ENTRIES}) == {
        "loss": [Curve("train", [1, 2], [3.0, 2.0]), Curve("test", [2], [2.5])],
        "lr": [Curve("train", [1, 2], [0.1, 0.2])],
        "acc": [Curve("test", [2], [0.1])],
    }  # n_parameters is bookkeeping


def test_several_runs_are_told_apart_and_gaps_are_left_out():
    other = [{"epoch": 0, "train_loss": float("nan")}, {"epoch": 1, "train_loss": 1.0}]
    assert diagrams({"a": ENTRIES, "b": other}, ["loss"])["loss"] == [
        Curve("a train", [1, 2], [3.0, 2.0]),
        Curve("a test", [2], [2.5]),
        Curve("b train", [2], [1.0], run=1),
    ]


def test_a_metric_nobody_has_is_named_with_near_ones():
    with pytest.raises(InputError, match="did you mean 'loss'"):
        diagrams({"run": ENTRIES}, ["los"])
