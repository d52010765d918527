import io
import logging
import multiprocessing
import os
import pickle
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from beit.__main__ import main as beit_main
from beit.commands import shards as shards_module
from beit.commands.shards import write_shards
from beit.data import index as index_module
from beit.data.classification import find_images
from beit.data.datasets import ImageDataset, index_images, read_image
from beit.data.loaders import EpochLoader
from beit.data.shards import ShardReader, expand, names_shards
from beit.data.transforms import MaskedImageModelingTransform
from beit.errors import InputError
from beit.masking import BlockwiseMaskGenerator
from beit.storage import atomic_write

IMAGES, LONG_AGO = 23, (1_500_000_000, 1_500_000_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images in two classes, two of them damaged."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        path = folder / f"{'cat' if i < 9 else 'dog'}" / f"{i:02d}.{'png' if i % 3 else 'JPEG'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    (folder / "cat" / "04.png").write_bytes(b"damaged")
    (folder / "dog" / "13.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    destination = tmp_path_factory.mktemp("shards")
    return write_shards(index_images(folder, destination / "cache"), destination, images_per_shard=5)


def dataset(path, tmp_path, **options):
    transform = MaskedImageModelingTransform(8, 8, mask_generator=BlockwiseMaskGenerator(4, 6, 2))
    return ImageDataset(index_images(path, tmp_path / "cache"), transform, 1, **options)


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(ours, theirs, strict=True)
    )


def make_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


# The same samples as from files


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_files_to_the_bit(folder, shards, tmp_path, workers, caplog):
    # Order, classes, what takes an unreadable image's place, and going on at a batch.
    loaders = [
        EpochLoader(dataset(path, tmp_path, labels=True), 4, seed=5, num_workers=workers) for path in (folder, shards)
    ]
    with caplog.at_level(logging.ERROR):
        for epoch in (0, 1):
            files, packed = (list(loader.epoch(epoch)) for loader in loaders)
            assert same(files, packed)
        assert same(files[2:], list(loaders[1].epoch(1, 2)))
    assert loaders[0].unreadable == loaders[1].unreadable
    assert sorted(loaders[1].unreadable) == [4, 13]
    assert "shards-000000.tar/00000004.png (not an image" in caplog.text
    for loader in loaders:
        loader.close()


def test_two_ranks_read_the_batches_of_one(folder, shards, tmp_path):
    one = list(EpochLoader(dataset(folder, tmp_path), 8, seed=5).epoch(3))
    parts = [
        list(EpochLoader(dataset(shards, tmp_path), 4, seed=5, rank=rank, world_size=2).epoch(3)) for rank in (0, 1)
    ]
    assert same(one, [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in zip(*parts, strict=True)])


def test_classes_and_their_names_are_kept(folder, shards, tmp_path):
    index, files = index_images(shards, tmp_path / "cache"), index_images(folder, tmp_path / "cache")
    assert index.class_names == files.class_names == ("cat", "dog")
    assert [index.class_id(i) for i in range(IMAGES)] == [files.class_id(i) for i in range(IMAGES)]
    assert find_images("image_folder", shards, train=True).class_names == ("cat", "dog")
    with pytest.raises(IndexError):
        index.file(IMAGES)


def test_a_list_gives_shards_in_its_order_without_classes(folder, tmp_path):
    listing = tmp_path / "list.txt"
    order = ["dog/10.png", "cat/02.png", "dog/11.png"]
    listing.write_text("".join(f"{folder}/{name}\n" for name in order))
    pattern = write_shards(index_images(listing, tmp_path / "cache"), tmp_path / "out")
    index = index_images(pattern, tmp_path / "cache")
    assert [index.file(i).read() for i in range(3)] == [(folder / name).read_bytes() for name in order]
    assert index.class_names == ()
    assert not (tmp_path / "out" / "classes.txt").exists()


# The format


def test_the_format_is_webdatasets(folder, shards):
    # Read by the standard library; grouped as WebDataset does: consecutive files with one name up to the first point.
    samples = []
    paths = sorted(os.path.join(os.path.dirname(shards), f) for f in os.listdir(os.path.dirname(shards)) if "tar" in f)
    assert [os.path.basename(path) for path in paths] == [f"shards-{i:06d}.tar" for i in range(5)]
    for path in paths:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                key, extension = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member.name).groups()
                assert member.isreg()
                assert member.mtime == 0
                if not samples or samples[-1]["__key__"] != key:
                    samples.append({"__key__": key})
                assert extension not in samples[-1]
                samples[-1][extension] = archive.extractfile(member).read()
    assert len(samples) == IMAGES
    assert [int(sample["cls"]) for sample in samples] == [0] * 9 + [1] * 14
    assert samples[3]["jpeg"] == (folder / "cat" / "03.JPEG").read_bytes()


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_other_writers(tmp_path, kind):
    # Long names take headers of their own; folders and other files come between; classes come before or after.
    long = "n01440764/" + "x" * 60 + "/" + "y" * 80
    members = [("7.cls", b"3"), ("7.jpg", b"seven"), (f"{long}.PNG", b"long" * 300), (f"{long}.cls", b"1\n")]
    members += [("é.json", b"{}"), ("é.jpeg", b"accent"), ("é.cls", b"0"), ("é.seg.png", b"no image of its own")]
    path = make_tar(tmp_path / "one.tar", members, format=kind)
    with tarfile.open(path, "a") as archive:
        archive.addfile(directory := tarfile.TarInfo("folder"))
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
    index = index_images(path, tmp_path / "cache")
    assert [index.file(i).read() for i in range(len(index))] == [b"seven", b"long" * 300, b"accent"]
    assert [index.class_id(i) for i in range(3)] == [3, 1, 0]
    assert index.class_names == ("0", "1", "2", "3")
    assert index.path(1) == f"{path}/{long}.PNG"


def test_images_without_a_class_leave_all_without(tmp_path, caplog):
    path = make_tar(tmp_path / "one.tar", [("1.jpg", b"a"), ("1.cls", b"0"), ("2.jpg", b"b")])
    index = index_images(path, tmp_path / "cache")
    assert index.class_names == ()
    assert index.class_id(0) is None
    assert "1 of 2 images" in caplog.text


# Which shards


def test_ranges_lists_and_wildcards(tmp_path):
    for name in ("a-0.tar", "a-1.tar", "a-10.tar", "b-08.tar", "b-09.tar", "b-10.tar"):
        (tmp_path / name).write_bytes(b"")

    def names(pattern):
        return [os.path.relpath(path, tmp_path) for path in expand(f"{tmp_path}/{pattern}")]

    assert names("b-{08..10}.tar") == ["b-08.tar", "b-09.tar", "b-10.tar"]
    assert names("a-{0..1}.tar") == ["a-0.tar", "a-1.tar"]
    assert names("{b-1,a-1}0.tar") == ["b-10.tar", "a-10.tar"]
    assert names("a-*.tar") == ["a-0.tar", "a-1.tar", "a-10.tar"]
    assert names("{b,a}-1?.tar") == ["b-10.tar", "a-10.tar"]
    assert names("a-0.tar") == ["a-0.tar"]
    with pytest.raises(InputError, match=r"no such file: \S*/a-2\.tar \(and 7 more\)"):
        names("a-{0..9}.tar")
    with pytest.raises(InputError, match="no file matches"):
        names("c-*.tar")
    with pytest.raises(InputError, match="goes down"):
        names("a-{9..0}.tar")
    with pytest.raises(InputError, match="more than 1000000 files"):
        names("a-{0..99999999999}.tar")
    (tmp_path / "folder.tar").mkdir()
    assert not names_shards(tmp_path / "folder.tar")


# What is refused, in one line


def link(path):
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("1.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)


def hard_link(path):
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("1.jpg")
        info.type, info.linkname = tarfile.LNKTYPE, "other.jpg"
        archive.addfile(info)


def overwritten(path):
    make_tar(path, [("1.jpg", b"x" * 600), ("2.jpg", b"y")])
    content = bytearray(path.read_bytes())
    content[1536:1600] = b"z" * 64
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (link, "1.jpg is a link"),
        (hard_link, "1.jpg is a link"),
        (overwritten, "damaged: there is no valid header at byte 1536"),
        (lambda path: make_tar(path, [("../1.jpg", b"x")]), "is refused"),
        (lambda path: make_tar(path, [("/etc/1.jpg", b"x")]), "is refused"),
        (lambda path: make_tar(path, [("a\nb.jpg", b"x")]), "is refused"),
        (lambda path: make_tar(path, [("1.jpg", b"x")], format=tarfile.GNU_FORMAT).write_bytes(b""), "cut short"),
        (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(3000)), "is not a tar file"),
        (lambda path: make_tar(path, [("1.txt", b"x"), ("2.json", b"")]), r"found 1 \.txt, 1 \.json"),
        (lambda path: make_tar(path, [("1.jpg", b"x"), ("1.cls", b"cat")]), "not the number of a class: b'cat'"),
        (lambda path: make_tar(path, [("1.jpg", b"x"), ("1.cls", b"-1")]), "not the number of a class"),
        (lambda path: make_tar(path, [("1.jpg", b"x"), ("1.cls", b"2000000000")]), "not the number of a class"),
    ],
)
def test_what_is_no_shard_is_refused_in_one_line(tmp_path, make, message):
    make(tmp_path / "shard.tar")
    with pytest.raises(InputError, match=message) as caught:
        index_images(tmp_path / "shard.tar", tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_shard_that_is_cut_short_is_named_wherever_it_is_cut(tmp_path):
    # In a header or between two files the standard library takes the archive for one that ends there.
    path = make_tar(tmp_path / "shard.tar", [(f"{i}.jpg", b"x" * 700) for i in range(3)])
    whole = path.read_bytes()
    for size in (100, 512, 1000, 1536, 1700, 2048, 4500, 4608):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=rf"shard\.tar is cut short.*{size}") as caught:
            index_images(path, tmp_path / "cache")
        assert "\n" not in str(caught.value)
    path.write_bytes(whole[: 4608 + 512])  # all images and one zero block
    assert len(index_images(path, tmp_path / "cache")) == 3


def test_compressed_shards_are_refused(tmp_path):
    with pytest.raises(InputError, match="decompress it"):
        index_images(tmp_path / "shard-{0..9}.tar.gz")


def test_names_of_too_few_classes_are_refused(tmp_path):
    make_tar(tmp_path / "one.tar", [("1.jpg", b"a"), ("1.cls", b"5")])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(InputError, match="has 2 names, but there is a class 5"):
        index_images(tmp_path / "one.tar", tmp_path / "cache")


def test_a_shard_cut_short_later_is_unreadable_images(folder, tmp_path):
    # As files that go missing: replaced and counted, the same ones for all.
    pattern = write_shards(index_images(folder, tmp_path / "cache"), tmp_path, 12)
    images = dataset(pattern, tmp_path)
    with open(tmp_path / "shards-000001.tar", "r+b") as shard:
        shard.truncate(2000)
    loader = EpochLoader(images, 4, max_unreadable=23)
    list(loader.epoch(0))
    assert set(loader.unreadable.values()) >= {"the shard is cut short"}
    (tmp_path / "shards-000001.tar").unlink()
    fresh = pickle.loads(pickle.dumps(images))
    assert dict(fresh[0, 20]["unreadable"])[20] == "no such file or directory"


# Which files of a shard are images


def listed(tmp_path, members, cache="cache"):
    path = make_tar(tmp_path / "one.tar", members)
    index = index_images(path, tmp_path / cache)
    return {os.path.relpath(index.path(i), path): index.class_id(i) for i in range(len(index))}, index


def test_names_with_dots_are_images_by_their_last_part(tmp_path, caplog):
    # Three of four photographs of a shard went missing.
    members = [("Screenshot 10.11.12.png", b"a"), ("Screenshot 10.11.12.cls", b"1"), ("n014_1.0.JPEG", b"b")]
    members += [("n014_1.cls", b"0"), ("img.2024.05.jpg", b"c"), ("img.2024.06.jpg", b"d"), ("img.cls", b"2")]
    found, _ = listed(tmp_path, members)
    assert found == {"Screenshot 10.11.12.png": 1, "n014_1.0.JPEG": 0, "img.2024.05.jpg": 2, "img.2024.06.jpg": 2}
    assert "left out" not in caplog.text


def test_what_belongs_to_an_image_is_not_one_and_what_belongs_to_none_is_said(tmp_path, caplog):
    members = [("a/1.jpg", b"x"), ("a/1.json", b"{}"), ("a/1.seg.png", b"y"), ("a/._1.jpg", b"z"), ("2.txt", b"")]
    members += [("b.0.jpg", b"x"), ("b.0.txt", b""), ("b.caption.txt", b""), ("readme", b""), ("3.cls", b"1")]
    found, index = listed(tmp_path, members)
    assert list(found) == ["a/1.jpg", "b.0.jpg"]
    assert index.left_out == ("1 .seg.png", "1 .txt", "1 no extension", "1 .cls")
    assert "left out 1 .seg.png, 1 .txt, 1 no extension, 1 .cls" in caplog.text


@pytest.mark.parametrize("twice", ["x.jpg", "x.cls", "y.json"])
def test_a_name_that_is_there_twice_is_refused(tmp_path, twice):
    # Both images would get the class of the second; WebDataset refuses them too.
    members = [("x.jpg", b"a"), ("x.cls", b"0"), ("y.jpg", b"b"), ("y.json", b""), ("y.cls", b"1"), (twice, b"1")]
    with pytest.raises(InputError, match=f"two files {twice}"):
        listed(tmp_path, members)


def test_archives_that_were_joined_are_refused(tmp_path):
    # tar reads up to the first end mark: 20 of 40 images.
    parts = [make_tar(tmp_path / f"{name}.tar", [(f"{name}.jpg", b"x" * 700)]).read_bytes() for name in "ab"]
    (tmp_path / "joined.tar").write_bytes(b"".join(parts))
    with pytest.raises(InputError, match=r"joined\.tar goes on after its end mark at byte 1536"):
        index_images(tmp_path / "joined.tar", tmp_path / "cache")
    (tmp_path / "padded.tar").write_bytes(parts[0] + bytes(3_000_000))  # as tar --blocking-factor writes
    assert len(index_images(tmp_path / "padded.tar", tmp_path / "cache")) == 1


def test_classes_that_never_occur_are_named(tmp_path, caplog):
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    with caplog.at_level(logging.INFO):
        listed(tmp_path, [("1.jpg", b"a"), ("1.cls", b"1"), ("2.jpg", b"b"), ("2.cls", b"1")])
    assert "2 images in 4 classes, 0 to 2 in each" in caplog.text
    assert "left out 3 classes without images (ant, cat, dog)" in caplog.text


def test_class_names_are_lines_and_nothing_else(tmp_path):
    # Other breaks that Python knows shifted the classes; a byte order mark and bytes of Latin-1 are no error.
    (tmp_path / "classes.txt").write_bytes("\ufeffa\x0bb\u2028c\r\nd\n".encode() + b"caf\xe9\n")
    _, index = listed(tmp_path, [("1.jpg", b""), ("1.cls", b"2")])
    assert index.class_names == ("a\x0bb\u2028c", "d", os.fsdecode(b"caf\xe9"))
    (tmp_path / "classes.txt").write_text("a\nb\nc\n", encoding="utf-16")
    with pytest.raises(InputError, match="not UTF-8 text"):
        index_images(tmp_path / "one.tar", tmp_path / "cache")


def test_folders_that_exist_are_taken_as_they_are_spelled(tmp_path):
    # `beit shards` prints such paths, and of "[2024]" and "{a,b}" no file fitted.
    folder = tmp_path / "[2024] {a,b} *"
    folder.mkdir()
    for name in ("s-0.tar", "s-1.tar", "[x]-0.tar"):
        (folder / name).write_bytes(b"")
    for pattern, names in {
        "s-{0..1}.tar": ["s-0.tar", "s-1.tar"],
        "s-*.tar": ["s-0.tar", "s-1.tar"],
        "[x]-0.tar": ["[x]-0.tar"],
        "[x]-{0..0}.tar": ["[x]-0.tar"],
    }.items():
        assert expand(f"{folder}/{pattern}") == [f"{folder}/{name}" for name in names]


@pytest.mark.parametrize("pattern", ["{s,extra}-*.tar", "s-{0,7*}.tar", "[a-r]*.tar"])
def test_a_part_of_a_pattern_that_matches_nothing_is_an_error(tmp_path, pattern):
    (tmp_path / "s-0.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"no file matches \S*(extra-\*|s-7\*|\[a-r\]\*)\.tar"):
        expand(f"{tmp_path}/{pattern}")


def test_a_shard_that_is_rewritten_with_its_old_time_stamp_is_scanned_again(tmp_path):
    # Old offsets into new bytes gave other images than those listed.
    for content in (b"old", b"new"):
        path = make_tar(
            tmp_path / "new.tar", [("1.jpg", content * 400), ("2.jpg", content)][:: 1 if content == b"old" else -1]
        )
        path.replace(tmp_path / "one.tar")
        os.utime(tmp_path / "one.tar", LONG_AGO)
        index = index_images(tmp_path / "one.tar", tmp_path / "cache")
        assert {index.file(i).read() for i in range(2)} == {content * 400, content}


def test_the_fingerprint_of_shards_tells_other_images_of_the_same_names(tmp_path):
    prints = {
        listed(tmp_path, [("1.jpg", content), ("1.cls", label)], f"cache{content}{label}")[1].fingerprint()
        for content, label in ((b"a", b"0"), (b"aa", b"0"), (b"a", b"1"), (b"b", b"0"))
    }
    assert len(prints) == 3  # the bytes themselves are not read


# The kept index


@pytest.fixture
def scans(monkeypatch):
    calls = []
    scan = index_module.scan
    monkeypatch.setattr(index_module, "scan", lambda *arguments: calls.append(1) or scan(*arguments))
    return calls


def test_shards_are_scanned_once_and_again_when_they_change(folder, tmp_path, scans):
    pattern = write_shards(index_images(folder, tmp_path / "cache"), tmp_path, 8)
    paths = sorted(tmp_path.glob("*.tar"))
    for path in paths:
        os.utime(path, LONG_AGO)
    everything = f"{tmp_path}/shards-*.tar"
    first, second = (index_images(everything, tmp_path / "cache") for _ in range(2))
    assert len(scans) == 1
    assert [first.path(i) for i in range(IMAGES)] == [second.path(i) for i in range(IMAGES)]
    assert all(first.class_id(i) == second.class_id(i) for i in range(IMAGES))
    assert second.file(20).read() == first.file(20).read()
    assert not second._names.blob.flags.writeable  # mapped, not read
    os.utime(paths[1], (1_500_000_001, 1_500_000_001))
    assert len(index_images(everything, tmp_path / "cache")) == IMAGES
    assert len(scans) == 2
    paths[2].rename(tmp_path / "elsewhere")
    assert len(index_images(everything, tmp_path / "cache")) == 16
    assert len(scans) == 3
    with pytest.raises(InputError, match="no such file"):
        index_images(pattern, tmp_path / "cache")


def test_a_bit_that_flipped_in_the_kept_index_is_noticed(folder, tmp_path, scans):
    write_shards(index_images(folder, tmp_path / "cache"), tmp_path / "out")
    path = tmp_path / "out" / "shards-000000.tar"
    os.utime(path, LONG_AGO)
    index_images(path, tmp_path / "kept")
    (kept,) = (tmp_path / "kept").glob("*/names.npy")
    content = bytearray(kept.read_bytes())
    content[content.index(b"00000000.jpeg") + 4] ^= 1
    kept.write_bytes(bytes(content))
    assert index_images(path, tmp_path / "kept").path(0).endswith("00000000.jpeg")
    assert len(scans) == 2


def test_a_million_images_in_shards_stay_small(tmp_path):
    path = make_tar(tmp_path / "one.tar", [(f"{i:08d}.{e}", b"1") for i in range(2000) for e in ("jpg", "cls")])
    assert len(pickle.dumps(index_images(path, tmp_path / "cache"))) < 2000 * 60  # of 150 MB for a million


# Reading


def read_in_child(reader, path, queue):
    queue.put([reader.read(path, i, 1) for i in range(50)])


def test_descriptors_can_be_shared_with_forked_processes(tmp_path):
    # A position of its own for each read: with seek and read, parent and child would move each other's.
    path = str(tmp_path / "file")
    with open(path, "wb") as file:
        file.write(bytes(range(256)))
    reader = ShardReader()
    reader.read(path, 0, 1)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(reader, path, queue))
    child.start()
    for _ in range(200):
        assert reader.read(path, 100, 3) == bytes([100, 101, 102])
    assert queue.get(timeout=30) == [bytes([i]) for i in range(50)]
    child.join()


def test_few_descriptors_stay_open(tmp_path):
    paths = [str(tmp_path / str(i)) for i in range(9)]
    for path in paths:
        with open(path, "wb") as file:
            file.write(path[-1].encode())

    def count():
        return sum(os.path.realpath(f"/proc/self/fd/{name}") in paths for name in os.listdir("/proc/self/fd"))

    reader = ShardReader(limit=3)
    for _ in range(2):
        assert [reader.read(path, 0, 1) for path in paths] == [path[-1].encode() for path in paths]
        assert count() == 3
    del reader
    assert count() == 0


# The command


def test_the_command_writes_shards_and_says_how_to_read_them(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BEIT_HOME", str(tmp_path / "home"))
    out = tmp_path / "out dir"
    assert beit_main(["shards", str(folder), str(out), "--images_per_shard", "10"]) == 0
    assert capsys.readouterr().out == f"--data_path '{out}/shards-{{000000..000002}}.tar'\n"
    index = index_images(f"{out}/shards-{{000000..000002}}.tar", tmp_path / "cache")
    assert read_image(index.file(0)).size == (24, 20)
    before = [path.read_bytes() for path in sorted(out.glob("*.tar"))]
    again = write_shards(index_images(folder, tmp_path / "cache"), tmp_path / "again", 10)
    assert [p.read_bytes() for p in sorted((tmp_path / "again").glob("*.tar"))] == before
    assert beit_main(["shards", again, str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert beit_main(["shards", again]) == 2


def test_a_file_that_cannot_be_read_keeps_its_place(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / "in" / f"{i}.png")
    index = index_images(tmp_path / "in", tmp_path / "cache")
    (tmp_path / "in" / "1.png").unlink()
    packed = index_images(write_shards(index, tmp_path / "out"), tmp_path / "cache")
    assert [len(packed.file(i).read()) > 0 for i in range(3)] == [True, False, True]


def test_shards_of_a_killed_command_are_not_taken_for_the_whole(folder, tmp_path, monkeypatch):
    # Four of 150 were: a wildcard read them without a word, and a second try was refused.
    out, written = tmp_path / "out", []

    def killed_at_the_third(path):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return atomic_write(path)

    index = index_images(folder, tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(shards_module, "atomic_write", killed_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            write_shards(index, out, 5)
    with pytest.raises(InputError, match="no file matches"):
        index_images(f"{out}/*.tar", tmp_path / "cache")
    assert len(index_images(write_shards(index, out, 5), tmp_path / "cache")) == IMAGES
    assert sorted(os.listdir(out)) == ["classes.txt", *(f"shards-{number:06d}.tar" for number in range(5))]


@pytest.mark.parametrize(
    ("name", "fits"), [("a\nb", False), ("a\rb", False), ("a\x0bb\u2028", True), (b"caf\xe9", True)]
)
def test_class_names_come_through_shards_or_are_refused(tmp_path, name, fits):
    for folder in (name, "z"):
        (tmp_path / "in" / os.fsdecode(folder)).mkdir(parents=True)
        (tmp_path / "in" / os.fsdecode(folder) / "1.jpg").write_bytes(b"")
    index = index_images(tmp_path / "in", tmp_path / "cache")
    if fits:
        packed = index_images(write_shards(index, tmp_path / "out"), tmp_path / "cache")
        assert packed.class_names == index.class_names == (os.fsdecode(name), "z")
    else:
        with pytest.raises(InputError, match="one name per line"):
            write_shards(index, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_images_of_any_name_come_through_shards(tmp_path):
    # From a list of any names: without an extension of images they would be left out of what is read back.
    names = ["photo", "photo.jpg_large", "1.JPG", "2.tif", "x." + "y" * 200]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "list.txt").write_text("\n".join(names))
    index = index_images(tmp_path / "list.txt", tmp_path / "cache")
    packed = index_images(write_shards(index, tmp_path / "out"), tmp_path / "cache")
    assert [packed.file(i).read().decode() for i in range(len(packed))] == names
