"""Testing of segmentors: what a checkpoint says of images and classes, and mistakes that are seen before the work."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from beit.errors import InputError
from examples.toy_images import SHAPES, write_segmentation_scenes
from semantic_segmentation import testing
from semantic_segmentation.config import adds_one, check
from semantic_segmentation.data import find_classes, find_pairs
from semantic_segmentation.inference import statistics_of
from semantic_segmentation.task import Segmentation
from tests.command_lines import read_test, read_train

TINY = "upernet_beit_tiny_64_slide_ade20k"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
OTHER = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
SMALL = (
    *("--model_kwargs", "patch_size=8", "embed_dim=16", "depth=4", "num_heads=2", "--head_channels", "8"),
    *("--auxiliary_channels", "0", "--device", "cpu", "--num_workers", "0"),
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_segmentation_scenes(folder, 3, (64, 72), validation_count=2)
    return folder


@pytest.fixture
def tested(tmp_path, scenes):
    """Returns the settings of a test, whose checkpoint records what is given."""

    def settings(*flags, **recorded):
        path = tmp_path / "segmentor.pth"
        config = read_test([TINY, str(path), "--data_root", str(scenes), *SMALL, *map(str, flags)])
        torch.manual_seed(0)
        torch.save({"model": testing.build_model(config, len(SHAPES)).state_dict(), **recorded}, path)
        return config

    return settings


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def all_of_class_0(_segmentor, images, _settings, **_):
    return ((key, torch.zeros(image.shape[1:], dtype=torch.uint8)) for key, image in images)


# What images are normalised with


@pytest.mark.parametrize(
    ("metadata", "classes", "expected", "warned"),
    [
        ({}, 150, IMAGENET, False),
        (OTHER, 8, OTHER, False),
        (HALF, 150, HALF, False),
        ({"dialect": "huggingface", **HALF}, 8, HALF, False),
        ({"dialect": "huggingface", **OTHER}, 150, OTHER, False),
        ({"dialect": "huggingface", **HALF}, 150, IMAGENET, True),  # transformers' copies of the published ones
    ],
)
def test_images_are_normalised_as_a_segmentor_learnt(metadata, classes, expected, warned, caplog):
    found = statistics_of({"source": "a folder", **metadata}, classes)
    assert (tuple(found.mean), tuple(found.std)) == (expected["mean"], expected["std"])
    assert len(warnings_of(caplog)) == warned


@pytest.mark.parametrize(("recorded", "expected"), [(OTHER, OTHER), ({}, IMAGENET)])
def test_a_test_normalises_as_the_checkpoint_records(tested, monkeypatch, recorded, expected):
    # Broken by a test that knows ImageNet's statistics alone, whatever predict does.
    seen = []

    def stand_in(_segmentor, images, _settings, *, mean, std, precision):
        for key, image in images:
            seen.append((tuple(mean), tuple(std), precision.dtype))
            yield key, torch.zeros(image.shape[1:], dtype=torch.uint8)

    monkeypatch.setattr(testing, "predict_each", stand_in)
    testing.main(tested(**recorded))
    assert seen == [(expected["mean"], expected["std"], torch.float32)] * 2


def test_a_test_is_in_float32_unless_another_format_is_asked_for():
    # As the published numbers; training's bf16 is not what `auto` means here, also in a run's own config.yaml.
    for flags, expected in (((), torch.float32), (("--amp_dtype", "bf16"), torch.bfloat16)):
        config = read_test([TINY, "x.pth", *flags])
        assert testing.precision_of(config, torch.device("cuda", 0)).dtype == expected


# What a checkpoint says of classes


@pytest.mark.parametrize(
    ("recorded", "flags", "part"),
    [
        ({"labels": list(reversed(SHAPES))}, (), f"8 of 8 names differ; number 0 is {SHAPES[-1]!r} there and"),
        ({"labels": [SHAPES[1], SHAPES[0], *SHAPES[2:]]}, (), f"2 of 8 names differ; number 0 is {SHAPES[1]!r} there"),
        ({"reduce_zero_label": False}, (), "learnt with reduce_zero_label=False, and this is a test with True"),
        ({"labels": [f"{name.upper()} " for name in SHAPES], "reduce_zero_label": True}, (), ""),
        ({"labels": ["tench"] * 1000}, (), ""),
        ({}, (), ""),
    ],
)
def test_other_classes_than_a_segmentor_learnt_are_said(tested, scenes, caplog, recorded, flags, part):
    testing.compare_with_record(recorded, tested(*flags), find_classes(scenes))
    assert [part in text for text in warnings_of(caplog)] == ([True] if part else [])


def test_a_whole_test_matches_the_same_classes_in_another_order(tested, caplog):
    # Breaks if a score is one of other classes than its name says.
    testing.main(tested(labels=list(reversed(SHAPES))))
    assert any("8 of 8 classes matched by name" in text for text in warnings_of(caplog))
    assert not any("names differ" in text for text in warnings_of(caplog))
    caplog.clear()
    testing.main(tested(labels=[*SHAPES[:-1], "tree"]))
    assert any("1 of 8 names differ" in text for text in warnings_of(caplog))


def test_taps_of_another_config_are_refused(tested):
    with pytest.raises(InputError, match=r"has out_indices 0 1 1 3, and the segmentor 0 1 2 3: give --out_ind"):
        testing.main(tested(out_indices=[0, 1, 1, 3]))


# Files


def test_a_picture_shows_the_right_labels_where_there_are_any(tested, tmp_path):
    testing.main(tested("--show-dir", tmp_path / "with"))
    testing.main(tested("--show-dir", tmp_path / "without", "--format-only", "--work-dir", tmp_path))
    widths = {}
    for name in ("with", "without"):
        (path, _) = sorted((tmp_path / name).iterdir())
        with Image.open(path) as picture:
            widths[name] = picture.width
    assert widths["with"] > 1.4 * widths["without"]


@pytest.mark.parametrize(("options", "smallest"), [((), 1), (("to_label_id=False",), 0), (("to_label_id=True",), 1)])
def test_label_maps_count_from_where_they_are_told(tested, tmp_path, monkeypatch, options, smallest):
    # Broken by an option that is read and forgotten.
    monkeypatch.setattr(testing, "predict_each", all_of_class_0)
    folder = tmp_path / "maps"
    config = tested("--format-only", "--eval-options", f"imgfile_prefix={folder}", *options)
    testing.main(config)
    with Image.open(next(folder.glob("*.png"))) as label_map:
        assert np.unique(np.asarray(label_map)).tolist() == [smallest]
    assert adds_one(config) is bool(smallest)


def test_options_that_do_nothing_or_make_no_sense_are_said(caplog):
    check(read_test([TINY, "x.pth", "--eval-options", "efficient_test=True"]))
    assert "efficient_test has no effect" in caplog.text
    with pytest.raises(InputError, match="to_label_id=perhaps: must be True or False"):
        check(read_test([TINY, "x.pth", "--eval-options", "to_label_id=perhaps"]))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--out", "{file}/scores.json"), "--out {file}: cannot be written"),
        (("--out", "{folder}"), "--out {folder}: is a folder"),
        (("--show-dir", "{file}/deep/shown"), "--show_dir {file}/deep/shown: cannot be written"),
        (
            ("--format-only", "--eval-options", "imgfile_prefix={file}/maps"),
            "--eval_options imgfile_prefix {file}/maps: cannot be written",
        ),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(tested, tmp_path, monkeypatch, flags, said):
    # Broken by scores that are lost after hours, since the file that they go to cannot be made.
    places = {"file": tmp_path / "a file", "folder": tmp_path}
    places["file"].write_text("no folder")
    monkeypatch.setattr(testing, "read_weights", lambda _: pytest.fail("the work has begun"))
    with pytest.raises(InputError) as caught:
        testing.main(tested(*(flag.format(**places) for flag in flags)))
    assert str(caught.value).startswith(said.format(**places))
    assert "\n" not in str(caught.value)


def test_looking_leaves_nothing_behind(tested, tmp_path, monkeypatch):
    out = tmp_path / "new" / "scores.json"
    with monkeypatch.context() as patch:
        patch.setattr(testing, "read_weights", lambda _: (_ for _ in ()).throw(InputError("the work begins")))
        with pytest.raises(InputError, match="the work begins"):
            testing.main(tested("--out", out, "--show-dir", tmp_path / "shown"))
    assert not out.parent.exists()
    assert not (tmp_path / "shown").exists()
    for _ in range(2):  # our own scores are replaced
        testing.main(tested("--out", out))
    assert json.loads(out.read_text())["checkpoint"]


@pytest.mark.parametrize(
    ("flags", "victim"),
    [
        (("--show-dir", "{data}/images/validation"), "images/validation/ADE_val_00000001.png"),
        (
            ("--format-only", "--eval-options", "imgfile_prefix={data}/annotations/validation"),
            "annotations/validation/ADE_val_00000001.png",
        ),
        (("--out", "{data}/classes.txt"), "classes.txt"),
    ],
)
def test_data_are_not_overwritten(tested, tmp_path, scenes, monkeypatch, flags, victim):
    # Broken by label maps and images that a test replaces by its results.
    data = shutil.copytree(scenes, tmp_path / "data")
    if not (data / victim).exists():
        (data / victim).write_bytes((data / victim).with_suffix(".jpg").read_bytes())
        (data / victim).with_suffix(".jpg").unlink()
    before, flags = (data / victim).read_bytes(), [flag.format(data=data) for flag in flags]
    with monkeypatch.context() as patch:
        patch.setattr(testing, "read_weights", lambda _: pytest.fail("the work has begun"))
        with pytest.raises(InputError, match=r"not written by beit; choose another name, or --overwrite"):
            testing.main(tested("--data_root", data, *flags))
    assert (data / victim).read_bytes() == before
    monkeypatch.setattr(testing, "predict_each", all_of_class_0)
    testing.main(tested("--data_root", data, *flags, "--overwrite"))
    assert (data / victim).read_bytes() != before
    if "annotations" in victim:
        testing.main(tested("--data_root", data, *flags))  # by now these are ours


@pytest.mark.parametrize("recorded", [{"labels": list(SHAPES)}, {}])
def test_a_folder_without_a_list_has_the_classes_of_the_checkpoint(tested, tmp_path, scenes, recorded):
    data = shutil.copytree(scenes, tmp_path / "data")
    (data / "classes.txt").unlink()
    testing.main(tested("--data_root", data, "--out", tmp_path / "scores.json", **recorded))
    names = list(SHAPES) if recorded else [f"class {number}" for number in range(len(SHAPES))]
    assert list(json.loads((tmp_path / "scores.json").read_text())["IoU"]) == names
    (data / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(InputError, match=r"classes\.txt has 2 classes and the checkpoint 8"):
        testing.main(tested("--data_root", data))


# Data


def test_processes_that_see_different_data_stop(scenes, monkeypatch):
    seen = []
    monkeypatch.setattr(testing.distributed, "all_equal", lambda value: seen.append(value))
    config = read_train([TINY, "--data_root", str(scenes)])
    with pytest.raises(InputError, match=r"see different data; process 0 sees 3 images in .*training and 2 images in"):
        Segmentation(config).prepare()
    pairs, classes = find_pairs(scenes / "images/training", scenes / "annotations/training"), find_classes(scenes)
    fewer = type(pairs)(pairs.images[1:], pairs.labels[1:], pairs.root)
    renamed = type(pairs)((pairs.root / "another.jpg", *pairs.images[1:]), pairs.labels, pairs.root)
    for found, of in ((pairs, classes), (pairs, classes), (fewer, classes), (renamed, classes)):
        with pytest.raises(InputError):
            testing.check_data(config, [found], of)
    assert seen[1] == seen[2]
    assert len(set(seen[1:])) == 3


def test_label_maps_without_labels_are_seen_in_training_and_testing(tested, tmp_path, scenes):
    for split in ("training", "validation"):
        for path in (scenes / "images" / split).glob("*.jpg"):
            target = tmp_path / "images" / split / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            mask = tmp_path / "annotations" / split / f"{path.stem}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.tile(np.uint8([0, 255]), (64, 36))).save(mask)
    (tmp_path / "classes.txt").write_text("\n".join(SHAPES))
    with pytest.raises(InputError, match=r"no pixel has a label in .*training.*: there is only 0 and 255"):
        Segmentation(read_train([TINY, "--data_root", str(tmp_path)])).prepare()
    with pytest.raises(InputError, match=r"no pixel has a label in .*validation.*: there is only 0 and 255"):
        testing.main(tested("--data_root", tmp_path))
