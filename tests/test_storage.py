"""Files survive kills, full disks and broken connections; nothing that is not data gets in."""

import argparse
import collections
import datetime
import decimal
import enum
import errno
import hashlib
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
import types
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from beit import storage
from beit.errors import InputError
from beit.storage import (
    TEMPORARY_SUFFIX,
    atomic_write,
    beit_home,
    download,
    load_checkpoint,
    save_checkpoint,
    sha256_of,
)

CONTENT = b"\x80\x02" + bytes(range(256)) * 2000  # binary, 512 kB
PAGE = b"<!DOCTYPE html><html><body>This link has expired</body></html>"


def temporaries(folder):
    return [name for name in os.listdir(folder) if name.endswith(TEMPORARY_SUFFIX)]


def test_atomic_write_replaces_the_file_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists()
    with atomic_write(path) as file:
        file.write(b"two")
        file.flush()
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # as any other file, not private as mkstemp's


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()])
def test_a_failure_inside_the_block_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write():
        with atomic_write(path) as file:
            file.write(b"half")
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_write_follows_a_symbolic_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    save_checkpoint(tmp_path / "link", {"a": 1})
    assert (tmp_path / "link").is_symlink()
    assert load_checkpoint(tmp_path / "target") == {"a": 1}


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_sigkill_before_the_rename_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path, moment):
    # The process kills itself in the call named; breaks if the file is written in place, or renamed before the sync.
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"step": 1})

    def save_and_die():
        setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        save_checkpoint(path, {"step": 2})

    process = multiprocessing.get_context("fork").Process(target=save_and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert load_checkpoint(path) == {"step": 1}
    assert len(temporaries(tmp_path)) == 1
    (tmp_path / f".other.pth.0123456789ab{TEMPORARY_SUFFIX}").touch()  # of another file: not ours to remove
    save_checkpoint(path, {"step": 3})
    assert load_checkpoint(path) == {"step": 3}
    assert temporaries(tmp_path) == [f".other.pth.0123456789ab{TEMPORARY_SUFFIX}"]


def test_a_living_writer_keeps_its_temporary_file(tmp_path):
    # Breaks if stale files are told by their name alone.
    path = tmp_path / "file"
    with atomic_write(path) as slow:
        slow.write(b"slow")
        with atomic_write(path) as quick:
            quick.write(b"quick")
        assert path.read_bytes() == b"quick"
    assert path.read_bytes() == b"slow"


class FullDisk(storage._RecordingFile):
    """Takes 1000 bytes."""

    def write(self, data):
        if self.tell() + len(data) > 1000:
            self.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.failure
        return super().write(data)


def test_a_full_disk_is_one_clear_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    # torch's zip writer turns the OSError into a RuntimeError of its own; breaks if that one reaches the user.
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"step": 1})

    monkeypatch.setattr(storage, "_RecordingFile", FullDisk)
    with pytest.raises(InputError, match=r"no space left to write checkpoint\.pth in .* MB free\): free some space"):
        save_checkpoint(path, {"weights": torch.zeros(100_000)})
    monkeypatch.undo()
    assert load_checkpoint(path) == {"step": 1}
    assert temporaries(tmp_path) == []


def test_paths_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").touch()
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "file" / "x", "cannot write")):
        with pytest.raises(InputError, match=reason):
            save_checkpoint(path, {})


def test_checkpoints_round_trip_with_the_args_of_official_ones(tmp_path):
    path = tmp_path / "checkpoint.pth"
    saved = {"model": {"w": torch.arange(3.0)}, "args": argparse.Namespace(lr=5e-4, model="beit"), "epoch": 3}
    for new_format in (True, False):
        torch.save(saved, path, _use_new_zipfile_serialization=new_format)
        for mmap in (True, False):
            loaded = load_checkpoint(path, mmap=mmap)
            assert torch.equal(loaded["model"]["w"], saved["model"]["w"])
            assert loaded["args"] == saved["args"]
    # The permission for Namespace ends with the call.
    with pytest.raises(Exception, match="Namespace"):
        torch.load(path, weights_only=True)
    save_file(saved["model"], tmp_path / "model.safetensors")
    assert torch.equal(load_checkpoint(tmp_path / "model.safetensors")["w"], saved["model"]["w"])


class Harmful:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_checkpoint_is_named_and_not_run(tmp_path, new_format):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": Harmful(tmp_path / "ran")}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(InputError, match=r"import and call (posix|nt)\.system"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_functions_in_a_checkpoint_are_never_called(tmp_path, new_format):
    class Evil:
        def __reduce__(self):
            return eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    torch.save({"w": torch.ones(1), "x": Evil()}, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    assert load_checkpoint(tmp_path / "a.pth") == {"w": torch.ones(1)}
    assert not (tmp_path / "ran").exists()


class Colour(enum.Enum):
    RED = 1


class History:
    """As mmengine's, which every checkpoint of its runs holds: arrays, and functions by name."""

    def __init__(self):
        self.values, self.largest, self.kinds = np.arange(3.0), max, {Colour.RED: [np.float64(1)]}


class Settings(dict):
    """As configurations of many libraries: a dict whose keys are attributes too."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__.update(entries)


class Steps(list):
    pass


OBJECTS = {
    "numpy scalar": np.int64(3),
    "array": np.arange(3),
    "path": pathlib.PurePosixPath("/a/b"),
    "date": datetime.datetime(2024, 1, 2),
    "namespace": types.SimpleNamespace(a=[1]),
    "enum": Colour.RED,
    "decimal": decimal.Decimal(1),
    "range": range(3),
    "history": History(),
    "class": History,
    "function": os.path.join,
}
PLAIN = {
    "defaultdict": (collections.defaultdict(list, a=1), {"a": 1}),
    "dict of a class": (Settings(lr=1), {"lr": 1}),
    "deque": (collections.deque([1, 2]), [1, 2]),
    "list of a class": (Steps([3]), [3]),
}


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_beside_the_weights_are_left_out_by_name(tmp_path, caplog, kind, new_format):
    args = argparse.Namespace(lr=1.0, odd=OBJECTS[kind])
    nested = ([OBJECTS[kind], 5], {"deep": OBJECTS[kind], "kept": 6})
    saved = {"model": {"w": torch.ones(2)}, kind: OBJECTS[kind], "args": args, "nested": nested, "epoch": 7}
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    for mmap in (True, False):
        caplog.clear()
        read = load_checkpoint(tmp_path / "a.pth", mmap=mmap)
        assert torch.equal(read["model"]["w"], torch.ones(2))
        assert read["args"] == argparse.Namespace(lr=1.0)
        assert (read["nested"], read["epoch"], kind in read) == (([5], {"kept": 6}), 7, False)
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert kind in record.getMessage()
    torch.save(OBJECTS["history"], tmp_path / "alone.pth")
    with pytest.raises(InputError, match=r"not opened: it asks to import and call .*History"):
        load_checkpoint(tmp_path / "alone.pth")


@pytest.mark.parametrize("kind", PLAIN)
def test_dicts_and_lists_of_other_classes_become_plain_ones(tmp_path, kind):
    given, plain = PLAIN[kind]
    save_checkpoint(tmp_path / "a.pth", {"x": given, "y": [given]})
    read = load_checkpoint(tmp_path / "a.pth")
    assert read == {"x": plain, "y": [plain]}


def test_a_file_of_a_hundred_classes_is_not_read_a_hundred_times(tmp_path):
    pickle = b"\x80\x02]" + b"".join(b"ca\nb%d\na" % number for number in range(101)) + b"."
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        archive.writestr("b/data.pkl", pickle)
        archive.writestr("b/version", "3")
    with pytest.raises(InputError, match=r"asks to import and call a\.b100"):
        load_checkpoint(tmp_path / "b.pth")


def test_a_flipped_bit_is_found_where_the_file_is_read_whole(tmp_path):
    # torch compares no checksums: it would hand out other weights.
    path = tmp_path / "checkpoint.pth"
    torch.save({"w": torch.ones(1000), "v": torch.ones(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(1000).numpy().tobytes()) + 1234] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"checksum of .*data/\d differs.*choose an older one"):
        load_checkpoint(path)
    assert load_checkpoint(path, mmap=True)["w"].shape == (1000,)
    torch.serialization.set_crc32_options(False)
    torch.save({"w": torch.ones(1000)}, path)
    torch.serialization.set_crc32_options(True)
    assert torch.equal(load_checkpoint(path)["w"], torch.ones(1000))


def rezipped(path, compression, factor=1):
    """Zips the entries of a checkpoint again; its directory lists the largest ``factor`` times, at one place."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
        archive.filelist += [max(archive.filelist, key=lambda entry: entry.file_size)] * (factor - 1)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(
    ("compression", "factor"), [(zipfile.ZIP_DEFLATED, 1), (zipfile.ZIP_BZIP2, 1), (zipfile.ZIP_STORED, 9)]
)
def test_archives_that_would_fill_the_memory_are_refused(tmp_path, compression, factor, mmap):
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "a.pth")
    rezipped(tmp_path / "a.pth", compression, factor)
    with pytest.raises(InputError, match="compressed"):
        load_checkpoint(tmp_path / "a.pth", mmap=mmap)


def test_archives_of_others_are_called_so(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("run/checkpoint.pth", b"")
    with pytest.raises(InputError, match=r"another kind .*checkpoint\.pth"):
        load_checkpoint(tmp_path / "a.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "b.pt")
    with pytest.raises(InputError, match="TorchScript"):
        load_checkpoint(tmp_path / "b.pt")


def test_safetensors_are_told_by_their_content(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.bin")
    for blanks in range(300):  # the first byte is the header's length, which may be that of a pickle
        save_file({"w": torch.ones(2)}, tmp_path / "d.bin", {"blanks": " " * blanks})
        assert torch.equal(load_checkpoint(tmp_path / "d.bin")["w"], torch.ones(2))
    for new_format in (True, False):  # torch goes by this suffix itself
        torch.save({"w": torch.ones(2)}, tmp_path / "b.safetensors", _use_new_zipfile_serialization=new_format)
        with pytest.raises(InputError, match=r"a file of torch\.save: rename it to b\.pth"):
            load_checkpoint(tmp_path / "b.safetensors")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "it is empty"),
        (PAGE, "HTML page"),
        (b"\xef\xbb\xbf <?xml version='1.0'?><Error>PublicAccessNotPermitted", "XML message"),
        (b"--2022-03-29 10:11:12--  https://host/file\nResolving host", "log of wget"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"404: Not Found", "text that begins '404: Not Found'"),
        (b"PK\x03\x04" + bytes(100), "truncated"),
        (b"\x80\x02", "truncated or damaged|rename it"),
        (b"\x80\x04K\x00.", "truncated or damaged .*magic number|rename it"),  # a pickle of another program
    ],
)
def test_what_is_no_checkpoint_says_what_it_is(tmp_path, content, what, suffix):
    path = tmp_path / f"checkpoint{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=what) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n", b"\x1f\x8b\x08\x00", b"\x08\x07\x12\x07pytorch"])
def test_pictures_and_archives_are_no_checkpoints(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content + bytes(100))
    with pytest.raises(InputError, match=r"no file that torch\.save or safetensors wrote: it begins with b'"):
        load_checkpoint(tmp_path / "a.pth")


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    (tmp_path / "a.pth").touch()
    monkeypatch.setattr(storage, "describe_problem", lambda path: open(tmp_path / "loop.pth"))  # noqa: SIM115
    with pytest.raises(InputError, match=r"a\.pth cannot be read: Too many levels"):
        load_checkpoint(tmp_path / "a.pth")


def test_old_torch_is_warned_of_once(tmp_path, monkeypatch, caplog):
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cpu"))
    for _ in range(2):
        load_checkpoint(tmp_path / "a.pth")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "torch 2.9.1+cpu, before 2.10, lets" in caplog.text
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.10.0"))
    load_checkpoint(tmp_path / "a.pth")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("content", [b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b'"a"'])
def test_odd_json_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json is not a JSON object") as caught:
        storage.read_json(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["new.pth", "old.pth", "model.safetensors"])
@pytest.mark.parametrize("share", [0.3, 0.98])
def test_truncated_checkpoints_say_so(tmp_path, name, share):
    path = tmp_path / name
    weights = {"w": torch.randn(1000)}
    if name == "model.safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=name == "new.pth")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match="truncated"):
        load_checkpoint(path)


def test_missing_checkpoints_come_with_near_matches(tmp_path):
    (tmp_path / "checkpoint-19.pth").touch()
    with pytest.raises(InputError, match=r"did you mean 'checkpoint-19\.pth'"):
        load_checkpoint(tmp_path / "checkpoint_19.pth")
    with pytest.raises(InputError, match="does not exist"):
        load_checkpoint(tmp_path / "runs" / "checkpoint.pth")
    with pytest.raises(InputError, match="is a folder"):
        load_checkpoint(tmp_path)


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("BEIT_HOME", str(tmp_path))
    assert beit_home() == tmp_path
    monkeypatch.delenv("BEIT_HOME")
    assert beit_home().parts[-2:] == (".cache", "beit")
    monkeypatch.setenv("BEIT_HOME", "~no-such-user/x")
    with pytest.raises(InputError, match="there is no home folder for ~no-such-user/x: set BEIT_HOME"):
        beit_home()


class Server:
    """A file on 127.0.0.1 that misbehaves as told.

    Attributes:
        content: The file.
        cuts: For each coming download, the bytes after which the connection breaks; none left: never.
        codes: For each coming download, a status to answer instead.
        requests: Number of downloads so far.
        delay: Seconds before an answer.
    """

    def __init__(self):
        self.content = CONTENT
        self.cuts, self.codes, self.requests, self.delay = [], [], 0, 0.0

    def answer(self, handler):
        self.requests += 1
        time.sleep(self.delay)
        if self.codes:
            handler.send_error(self.codes.pop(0))
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(self.content)))
        handler.end_headers()
        handler.wfile.write(self.content[: self.cuts.pop(0)] if self.cuts else self.content)
        handler.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(storage, "BACKOFF_SECONDS", 0.01)
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.answer(self)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_address[1]}/file.bin"
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield state
        http.shutdown()


def test_download_fetches_once_and_records_the_hash(server, tmp_path):
    path = download(server.url, tmp_path / "new" / "file.bin")
    assert path.read_bytes() == CONTENT
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert sha256_of(path) == digest
    assert (tmp_path / "new" / "file.bin.sha256").read_text() == f"{digest}  file.bin\n"
    assert sorted(os.listdir(path.parent)) == ["file.bin", "file.bin.sha256"]
    download(server.url, path)
    assert server.requests == 1


def test_a_broken_transfer_is_repeated_and_never_taken_for_the_file(server, tmp_path):
    # urllib itself takes a body that ends early for the whole.
    server.cuts = [100_000]
    assert download(server.url, tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests == 2
    server.cuts = [100_000] * 3
    with pytest.raises(InputError, match="truncated: the connection ended after 100000 of 512002 bytes"):
        download(server.url, tmp_path / "other.bin")
    assert sorted(os.listdir(tmp_path)) == ["file.bin", "file.bin.sha256"]


@pytest.mark.parametrize("name", ["with a blank", "é", "%C3%A9", "a+b"])
def test_addresses_of_any_letters_are_fetched(server, tmp_path, name):
    assert download(f"{server.url}/{name}", tmp_path / "file").read_bytes() == CONTENT
    with pytest.raises(InputError, match="cannot be fetched"):
        download("http://[::1/x", tmp_path / "other")


def test_what_a_killed_download_left_behind_goes_with_the_next(server, tmp_path):
    for name in (f".file.bin.0123456789ab{TEMPORARY_SUFFIX}", "file.bin.lock"):
        (tmp_path / name).write_bytes(b"half")
    assert download(server.url, tmp_path / "file.bin").read_bytes() == CONTENT
    assert sorted(os.listdir(tmp_path)) == ["file.bin", "file.bin.sha256"]


def test_server_errors_are_tried_again_and_refusals_are_not(server, tmp_path):
    server.codes = [503, 429]
    download(server.url, tmp_path / "one")
    assert server.requests == 3
    server.codes = [404]
    with pytest.raises(InputError, match=r"two was not downloaded: .* answers 404"):
        download(server.url, tmp_path / "two")
    assert server.requests == 4
    with pytest.raises(InputError, match="cannot be fetched"):
        download("http://127.0.0.1:9/file", tmp_path / "three")
    with pytest.raises(InputError, match="no http or https address"):
        download("file:///etc/passwd", tmp_path / "four")


@pytest.mark.parametrize(
    ("content", "what"),
    [(PAGE, "HTML page"), (b"<Error><Code>PublicAccessNotPermitted", "XML"), (b"Not here", "text"), (b"", "empty")],
)
def test_pages_and_text_are_refused_and_leave_nothing(server, tmp_path, content, what):
    server.content = content
    with pytest.raises(InputError, match=what):
        download(server.url, tmp_path / "file.bin")
    assert os.listdir(tmp_path) == []


def test_the_next_address_is_tried(server, tmp_path):
    server.codes = [404]
    assert download([server.url + "?moved", server.url], tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_file_that_is_refused_leaves_nothing(server, tmp_path):
    path = tmp_path / "file.bin"

    def refuse(file):
        assert file.read_bytes() == CONTENT
        assert not path.exists()
        raise InputError("these are not the weights")

    with pytest.raises(InputError, match="these are not the weights"):
        download(server.url, path, verify=refuse)
    assert os.listdir(tmp_path) == []


def test_a_changed_file_is_refused_with_what_to_do(server, tmp_path):
    path = download(server.url, tmp_path / "file.bin")
    path.write_bytes(CONTENT + b"x")
    with pytest.raises(InputError, match=r"has changed.*delete file\.bin and file\.bin\.sha256"):
        download(server.url, path)
    path.unlink()
    (tmp_path / "file.bin.sha256").unlink()
    path.write_bytes(PAGE)  # put there by hand
    with pytest.raises(InputError, match="HTML page"):
        download(server.url, path)
    path.write_bytes(CONTENT)
    download(server.url, path)
    (tmp_path / "file.bin.sha256").write_bytes(b"\xff\x00\x1b[2J")
    with pytest.raises(InputError, match=r"has changed.*delete file\.bin and file\.bin\.sha256") as caught:
        download(server.url, path)
    assert str(caught.value).isprintable()
    (tmp_path / "file.bin.sha256").unlink()
    download(server.url, path)
    assert (tmp_path / "file.bin.sha256").exists()
    assert server.requests == 1


def test_offline_mode_uses_what_is_there_and_fetches_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setenv("BEIT_OFFLINE", "1")
    with pytest.raises(InputError, match="BEIT_OFFLINE is set: put the file of http"):
        download(server.url, tmp_path / "file.bin")
    (tmp_path / "file.bin").write_bytes(CONTENT)
    download(server.url, tmp_path / "file.bin")
    assert server.requests == 0


def _download_and_report(url, path, results):
    download(url, path)
    results.put(sha256_of(path))


def test_one_of_several_processes_downloads_and_the_others_wait(server, tmp_path):
    # Breaks without the lock: each of them would fetch, into the same part.
    server.delay = 0.3
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_download_and_report, args=(server.url, tmp_path / "file.bin", results))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    digests = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert digests == {hashlib.sha256(CONTENT).hexdigest()}
    assert server.requests == 1
    assert sorted(os.listdir(tmp_path)) == ["file.bin", "file.bin.sha256"]


def test_progress_is_a_bar_on_a_terminal_and_a_log_line_elsewhere(server, tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level("INFO", logger="beit.storage")
    download(server.url, tmp_path / "one")
    assert "downloading one (0.5 MB)" in caplog.text
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    download(server.url, tmp_path / "two")
    assert "100%" in capsys.readouterr().err
