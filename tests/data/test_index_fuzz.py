"""Any list and any tar file gives images or an error in one line, never a traceback."""

import io
import os
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beit.commands.shards import write_shards
from beit.data.datasets import UnreadableImageError, read_image
from beit.data.index import index_images
from beit.errors import InputError


def listed(path, tmp_path):
    try:
        return index_images(path, tmp_path / "cache")
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    return ()


QUICK = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PIECES = [b"a.jpg", b"\n", b"\r\n", b"\0", b"#", b"/", b"..", b"~", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf"]
PIECES += [b" ", b"\t", b"\x1c", b".tar", b"\x85", "\u2028".encode(), b"x" * 5000, b"a,b", b"."]
NAMES = ["{}.jpg", "{}.cls", "a/{}.x.png", "{}", "é{}.gif", ".{}.jpg", "b.{}.json", "x" * 120 + "/{}.jpg", "a.{}.cls"]


@QUICK
@given(st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join))
def test_any_list_of_paths(tmp_path, content):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "list.txt").write_bytes(content)
    index = listed(tmp_path / "list.txt", tmp_path)
    for number in range(len(index)):
        with pytest.raises(UnreadableImageError):
            read_image(index.file(number))
    if not index:
        return
    for old in tmp_path.glob("out/*"):
        old.unlink()
    assert len(index_images(write_shards(index, tmp_path / "out"), tmp_path / "cache")) == len(index)


@st.composite
def damaged_tars(draw):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=draw(st.sampled_from([0, 1, 2]))) as archive:
        for number in range(4):
            content = draw(st.sampled_from([b"", b"0", b"1\n", b"a" * 600]))
            info = tarfile.TarInfo(draw(st.sampled_from(NAMES)).format(number))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    content = bytearray(buffer.getvalue())
    for _ in range(draw(st.integers(0, 4))):  # in the headers, for the most part
        content[draw(st.integers(0, 6)) * 512 + draw(st.integers(0, 511))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])


@QUICK
@given(damaged_tars())
def test_any_tar(tmp_path, content):
    (tmp_path / "shard.tar").write_bytes(content)
    index = listed(tmp_path / "shard.tar", tmp_path)
    assert sum(len(index.file(number).read()) for number in range(len(index))) <= len(content)


def test_any_bytes_in_the_names_of_files(tmp_path):
    for byte in set(range(1, 256)) - {ord("/")}:
        with open(os.fsencode(tmp_path) + b"/x" + bytes([byte]) + b".jpg", "wb"):
            pass
    index = index_images(tmp_path, tmp_path / ".cache")
    assert len(index) == 254
    assert len(index_images(write_shards(index, tmp_path / "out"), tmp_path / ".cache")) == 254
