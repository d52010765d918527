"""Files survive kills, full disks and broken connections; nothing that is not data gets in."""

import argparse
import errno
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "no file that torch.save wrote"),
        (b"\x80\x02", "truncated or damaged"),
    ],
)
def test_what_is_no_checkpoint_says_what_it_is(tmp_path, content, what):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match=what) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
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
        head: Whether HEAD requests are answered.
        requests: Number of downloads so far.
        delay: Seconds before an answer.
    """

    def __init__(self):
        self.content, self.head = CONTENT, True
        self.cuts, self.codes, self.requests, self.delay = [], [], 0, 0.0

    def answer(self, handler):
        if handler.command == "HEAD" and not self.head:
            handler.send_error(405)
            return
        if handler.command == "GET":
            self.requests += 1
            time.sleep(self.delay)
            if self.codes:
                handler.send_error(self.codes.pop(0))
                return
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(self.content)))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(self.content[: self.cuts.pop(0)] if self.cuts else self.content)
        handler.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(storage, "BACKOFF_SECONDS", 0.01)
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.answer(self)

        do_HEAD = do_GET

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
    # torch.hub itself takes a body that ends early for the whole.
    server.cuts = [100_000]
    assert download(server.url, tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests == 2
    server.cuts = [100_000] * 3
    with pytest.raises(InputError, match="truncated: the connection ended after 100000 of 512002 bytes"):
        download(server.url, tmp_path / "other.bin")
    assert sorted(os.listdir(tmp_path)) == ["file.bin", "file.bin.sha256"]


def test_a_server_that_refuses_head_requests_will_do(server, tmp_path):
    server.head = False
    assert download(server.url, tmp_path / "file.bin").read_bytes() == CONTENT


def test_what_a_killed_download_left_behind_goes_with_the_next(server, tmp_path):
    for name in ("file.bin.part", "file.bin.part.0123.partial", "file.bin.lock"):
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
