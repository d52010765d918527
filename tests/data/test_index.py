import logging
import os
import shutil
import tracemalloc
from collections import Counter

import pytest
from PIL import Image

from beit.data import index as index_module
from beit.data.classification import find_images
from beit.data.datasets import index_images, read_image
from beit.errors import InputError

LONG_AGO = (1_500_000_000, 1_500_000_000)


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def settle(root):
    """Makes every folder look old, as folders of real data are: only then is a listing kept."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, LONG_AGO)


def paths(index, root):
    return [os.path.relpath(index.path(i), root).replace(os.sep, "/") for i in range(len(index))]


@pytest.fixture
def listings(monkeypatch):
    """Counts how often a folder or list is really read."""
    calls = Counter()

    def counting(function):
        def call(source):
            calls[function.__name__] += 1
            return function(source)

        return call

    for name in ("_list_folder", "_list_file"):
        monkeypatch.setattr(index_module, name, counting(getattr(index_module, name)))
    return calls


def test_class_folders(tmp_path):
    # Order and ids are those of torchvision's ImageFolder; "cat/x" before "cat-b", unlike plain string order.
    touch(
        tmp_path, "dog/2.JPEG", "dog/10.png", "cat/x/1.jpg", "cat/0.webp", "cat-b/7.bmp", "dog/notes.txt", "empty/x.txt"
    )
    index = index_images(tmp_path, tmp_path / ".cache")
    assert paths(index, tmp_path) == ["cat/0.webp", "cat/x/1.jpg", "cat-b/7.bmp", "dog/10.png", "dog/2.JPEG"]
    assert index.class_names == ("cat", "cat-b", "dog")
    assert [index.class_id(i) for i in range(len(index))] == [0, 0, 1, 2, 2]
    assert index.path(-1) == index.path(4)
    with pytest.raises(IndexError):
        index.path(5)


def test_order_and_ids_are_those_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    touch(tmp_path, "b/1.jpg", "b/sub/0.jpg", "b-2/5.tiff", "a/9.PPM", "a/10.pgm", "a/z/y/1.tif", "C/3.jpeg")
    index = index_images(tmp_path, tmp_path.parent / "cache")
    theirs = ImageFolder(tmp_path)
    assert [(index.path(i), index.class_id(i)) for i in range(len(index))] == theirs.samples
    assert list(index.class_names) == theirs.classes


def test_a_train_folder_is_not_chosen(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "val/a/2.jpg")
    assert index_images(tmp_path, tmp_path / ".cache").class_names == ("train", "val")


@pytest.mark.parametrize("names", [["2.jpg", "10.jpg"], ["2.jpg", "sub/10.jpg"]])
def test_images_in_the_folder_itself_have_no_class(tmp_path, names):
    touch(tmp_path, *names)
    index = index_images(tmp_path, tmp_path / ".cache")
    assert len(index) == 2
    assert index.class_names == ()
    assert index.class_id(0) is None


def test_links_are_followed_once_and_hidden_folders_left_out(tmp_path):
    touch(tmp_path, "data/a/1.jpg", "data/.thumbnails/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/a/broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    index = index_images(tmp_path / "data", tmp_path / "cache")
    assert paths(index, tmp_path / "data") == ["a/1.jpg", "a/broken.jpg", "linked/2.jpg"]


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    with open(name, "wb"):
        pass
    index = index_images(tmp_path, tmp_path / ".cache")
    assert os.fsencode(index.path(0)) == name
    assert os.path.exists(index.path(0))


def test_a_list_keeps_its_order_and_takes_both_kinds_of_paths(tmp_path):
    touch(tmp_path, "images/b.jpg", "images/a.jpg", "other place/c d.png")
    listing = tmp_path / "list.txt"
    listing.write_text(f"images/b.jpg\n\n  images/a.jpg\r\n{tmp_path}/other place/c d.png\nimages/b.jpg")
    index = index_images(listing, tmp_path / "cache")
    assert paths(index, tmp_path) == ["images/b.jpg", "images/a.jpg", "other place/c d.png", "images/b.jpg"]
    assert index.class_names == ()


@pytest.mark.parametrize(
    ("make", "path", "message"),
    [
        (lambda root: touch(root, "images/1.jpg"), "imagse", "did you mean 'images'"),
        (lambda root: None, "a/b/c", "does not exist either"),
        (lambda root: None, "x" * 5000, "no such folder"),
        (lambda root: None, "x" * 5000 + "/y.txt", "no such folder"),
        (lambda root: None, "a\0/b", "no such folder"),
        (lambda root: None, "\ud800/b", "no such folder"),
        (lambda root: touch(root, "1.tar", "2.TAR"), ".", "tar shards are given as"),
        (lambda root: touch(root, "d/x.npz", "d/y.NPZ", "d/z"), "d", r"2 \.npz, 1 no extension"),
        (lambda root: (root / "d").mkdir(), "d", "no files at all"),
        (lambda root: touch(root, "list.txt"), "list.txt", "is empty"),
        (lambda root: (root / "list.txt").write_text("gone/1.jpg\n"), "list.txt", "none of the files"),
        (lambda root: touch(root, "one.jpg"), "one.jpg", "is one image"),
        (lambda root: (root / "data.bin").write_bytes(b"PK\0\0"), "data.bin", "not a text file"),
    ],
)
def test_mistakes_say_what_was_looked_for_and_found(tmp_path, make, path, message):
    make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        index_images(tmp_path / path, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_is_listed_once(tmp_path, listings):
    data, cache = tmp_path / "data", tmp_path / "cache"
    touch(data, "a/1.jpg", "b/c/2.jpg")
    settle(data)
    first, second = index_images(data, cache), index_images(data, cache)
    assert listings["_list_folder"] == 1
    assert paths(first, data) == paths(second, data) == ["a/1.jpg", "b/c/2.jpg"]
    assert first.class_names == second.class_names
    assert [second.class_id(i) for i in range(2)] == [0, 1]


@pytest.mark.parametrize("change", ["add", "remove", "new folder", "in a folder without images"])
def test_a_changed_folder_is_listed_again(tmp_path, listings, change):
    data, cache = tmp_path / "data", tmp_path / "cache"
    touch(data, "a/1.jpg", "b/c/2.jpg", "empty/readme.txt")
    settle(data)
    index_images(data, cache)
    if change == "add":
        touch(data, "b/c/3.jpg")
    elif change == "remove":
        (data / "a/1.jpg").unlink()
    elif change == "new folder":
        touch(data, "d/4.jpg")
    else:
        touch(data, "empty/5.jpg")
    expected = sorted(p.relative_to(data).as_posix() for p in data.rglob("*.jpg"))
    assert paths(index_images(data, cache), data) == expected
    assert listings["_list_folder"] == 2


def test_a_list_is_read_again_only_when_it_changes(tmp_path, listings):
    touch(tmp_path, "1.jpg", "2.jpg")
    listing, cache = tmp_path / "list.txt", tmp_path / "cache"
    listing.write_text("1.jpg\n")
    os.utime(listing, LONG_AGO)
    for _ in range(2):
        assert len(index_images(listing, cache)) == 1
    assert listings["_list_file"] == 1
    listing.write_text("1.jpg\n2.jpg\n")
    assert len(index_images(listing, cache)) == 2


def test_a_folder_still_being_filled_is_not_kept(tmp_path, listings):
    # Its next file may get the time stamp the listing saw, and would then never be found.
    touch(tmp_path / "data", "1.jpg")
    for _ in range(2):
        index_images(tmp_path / "data", tmp_path / "cache")
    assert listings["_list_folder"] == 2


def test_two_folders_share_a_cache(tmp_path):
    touch(tmp_path, "one/1.jpg", "two/2.jpg")
    settle(tmp_path / "one")
    settle(tmp_path / "two")
    for _ in range(2):
        for name, file in (("one", "1.jpg"), ("two", "2.jpg")):
            assert paths(index_images(tmp_path / name, tmp_path / "cache"), tmp_path / name) == [file]


@pytest.mark.parametrize("damage", ["cut short", "garbage", "empty", "missing", "a folder", "no folder", "no files"])
def test_a_damaged_cache_is_no_error(tmp_path, listings, damage):
    data, cache = tmp_path / "data", tmp_path / "cache"
    touch(data, "a/1.jpg", "a/2.jpg")
    settle(data)
    index_images(data, cache)
    (kept,) = cache.iterdir()
    file = kept / "names.npy"
    content = file.read_bytes()
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage in ("no folder", "no files"):
        shutil.rmtree(kept)
        kept.write_bytes(content) if damage == "no folder" else kept.mkdir()
    elif damage != "missing":
        file.write_bytes({"cut short": content[:-3], "garbage": b"\x80\x04x" * 50, "empty": b""}[damage])
    for _ in range(2):  # the second time from the cache, which the first has repaired
        assert paths(index_images(data, cache), data) == ["a/1.jpg", "a/2.jpg"]
    assert listings["_list_folder"] == 2
    assert [path.name for path in cache.iterdir()] == [kept.name]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    touch(tmp_path, "data/1.jpg", "file")
    settle(tmp_path / "data")
    assert len(index_images(tmp_path / "data", tmp_path / "file" / "cache")) == 1


def test_the_cache_is_below_beit_home(tmp_path, monkeypatch):
    monkeypatch.setenv("BEIT_HOME", str(tmp_path / "home"))
    touch(tmp_path / "data", "1.jpg")
    settle(tmp_path / "data")
    index_images(tmp_path / "data")
    assert list((tmp_path / "home" / "index").glob("*/names.npy"))


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, caplog):
    touch(tmp_path, "a/1.jpg", "lost+found/2.jpg")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(index_module.os, "scandir", refuse)
    with caplog.at_level(logging.WARNING):
        assert len(index_images(tmp_path, tmp_path / ".cache")) == 1
    assert "lost+found" in caplog.text


def test_a_million_paths_stay_small(tmp_path):
    # Fails when paths are kept as Python strings (about 100 bytes each) or as one padded array.
    listing = tmp_path / "list.txt"
    with listing.open("w") as file:
        for i in range(100_000):
            file.write(f"train/n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG\n")
    touch(tmp_path, "train/n00000000/n00000000_0.JPEG")
    tracemalloc.start()
    index = index_images(listing, tmp_path / "cache")
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 5_000_000  # 50 MB for a million
    assert index.path(99_999).endswith("train/n00000076/n00000076_99999.JPEG")


# What is left out, and said


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_listing_says_what_it_found_and_what_it_left_out_each_time(tmp_path, caplog, listings):
    # From the kept list too: the warning would else come once in the life of a data set.
    touch(
        tmp_path, "data/a/1.jpg", "data/a/2.png", "data/a/notes.txt", "data/b/3.jpg", "data/c/4.heic", "data/c/5.HEIC"
    )
    touch(tmp_path, "data/d/deep/README", "data/.hidden/6.jpg", "data/a/.DS_Store")
    settle(tmp_path / "data")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            index = index_images(tmp_path / "data", tmp_path / "cache")
        first, second = (record.getMessage() for record in caplog.records)
        assert first == f"{tmp_path}/data: 3 images in 2 classes, 1 to 2 in each"
        assert second == (
            f"{tmp_path}/data: left out 2 class folders without images (c, d), 2 .heic, 1 .txt, 1 no extension"
        )
        assert index.left_out == ("2 class folders without images (c, d)", "2 .heic", "1 .txt", "1 no extension")
    assert listings["_list_folder"] == 1


def test_nothing_left_out_is_no_warning(tmp_path, caplog):
    touch(tmp_path, "x/1.jpg", "x/y/2.jpg", "3.jpg", ".cache/4.txt")
    with caplog.at_level(logging.INFO):
        index_images(tmp_path, tmp_path / ".cache")
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}: 3 images in 3 folders"]


def test_what_pillow_decodes_is_an_image_by_its_content(tmp_path):
    # Whole classes vanished with extensions that were not in the list.
    image = Image.new("RGB", (16, 16), (250, 0, 0))
    names = {"1.gif": "GIF", "2.jfif": "JPEG", "3.JPE": "JPEG", "4.jp2": "JPEG2000", "5.tga": "TGA", "6.pnm": "PPM"}
    for name, kind in names.items():
        image.save(tmp_path / name, kind)
    image.convert("1").save(tmp_path / "7.pbm", "PPM")
    image.save(tmp_path / "8.gif", "PNG")  # under another's name
    index = index_images(tmp_path, tmp_path / ".cache")
    assert len(index) == 8
    assert all(read_image(index.file(number)).size == (16, 16) for number in range(8))


def test_a_bad_entry_costs_nothing_but_itself(tmp_path, caplog):
    # A link to itself raises when asked what it is, and took its folder's images with it.
    touch(tmp_path, "data/a/1.jpg", "data/b/2.jpg", "data/b/deep/3.jpg")
    (tmp_path / "data/a/loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "data/b/there").symlink_to("back")
    (tmp_path / "data/b/back").symlink_to("there")
    (tmp_path / "data/loop").symlink_to("loop")  # in the root, it was the end
    settle(tmp_path / "data")
    for _ in range(2):
        caplog.clear()
        index = index_images(tmp_path / "data", tmp_path / "cache")
        assert paths(index, tmp_path / "data") == ["a/1.jpg", "b/2.jpg", "b/deep/3.jpg"]
        assert index.class_names == ("a", "b")
        (warning,) = warnings_of(caplog)
        assert "left out 4 paths (" in warning
        assert (
            "a/loop.jpg: " in index_images(tmp_path / "data/a", tmp_path / "cache").left_out[0] or "loop: " in warning
        )


def test_what_was_unreadable_is_looked_at_again(tmp_path, monkeypatch, caplog):
    # The repair, such as chmod, changes nothing that a kept list compares.
    touch(tmp_path, "data/a/1.jpg", "data/b/2.jpg")
    settle(tmp_path / "data")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    with monkeypatch.context() as patched:
        patched.setattr(index_module.os, "scandir", refuse)
        for _ in range(2):
            caplog.clear()
            assert index_images(tmp_path / "data", tmp_path / "cache").class_names == ("a",)
            assert "left out 1 path (b: Permission denied)" in caplog.text
    assert index_images(tmp_path / "data", tmp_path / "cache").class_names == ("a", "b")


def test_a_folder_is_entered_once_however_many_links_lead_there(tmp_path, caplog):
    # Eight folders that link to one another gave 109,600 images.
    for name in "abcdefgh":
        touch(tmp_path / "data", f"{name}/1.jpg")
        for other in "abcdefgh":
            (tmp_path / f"data/{name}/to_{other}").symlink_to(f"../{other}")
    index = index_images(tmp_path / "data", tmp_path / "cache")
    assert paths(index, tmp_path / "data") == [f"{name}/1.jpg" for name in "abcdefgh"]
    assert "left out 64 paths (a/to_a: a link to a folder listed already, " in caplog.text


def test_a_link_does_not_take_the_place_of_the_folder(tmp_path):
    # By name "current" comes before "v2", whose images it would take; two links to a folder outside give it once.
    touch(tmp_path, "data/v2/1.jpg", "data/v2/deep/2.jpg", "elsewhere/3.jpg")
    (tmp_path / "data/current").symlink_to("v2")
    (tmp_path / "data/inner").symlink_to("v2/deep")
    (tmp_path / "data/y").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/x").symlink_to(tmp_path / "elsewhere")
    index = index_images(tmp_path / "data", tmp_path / "cache")
    assert paths(index, tmp_path / "data") == ["v2/1.jpg", "v2/deep/2.jpg", "x/3.jpg"]
    assert index.class_names == ("v2", "x")


# When the kept list is stale


def backdated(path):
    os.utime(path, LONG_AGO)


@pytest.mark.parametrize("change", ["a file is added", "a file is exchanged", "another folder takes the place"])
def test_a_change_is_seen_though_the_time_stamp_is_set_back(tmp_path, change):
    # As by unpacking a reproducible archive, rsync -a, or ln -sfn.
    data = tmp_path / "data"
    touch(tmp_path, "v1/a/1.jpg", "v2/a/2.jpg", "v2/a/3.jpg")
    data.symlink_to("v1")
    settle(tmp_path / "v1")
    settle(tmp_path / "v2")
    assert paths(index_images(data, tmp_path / "cache"), data) == ["a/1.jpg"]
    if change == "a file is added":
        touch(data, "a/0.jpg")
    elif change == "a file is exchanged":
        (data / "a/1.jpg").rename(data / "a/9.jpg")
    else:
        data.unlink()
        data.symlink_to("v2")
    settle(tmp_path / "v1")
    expected = sorted(f"a/{path.name}" for path in (data / "a").iterdir())
    assert paths(index_images(data, tmp_path / "cache"), data) == expected != ["a/1.jpg"]


@pytest.mark.parametrize("size", ["another size", "the same size"])
def test_a_list_that_is_rewritten_with_its_old_time_stamp_is_read_again(tmp_path, size):
    touch(tmp_path, "1.jpg", "2.jpg")
    listing = tmp_path / "list.txt"
    for content in ("1.jpg\n", "2.jpg\n" if size == "the same size" else "1.jpg\n2.jpg\n"):
        listing.write_text(content)
        backdated(listing)
        assert paths(index_images(listing, tmp_path / "cache"), tmp_path) == content.split()


# Lists and paths that are something else


@pytest.mark.parametrize("line", ["shards-000.tar", "/data/B.TAR", "images/", "images", "missing/", "/"])
def test_folders_and_shards_are_not_listed_in_a_list(tmp_path, line):
    touch(tmp_path, "images/1.jpg")
    (tmp_path / "list.txt").write_text(f"images/1.jpg\n{line}\n")
    with pytest.raises(InputError, match=f"lists {line}: give folders and tar shards themselves"):
        index_images(tmp_path / "list.txt", tmp_path / "cache")


def test_a_list_may_have_comments(tmp_path):
    touch(tmp_path, "1.jpg", "#2.jpg")
    (tmp_path / "list.txt").write_text("# fold 3\n1.jpg\n  # old: 3.jpg\n./#2.jpg\n")
    assert len(index_images(tmp_path / "list.txt", tmp_path / "cache")) == 2


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
    # As from a variable that is not set.
    touch(tmp_path, "1.jpg", "train/a/1.jpg")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--data_path is missing"):
        index_images("")
    for data_set in ("IMNET", "image_folder"):
        with pytest.raises(InputError, match="--data_path is missing"):
            find_images(data_set, "", train=True)


def test_a_pipe_is_no_list(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    with pytest.raises(InputError, match="no such folder or list"):
        index_images(tmp_path / "pipe", tmp_path / "cache")


# Fingerprints


def test_a_fingerprint_is_of_names_classes_and_order(tmp_path):
    touch(tmp_path, "one/a/1.jpg", "one/b/2.jpg", "two/a/1.jpg", "two/b/2.jpg", "three/a/1.jpg", "three/c/2.jpg")
    touch(tmp_path, "four/a/1.jpg", "four/a/2.jpg", "five/a/1.jpg", "five/b/2.jpg", "five/b/3.jpg")
    prints = {}
    for name in ("one", "two", "three", "four", "five"):
        settle(tmp_path / name)
        fresh, kept = (index_images(tmp_path / name, tmp_path / "cache").fingerprint() for _ in range(2))
        assert fresh == kept
        prints[name] = fresh
    assert prints["one"] == prints["two"]  # wherever the folder is
    assert len(set(prints.values())) == 4
    for number, order in enumerate(("one/a/1.jpg one/b/2.jpg", "one/b/2.jpg one/a/1.jpg")):
        (tmp_path / f"{number}.txt").write_text(order.replace(" ", "\n"))
    first, second = (index_images(tmp_path / f"{number}.txt", tmp_path / "cache") for number in range(2))
    assert first.fingerprint() != second.fingerprint()


def test_lists_in_one_folder_are_told_apart(tmp_path, caplog):
    touch(tmp_path, "1.jpg", "2.jpg")
    for name, content in (("train.txt", "1.jpg\n2.jpg"), ("val.txt", "1.jpg")):
        (tmp_path / name).write_text(content)
    with caplog.at_level(logging.INFO):
        index_images(tmp_path / "train.txt", tmp_path / "cache")
        index_images(tmp_path / "val.txt", tmp_path / "cache")
    assert f"{tmp_path}/train.txt: 2 images in 1 folder" in caplog.text
    assert f"{tmp_path}/val.txt: 1 image in 1 folder" in caplog.text
