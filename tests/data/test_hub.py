"""Data sets of Hugging Face in local folders: the same samples, and the same runs, as from folders of files."""

import io
import json
import pickle

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from beit.__main__ import main as beit
from beit.data.classification import check_classes, find_images
from beit.data.datasets import ImageDataset, index_images
from beit.data.hub import VALIDATION, open_hub
from beit.data.loaders import EpochLoader
from beit.data.transforms import MaskedImageModelingTransform
from beit.errors import InputError
from semantic_segmentation.data import SegmentationDataset, check_labels, named_classes, pairs_of

CLASSES = ("ant", "bee", "cat")
TINY = ("--model_kwargs", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2", "--input_size", "32")
QUIET = ("--device", "cpu", "--num_workers", "0", "--batch_size", "4", "--epochs", "1", "--warmup_epochs", "0")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The same images in a folder of files, in Parquet with and without the library's types, and saved by it."""
    folder = tmp_path_factory.mktemp("site")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        rows = {"image": [], "label": []}
        for label, name in enumerate(CLASSES):
            (folder / "files" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(256, size=(5, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((48, 40)).save(folder / "files" / split / name / f"{number}.png")
                content = (folder / "files" / split / name / f"{number}.png").read_bytes()
                rows["image"].append({"bytes": content, "path": None})
                rows["label"].append(label)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
        rows = datasets.Dataset.from_dict(rows, features=features)
        for kind in ("typed", "plain"):
            (folder / kind).mkdir(exist_ok=True)
        official = {"train": "train", "val": "validation"}[split]
        rows.to_parquet(folder / "typed" / f"{official}-00000.parquet")
        encoded = [row["bytes"] for row in rows.cast_column("image", datasets.Image(decode=False))["image"]]
        names = [CLASSES[label] for label in rows["label"]]
        pq.write_table(
            pa.table({"jpg": encoded, "cls": names}), folder / "plain" / f"{official}.parquet", row_group_size=5
        )
        (folder / "saved").mkdir(exist_ok=True)
        rows.save_to_disk(folder / "saved" / official)
    (folder / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    return folder


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("BEIT_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    monkeypatch.setenv("BEIT_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # which it turns on
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def samples(source, workers=0):
    dataset = ImageDataset(source, MaskedImageModelingTransform(32, None), seed=3, labels=True)
    loader = EpochLoader(dataset, 4, seed=3, num_workers=workers)
    batches = [{name: batch[name] for name in ("image", "label")} for batch in loader.epoch(1)]
    loader.close()
    return batches


@pytest.mark.parametrize("kind", ["typed", "plain", "saved"])
def test_samples_and_labels_are_those_of_the_same_files_in_a_folder(site, kind):
    folder, found = index_images(site / "files" / "train"), index_images(f"hf:{site / kind}")
    assert (found.class_names, len(found)) == (CLASSES, 12)
    for one, other in zip(samples(folder), samples(found), strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["label"], other["label"])


def test_samples_do_not_depend_on_workers_and_a_source_is_pickled(site):
    found = pickle.loads(pickle.dumps(open_hub(f"hf:{site / 'typed'}:train")))
    for one, other in zip(samples(found), samples(found, workers=2), strict=True):
        assert torch.equal(one["image"], other["image"])


def test_validation_takes_its_split_and_a_named_split_no_other(site, caplog):
    source = f"hf:{site / 'typed'}"
    train, val = (find_images("IMNET", source, train=train) for train in (True, False))
    assert (len(train), len(val)) == (12, 6)
    assert val.fingerprint() == index_images(f"{source}:validation").fingerprint()
    assert len(index_images(f"{source}:train[:3]")) == 3
    with pytest.raises(InputError, match="--eval_data_path is missing"):
        find_images("IMNET", f"{source}:train", train=False)
    assert len(find_images("IMNET", f"{source}:train", f"{source}:validation", train=False)) == 6


def test_a_fingerprint_tells_other_images_and_other_classes_and_not_how_rows_are_stored(site, tmp_path):
    prints = {kind: index_images(f"hf:{site / kind}").fingerprint() for kind in ("typed", "plain", "saved")}
    assert len(set(prints.values())) == 1
    table = pq.read_table(site / "plain" / "train.parquet")
    (tmp_path / "other").mkdir()
    pq.write_table(table.set_column(1, "cls", [["ant"] * 11 + ["bee"]]), tmp_path / "other" / "train.parquet")
    assert index_images(f"hf:{tmp_path / 'other'}").fingerprint() not in prints.values()


def test_columns_are_named_where_types_do_not_tell(tmp_path, site, caplog):
    def png(value):
        Image.new("L", (8, 8), value).save(buffer := io.BytesIO(), "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    names = {name: datasets.ClassLabel(names=["a", "b"]) for name in ("coarse", "fine")}
    features = datasets.Features(
        {"photo": datasets.Image(), "depth": datasets.Image(), **names, "n": datasets.Value("int32")}
    )
    rows = {"photo": [png(9)] * 3, "depth": [png(1)] * 3, "coarse": [0, 1, 0], "fine": [1, 1, 0], "n": [4, 0, 2]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "rows")
    found = open_hub(f"hf:{tmp_path / 'rows'}")
    assert "column photo is taken, of photo, depth; ?image=COLUMN names another" in caplog.text
    assert [found.class_id(i) for i in range(3)] == [0, 1, 0]
    found = open_hub(f"hf:{tmp_path / 'rows'}?image=depth&label=n")
    assert found.class_names == ("0", "1", "2", "3", "4")
    assert [found.class_id(i) for i in range(3)] == [4, 0, 2]
    with Image.open(found.file(0)) as image:
        assert image.getpixel((0, 0)) == 1
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    unlabelled = datasets.Dataset.from_dict({"image": [png(1)] * 2, "label": [-1, -1]}, features=features)
    unlabelled.save_to_disk(tmp_path / "test set")
    assert open_hub(f"hf:{tmp_path / 'test set'}").class_names == ()


def test_numbers_and_truth_values_are_classes(tmp_path, caplog):
    for name, labels in {"from1": [1, 2], "binary": [True, False], "large": [0, 10**6]}.items():
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"image": [b"x"] * 2, "label": labels}), tmp_path / name / "train.parquet")
    assert open_hub(f"hf:{tmp_path / 'from1'}?image=image").class_names == ("0", "1", "2")
    assert "1 class without images (0)" in caplog.text
    found = open_hub(f"hf:{tmp_path / 'binary'}?image=image")
    assert (found.class_names, found.class_id(0), found.class_id(1)) == (("0", "1"), 1, 0)
    with pytest.raises(InputError, match="column label holds class numbers up to 1000000, of 999999 at most"):
        open_hub(f"hf:{tmp_path / 'large'}?image=image")


def test_which_of_several_columns_has_the_labels_is_told(tmp_path, caplog):
    pq.write_table(pa.table({"image": [b"x"] * 2, "fine_label": [1, 0], "cls": ["b", "c"]}), tmp_path / "train.parquet")
    assert open_hub(f"hf:{tmp_path}?image=image").class_names == ("b", "c")
    assert "column cls is taken, of cls, fine_label; ?label=COLUMN names another" in caplog.text


@pytest.mark.parametrize(
    ("labels", "first"),
    [([0, 1, -1, 1], 2), ([0, None, 1, None], 1), (["a", "b", "c", ""], 3), ([None, "b", "c", "d"], 0)],
)
def test_a_few_rows_without_a_class_are_told(tmp_path, caplog, labels, first):
    pq.write_table(pa.table({"image": [b"x"] * 4, "label": labels}), tmp_path / "train.parquet")
    source = f"hf:{tmp_path}?image=image"
    assert not open_hub(source).class_names
    assert f"{sum(label in (-1, None, '') for label in labels)} of 4 rows have none in column label" in caplog.text
    assert f"the first row {first}" in caplog.text
    with pytest.raises(InputError, match="without a class: every row"):
        find_images("IMNET", source, train=True)


def test_other_classes_in_validation_name_both_splits(site, tmp_path):
    for split, names in (("train", ["ant", "bee"]), ("test", ["ant", "cat"])):
        pq.write_table(pa.table({"image": [b"x"] * 2, "label": names}), tmp_path / f"{split}.parquet")
    source = f"hf:{tmp_path}?image=image"
    with pytest.raises(InputError, match=r"1 in hf:\S+:train\?image=image but not in hf:\S+:test\?image=image \(bee\)"):
        check_classes([find_images("IMNET", source, train=train) for train in (True, False)])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:", "is given as hf:NAME_OR_FOLDER"),
        ("hf:{site}/typed:test", "cannot be opened: .*test"),
        ("hf:{site}/saved:test", "has no split test: it has train, validation"),
        ("hf:{site}/typed?picture=x", r"\?picture: known are image"),
        ("hf:{site}/typed?image=photo", "no column 'photo'.*it has image, label"),
        ("hf:{site}/typed?image=label", "column label holds int64, not images"),
        ("hf:{site}/plain?image=cls", "column cls begins with 'ant', no image file; "),
        ("hf:{site}/nothing", "cannot be opened: "),
    ],
)
def test_mistakes_are_one_line(site, source, message):
    with pytest.raises(InputError, match=message) as found:
        open_hub(source.format(site=site))
    assert "\n" not in str(found.value)


def test_without_the_library_a_line_says_what_to_install_and_a_folder_of_parquet_how_it_is_given(site, monkeypatch):
    with pytest.raises(InputError, match="given as hf:FOLDER"):
        index_images(site / "plain")
    with pytest.raises(InputError, match=r"has no split .*validation.*: it has train"):
        open_hub(f"hf:{site / 'saved' / 'train'}", VALIDATION)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        open_hub(f"hf:{site / 'typed'}")


def log_of(folder):
    entries = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [
        {name: value for name, value in entry.items() if name.endswith(("loss", "acc", "acc1"))} for entry in entries
    ]


@pytest.mark.parametrize(
    "job",
    [
        ("pretrain", "--target", "pixels", "--num_mask_patches", "6", "--min_mask_patches_per_block", "2", *TINY),
        ("finetune", *TINY),
        ("probe", "--patch_size", "8", *TINY),
    ],
    ids=lambda job: job[0],
)
def test_a_run_from_parquet_is_the_run_from_files(site, tmp_path, job):
    files = site / "files" / "train" if job[0] == "pretrain" else site / "files"
    quiet = QUIET if job[0] != "probe" else QUIET[:-2]  # which has no warm-up
    for name, data in (("files", files), ("parquet", f"hf:{site / 'typed'}")):
        assert beit([*job, *quiet, "--data_path", str(data), "--output_dir", str(tmp_path / name)]) == 0
    assert log_of(tmp_path / "files") == log_of(tmp_path / "parquet") != []


def test_predict_and_knn_and_visualize_read_rows(site, tmp_path, capsys):
    from beit.storage import save_checkpoint
    from beit.zoo import create_model

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = create_model("beit_tiny_patch16_224", **sizes)
    save_checkpoint(tmp_path / "x.pth", {"model": model.state_dict(), "args": {"input_size": 32}, "labels": [*CLASSES]})
    source, checkpoint = f"hf:{site / 'typed'}:validation", ("--checkpoint", str(tmp_path / "x.pth"))
    assert beit(["predict", source, *checkpoint, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [f"{source}#{i}" for i in range(6)]
    files = sorted((site / "files" / "val").glob("*/*.png"))
    assert beit(["predict", *map(str, files), *checkpoint, "--json"]) == 0
    assert [row["score"] for row in rows] == [
        json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()
    ]
    knn = ["knn", *checkpoint, "--num_workers", "0", "--device", "cpu", "--k", "2", "--data_path"]
    outputs = []
    for data in (site / "files", f"hf:{site / 'typed'}"):
        assert beit([*knn, str(data)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_segmentation_reads_a_column_of_label_maps(tmp_path):
    def png(pixels):
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(3, 16, 20, 3), dtype=np.uint8)
    labels = rng.integers(3, size=(3, 16, 20), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    rows = {"image": [*map(png, images)], "annotation": [*map(png, labels)]}
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "rows" / split)
    (tmp_path / "rows" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    pairs = pairs_of(f"hf:{tmp_path / 'rows'}", "", "")
    assert [pairs.name(i) for i in range(3)] == ["00000000", "00000001", "00000002"]
    check_labels(pairs, named_classes(("a", "b", "c")), reduce_zero_label=False)
    dataset = SegmentationDataset(pickle.loads(pickle.dumps(pairs)), num_classes=3, reduce_zero_label=False)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        sample = dataset[0, number]
        assert np.array_equal(sample["image"], np.moveaxis(image, -1, 0))
        assert np.array_equal(sample["label"], label)
    assert not pairs_of(f"hf:{tmp_path / 'rows'}", "", None).labels


@pytest.mark.parametrize("label", [[0, 1], b"\x89PNG", 0.5])
def test_labels_of_another_type_are_one_line(tmp_path, label):
    pq.write_table(pa.table({"image": [b"a", b"b"], "label": [label] * 2}), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"column label holds .*, not names or numbers of classes"):
        open_hub(f"hf:{tmp_path}?image=image&label=label")


def test_paths_in_a_column_of_text_are_opened(site, tmp_path):
    (path,) = (site / "files" / "val" / "ant").glob("0.png")
    pq.write_table(pa.table({"file": [str(path)]}), tmp_path / "train.parquet")
    assert open_hub(f"hf:{tmp_path}?image=file").file(0) == str(path)


def test_a_file_is_no_data_set(site):
    with pytest.raises(InputError, match="is a file: give the folder"):
        open_hub(f"hf:{next((site / 'typed').glob('*.parquet'))}")


def test_offline_no_server_is_asked():
    with pytest.raises(InputError, match=r"nowhere cannot be opened: .*[Oo]ffline"):
        open_hub("hf:nowhere")
