"""Shards and WebDataset's own library: each reads what the other has written."""

import glob
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from beit.commands.shards import write_shards
from beit.data.datasets import index_images

CLASSES = ("cat", "dog")
IMAGES = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        path = folder / CLASSES[number % 2] / f"n.{number:02d}.{'png' if number % 3 else 'JPEG'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return folder


def test_webdataset_reads_what_we_write(folder, tmp_path):
    # Broken by a class apart from its image, a name whose point would end the key, another order of the samples.
    index = index_images(folder, tmp_path / "cache")
    pattern = write_shards(index, tmp_path / "shards", images_per_shard=3)
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert len(samples) == len(index) == IMAGES
    for number, sample in enumerate(samples):
        (extension,) = {"jpeg", "png"} & set(sample)
        assert sample[extension] == Path(index.path(number)).read_bytes()
        assert int(sample["cls"]) == index.class_id(number)
    decoded = webdataset.WebDataset(pattern, shardshuffle=False).decode("rgb8").to_tuple("jpeg;png", "cls")
    assert [(image.shape, label) for image, label in decoded] == [
        ((20, 24, 3), index.class_id(number)) for number in range(IMAGES)
    ]


def test_we_read_what_webdataset_writes(folder, tmp_path):
    # Broken by a reader that takes our own naming for the format: other keys, other members beside, another order.
    files = sorted(glob.glob(f"{folder}/*/*"))
    with webdataset.ShardWriter(f"{tmp_path}/wds-%03d.tar", maxcount=2, verbose=0) as shards:
        for number, path in enumerate(files):
            image = {path.rpartition(".")[2].lower(): Path(path).read_bytes()}
            others = {"json": {"of": path}, "seg.png": b"no image of its own"}
            shards.write({"__key__": f"part/{number}", "cls": number % 3, **others, **image})
    index = index_images(f"{tmp_path}/wds-{{000..003}}.tar", tmp_path / "cache")
    assert [index.file(number).read() for number in range(len(index))] == [Path(path).read_bytes() for path in files]
    assert [index.class_id(number) for number in range(len(index))] == [number % 3 for number in range(IMAGES)]
    assert index.class_names == ("0", "1", "2")
