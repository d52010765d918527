"""Files: write them so that a crash cannot spoil them, read them so that they cannot run code, fetch them once.

Three jobs, and the only copy of each: :func:`atomic_write` (and :func:`save_checkpoint` on it),
:func:`load_checkpoint` (weights only, with an error that says what the file really is) and :func:`download`.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import pickle
import re
import secrets
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from beit.errors import InputError, did_you_mean

try:
    import fcntl
except ImportError:  # Windows has no flock; it refuses to delete open files instead, which serves the same end
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

TEMPORARY_SUFFIX = ".beit-tmp"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHUNK_BYTES = 1 << 20
BACKOFF_SECONDS = 1.0
ONE_DAY_SECONDS = 24 * 60 * 60


def beit_home() -> Path:
    """The folder of downloaded files: ``$BEIT_HOME``, or ``~/.cache/beit`` where that is not set."""
    return Path(os.environ.get("BEIT_HOME") or Path.home() / ".cache" / "beit").expanduser()


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class _RecordingFile(io.FileIO):
    """Remembers a failed write: PyTorch's zip writer replaces the cause by an error of its own."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a file that replaces ``path`` at the end of the block, whole or not at all.

    The bytes go to a temporary file in the same folder, which is synced to the disk and renamed; the folder is synced
    after it. A process killed at any moment leaves the old file as it was, and at most a temporary file
    ``.<name>.<random>.beit-tmp``, which the next write to the same path removes. Missing folders are made; a symbolic
    link is followed, not replaced.

    Args:
        path: The file to write.

    Yields:
        A buffered binary file open for writing.

    Raises:
        InputError: The folder cannot be written, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    temporary, raw = _open_temporary(target)
    try:
        with io.BufferedWriter(raw) as file:
            yield file
            try:
                file.flush()
                os.fsync(file.fileno())
                if fcntl is None:
                    file.close()  # Windows renames no open files
                os.replace(temporary, target)
            except OSError as error:
                raw.failure = error
                raise
        sync_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            raw.close()
        temporary.unlink(missing_ok=True)
        if raw.failure is not None:
            raise _write_error(target, raw.failure) from error
        raise


def _open_temporary(target: Path) -> tuple[Path, _RecordingFile]:
    """A new file beside ``target``, locked while it is open so that no other writer takes it for a stale one."""
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_temporaries(target)
        while True:
            temporary = target.parent / f".{target.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}"
            raw = _RecordingFile(temporary, "xb")
            _lock(raw, wait=True)
            if temporary.exists():  # else another writer was quicker than our lock
                return temporary, raw
            raw.close()
    except OSError as error:
        raise _write_error(target, error) from error


def _write_error(target: Path, cause: OSError) -> InputError:
    """Words an operating system error met while writing ``target``."""
    if cause.errno in DISK_FULL:
        free_mb = shutil.disk_usage(target.parent).free / 1e6
        return InputError(
            f"no space left to write {target.name} in {target.parent} ({free_mb:.0f} MB free): "
            "free some space (old checkpoints?) or choose another folder"
        )
    return InputError(f"cannot write {target}: {cause.strerror or cause}; choose a path that you may write to")


def _remove_stale_temporaries(target: Path) -> None:
    """Removes the temporary files that killed writers of ``target`` left behind, and no living writer's."""
    pattern = re.compile(re.escape(f".{target.name}.") + "[0-9a-f]{12}" + re.escape(TEMPORARY_SUFFIX))
    for entry in target.parent.iterdir():
        if not pattern.fullmatch(entry.name):
            continue
        with contextlib.suppress(OSError), open(entry, "r+b") as file:
            # The name alone tells nothing about the writer, which may run on another host: its lock does.
            if _lock(file, wait=False) or time.time() - entry.stat().st_mtime > ONE_DAY_SECONDS:
                if fcntl is None:
                    file.close()
                entry.unlink()


def _lock(file: IO[Any], wait: bool) -> bool:
    """Locks an open file until it is closed or its process dies; false where that is taken or impossible."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` survive a power cut, on systems where a folder can be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_checkpoint(path: str | os.PathLike[str], obj: Any) -> None:
    """``torch.save(obj)`` into ``path``, atomically; see :func:`atomic_write` for the errors."""
    with atomic_write(path) as file:
        torch.save(obj, file)


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Reads a checkpoint without running any code it may hold.

    Tensors and plain Python values are read, and ``argparse.Namespace`` besides, because the official checkpoints
    keep their ``args`` in one. Files that end in ``.safetensors`` are read as such.

    Args:
        path: The file.
        map_location: As of ``torch.load``.
        mmap: Map the tensors from the disk instead of reading them all (silently not for files older than the zip
            format, where that is impossible).

    Returns:
        What was saved; for safetensors a dict of tensors.

    Raises:
        InputError: There is no such file, or it is something else than a checkpoint: the message says what.
    """
    path = Path(path)
    require_file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(map_location))
        if problem := describe_problem(path):
            raise InputError(f"{path} is no checkpoint: {problem}")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path, map_location=map_location, weights_only=True, mmap=mmap and zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} was not opened: {_forbidden_content(str(error))}") from error
    except (SafetensorError, RuntimeError, EOFError, zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        if isinstance(error, RuntimeError) and re.search("CUDA|memory", str(error)):
            raise  # the machine's trouble, not the file's
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is truncated or damaged ({first_line}): fetch or copy it again") from error


def require_file(path: Path) -> None:
    """Raises an :class:`InputError` with near matches unless ``path`` is a file."""
    if path.is_dir():
        raise InputError(f"{path} is a folder where a file is needed")
    if not path.is_file():
        if not path.parent.is_dir():
            raise InputError(f"there is no file {path}: the folder {path.parent} does not exist")
        raise InputError(f"there is no file {path}{did_you_mean(path.name, os.listdir(path.parent))}")


def _forbidden_content(message: str) -> str:
    """Rewords the complaint of torch's weights-only reader for the user."""
    if match := re.search(r"GLOBAL ([\w.]+)", message):
        return (
            f"it asks to import and call {match[1]}, and code inside checkpoints is never run; "
            "save the weights alone (a state dict of tensors) where the file comes from"
        )
    match = re.search(r"WeightsUnpickler error: ([^\n]*)", message)
    return f"it is no file that torch.save wrote, or it is damaged{f' ({match[1]})' if match else ''}"


def describe_problem(path: str | os.PathLike[str]) -> str | None:
    """Says what a file is that should hold weights and cannot, or ``None`` when nothing speaks against it."""
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(1024)
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        return f"it is a truncated download or copy ({path.stat().st_size} bytes, its end is missing); fetch it again"
    return describe_text(head)


def describe_text(head: bytes) -> str | None:
    """Says what kind of text (or nothing) the first bytes of a file are, or ``None`` when they are binary."""
    if not head:
        return "it is empty; fetch it again"
    text = head.decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n").lower()
    if text.startswith(("<!doctype html", "<html", "<head", "<script")):
        return "it is an HTML page, probably a server's error or login page; fetch it from another address"
    if text.startswith(("<?xml", "<error")):
        return "it is an XML message, probably a storage server's refusal; fetch it from another address"
    if text.startswith("--2") or "saving to: " in text:
        return "it is the log of wget (`-o` names the log, `-O` the file); fetch it again with -O"
    if text.startswith("version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull`"
    printable = sum(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)
    if printable == len(head):
        return f"it is text that begins {head[:40].decode('ascii')!r}; fetch it again"
    return None


@dataclass(frozen=True)
class _Version:
    """What tells one content of an address from another; kept beside an unfinished download."""

    url: str
    etag: str | None
    last_modified: str | None
    length: int | None


def download(
    url: str | Sequence[str],
    destination: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    verify: Callable[[Path], None] | None = None,
    attempts: int = 5,
    timeout: float = 30.0,
) -> Path:
    """Makes sure that ``destination`` holds the file at ``url``, fetching it at most once.

    The bytes go to ``<destination>.part``; an interrupted transfer is continued from there, unless the file on the
    server has changed since. Several processes may call this at the same time: one fetches and the others wait. The
    hash is recorded in ``<destination>.sha256`` at the first download and compared whenever the file is used again.

    Args:
        url: The address (http or https), or several that hold the same file, tried in this order.
        destination: The file to have.
        sha256: The published hash, if there is one; otherwise the recorded one counts.
        verify: Called with the finished file while it is still named ``….part``; raises an :class:`InputError` to
            refuse it.
        attempts: Connections to one address before it is given up; the pauses between them double.
        timeout: Seconds without a byte after which a connection counts as broken.

    Returns:
        ``destination`` as a path.

    Raises:
        InputError: The file has another hash than it should have, no address delivers it, what arrives is a web page
            or other text, or ``BEIT_OFFLINE=1`` forbids to try.
    """
    destination = Path(os.path.realpath(destination))
    urls = [url] if isinstance(url, str) else list(url)
    if not destination.exists():
        if os.environ.get("BEIT_OFFLINE", "0") not in ("", "0"):
            raise InputError(f"{destination} is missing and BEIT_OFFLINE is set: put the file of {urls[0]} there")
        with _only_one_process(destination):
            if not destination.exists():
                _fetch_from_any(urls, destination, sha256, verify, attempts, timeout)
                return destination
    check_recorded_hash(destination, sha256)
    return destination


def check_recorded_hash(path: Path, sha256: str | None = None) -> None:
    """Compares a file with its published hash or the one recorded beside it; records it where there is none.

    Raises:
        InputError: They differ.
    """
    record = _beside(path, ".sha256")
    recorded = record.read_text().split()[:1] if record.exists() else []
    expected = [sha256] if sha256 else recorded
    found = sha256_of(path)
    if not expected:
        if problem := describe_problem(path):
            raise InputError(f"{path} is not the file it should be: {problem}")
        _record_hash(path, found)
    elif found != expected[0].lower():
        source = "published" if sha256 else f"recorded in {record.name}"
        raise InputError(
            f"{path} has changed: its sha256 is {found[:12]}…, the one {source} is {expected[0][:12]}…; "
            f"delete {path.name} and {record.name} to download it again"
        )


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _record_hash(path: Path, digest: str) -> None:
    """Writes ``<path>.sha256`` in the format of ``sha256sum -c``; a read-only folder is no reason to fail."""
    try:
        with atomic_write(_beside(path, ".sha256")) as file:
            file.write(f"{digest}  {path.name}\n".encode())
    except InputError as error:
        logger.warning("the hash of %s was not recorded: %s", path, error)


@contextlib.contextmanager
def _only_one_process(destination: Path) -> Iterator[None]:
    """Holds ``<destination>.lock``, waiting while another process does; the lock dies with its process."""
    lock_path = _beside(destination, ".lock")
    while True:
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            file = open(lock_path, "a+b")  # noqa: SIM115  (closed below, after the body)
        except OSError as error:
            raise _write_error(destination, error) from error
        if fcntl is not None and not _lock(file, wait=False):
            logger.info("waiting for another process to download %s", destination.name)
            _lock(file, wait=True)
        with contextlib.suppress(FileNotFoundError):  # gone, or gone by now
            if os.path.samestat(os.fstat(file.fileno()), lock_path.stat()):
                break
        file.close()  # its holder removed it while we waited: a newcomer would lock a new one
    try:
        yield
    finally:
        if fcntl is None:
            file.close()
        with contextlib.suppress(OSError):
            lock_path.unlink()
        file.close()


def _fetch_from_any(
    urls: list[str],
    destination: Path,
    sha256: str | None,
    verify: Callable[[Path], None] | None,
    attempts: int,
    timeout: float,
) -> None:
    """Downloads from the first address that delivers a file which stands all checks."""
    failures = []
    part = _beside(destination, ".part")
    for url in urls:
        try:
            _fetch(url, part, attempts, timeout)
            digest = sha256_of(part)
            if sha256 and digest != sha256.lower():
                raise _Refused(f"the sha256 of {url} is {digest[:12]}…, not the published {sha256[:12]}…")
            if verify is not None:
                verify(part)
        except _Unreachable as error:
            failures.append(str(error))
        except InputError as error:
            _discard(part)
            failures.append(str(error))
        else:
            _record_hash(destination, digest)
            os.replace(part, destination)
            sync_folder(destination.parent)
            _discard(part)
            return
    kept = f"; {part.stat().st_size / 1e6:.1f} MB are kept in {part.name} to go on from" if part.exists() else ""
    raise InputError(
        f"{destination.name} was not downloaded: {'; '.join(failures)}{kept}. You can put it in place by hand"
    )


class _Refused(InputError):
    """The address delivers something, and it is not the file."""


class _Unreachable(InputError):
    """The address does not deliver (now); what has arrived is kept."""


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _beside(part, ".json").unlink(missing_ok=True)


def _fetch(url: str, part: Path, attempts: int, timeout: float) -> None:
    """Completes ``part`` from ``url``, through as many connections as it takes."""
    if not url.startswith(("http://", "https://")):
        raise _Refused(f"{url!r} is no http or https address")
    for attempt in range(1, attempts + 1):
        try:
            _fetch_once(url, part, timeout)
            return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # what is there is no beginning of the file that the server has now
                _discard(part)
            elif error.code < 500 and error.code not in (408, 429):
                raise _Unreachable(f"{url} answers {error.code} {error.reason}") from error
            failure: Exception = error
        except (HTTPException, OSError) as error:
            if isinstance(error, OSError) and error.errno in (*DISK_FULL, errno.EACCES, errno.EROFS):
                raise _write_error(part, error) from error
            failure = error
        if attempt < attempts:
            pause = BACKOFF_SECONDS * 2 ** (attempt - 1)
            logger.warning("%s: %s; trying again in %.0f s", url, failure, pause)
            time.sleep(pause)
    raise _Unreachable(f"{url} cannot be fetched ({failure})")


def _fetch_once(url: str, part: Path, timeout: float) -> None:
    """One connection: continues ``part`` if the server still has the same file, else starts it again."""
    begun = _begun_version(part, url)
    have = part.stat().st_size if begun else 0
    if begun and begun.length == have:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "beit", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=timeout) as response:
        start, version = _offered(response, url)
        if start == 0:
            have = 0
        elif have == 0:
            raise HTTPException("the server sent a part of the file where all of it was asked for")
        elif start != have or version != begun:
            logger.info("%s has changed on the server: starting again", url)
            _discard(part)
            _fetch_once(url, part, timeout)
            return
        if have == 0:
            with atomic_write(_beside(part, ".json")) as file:
                file.write(json.dumps(asdict(version)).encode())
        _receive(response, part, have, version)


def _begun_version(part: Path, url: str) -> _Version | None:
    """Which content the bytes in ``part`` belong to; ``None`` if there are none or that is not known."""
    try:
        version = _Version(**json.loads(_beside(part, ".json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return version if part.exists() and version.url == url else None


def _offered(response: HTTPResponse, url: str) -> tuple[int, _Version]:
    """The offset at which a response begins, in bytes, and the version of the file it belongs to."""
    start, length = 0, response.headers.get("Content-Length")
    if response.status == 206:
        match = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not match:
            raise HTTPException("the server sent a part of the file without saying which")
        start, length = int(match[1]), match[2]
    known = int(length) if length and length.isdigit() else None
    return start, _Version(url, response.headers.get("ETag"), response.headers.get("Last-Modified"), known)


def _receive(response: HTTPResponse, part: Path, have: int, version: _Version) -> None:
    """Appends a response to the ``have`` bytes of ``part``.

    Raises:
        InputError: The content is a web page or other text.
        HTTPException: The connection ended early.
    """
    with open(part, "r+b" if have else "wb") as file, _progress(part, have, version.length) as advance:
        file.seek(have)
        file.truncate()
        # read1: what has arrived is kept when the connection breaks; only the first piece must be long enough to judge
        while chunk := response.read1(CHUNK_BYTES) if have else response.read(1024):
            if have == 0 and (problem := describe_text(chunk[:1024])):
                raise _Refused(f"{version.url} does not deliver the file: {problem}")
            file.write(chunk)
            have += len(chunk)
            advance(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if version.length is not None and have < version.length:
        raise HTTPException(f"the connection ended after {have} of {version.length} bytes")
    if have == 0:
        raise _Refused(f"{version.url} delivers an empty file")


@contextlib.contextmanager
def _progress(part: Path, have: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """Shows a transfer: a bar where a person looks on, else a log line every ten seconds."""
    name = part.name.removesuffix(".part")
    if sys.stderr.isatty():
        with tqdm(desc=name, initial=have, total=total, unit="B", unit_scale=True) as bar:
            yield bar.update
        return
    state = {"bytes": have, "said": time.monotonic()}

    def advance(count: int) -> None:
        state["bytes"] += count
        if time.monotonic() - state["said"] >= 10:
            state["said"] = time.monotonic()
            share = f" ({state['bytes'] / total:.0%})" if total else ""
            logger.info("downloading %s: %.1f MB%s", name, state["bytes"] / 1e6, share)

    logger.info("downloading %s%s", name, f" ({total / 1e6:.1f} MB)" if total else "")
    yield advance
