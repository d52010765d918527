"""Files: written whole or not at all, read without running any code in them, downloaded once."""

import argparse
import contextlib
import errno
import functools
import hashlib
import io
import json
import logging
import os
import pickle
import re
import secrets
import shutil
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from beit.errors import InputError, did_you_mean_file, listed

try:
    import fcntl
except ImportError:  # Windows has no flock; it refuses to delete open files instead, which serves the same end
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

Checkpoint = Mapping[str, Any]  # what a run saves, and :func:`load_checkpoint` reads

TEMPORARY_SUFFIX = ".beit-tmp"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHUNK_BYTES = 1 << 20
ATTEMPTS = 3  # per address
BACKOFF_SECONDS = 1.0
TIMEOUT_SECONDS = 30.0
ONE_DAY_SECONDS = 24 * 60 * 60


def beit_home() -> Path:
    """Returns the folder for downloads: ``$BEIT_HOME``, by default ``~/.cache/beit``."""
    chosen = os.environ.get("BEIT_HOME") or os.path.join("~", ".cache", "beit")
    if (path := os.path.expanduser(chosen)).startswith("~"):
        raise InputError(f"there is no home folder for {chosen}: set BEIT_HOME to a folder for downloads")
    return Path(path)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def weights_fingerprint(module: nn.Module) -> str:
    """Returns a hash of the names and values of a module's weights, whatever device and layout they are in."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class _RecordingFile(io.FileIO):
    """Remembers a failed write, whose cause PyTorch's zip writer hides behind an error of its own."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a buffered binary file that replaces ``path`` at the end of the block, whole or not at all.

    The bytes go to a temporary file in the same folder, which is synced and renamed. A process killed at any moment
    leaves the old file untouched and at most a temporary ``.<name>.<random>.beit-tmp``, which the next write to the
    same path removes. Missing folders are created; a symbolic link is followed, not replaced.

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
    """Opens a new file beside ``target``, locked so that no other writer takes it for a stale one."""
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_temporaries(target)
        while True:
            temporary = target.parent / f".{target.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}"
            raw = _RecordingFile(temporary, "xb")
            _lock(raw, wait=True)
            if temporary.exists():  # otherwise another writer removed it before we had the lock
                return temporary, raw
            raw.close()
    except OSError as error:
        raise _write_error(target, error) from error


def _write_error(target: Path, cause: OSError) -> InputError:
    if cause.errno in DISK_FULL:
        free_mb = shutil.disk_usage(target.parent).free / 1e6
        return InputError(
            f"no space left to write {target.name} in {target.parent} ({free_mb:.0f} MB free): "
            "free some space (old checkpoints?) or choose another folder"
        )
    return InputError(f"cannot write {target}: {cause.strerror or cause}; choose a path that you may write to")


def _remove_stale_temporaries(target: Path) -> None:
    """Removes temporary files left by killed writers of ``target``, but not those of living ones."""
    pattern = re.compile(re.escape(f".{target.name}.") + "[0-9a-f]{12}" + re.escape(TEMPORARY_SUFFIX))
    for entry in target.parent.iterdir():
        if not pattern.fullmatch(entry.name):
            continue
        with contextlib.suppress(OSError), open(entry, "r+b") as file:
            # A lock on the file itself, which the filelock package cannot take: its locks are files of their own.
            if _lock(file, wait=False) or time.time() - entry.stat().st_mtime > ONE_DAY_SECONDS:
                if fcntl is None:
                    file.close()
                entry.unlink()


def _lock(file: IO[bytes] | io.FileIO, wait: bool) -> bool:
    """Locks an open file until it is closed or its process dies; False if that is taken or impossible."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` survive a power cut, where folders can be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_checkpoint(path: str | os.PathLike[str], obj: object) -> None:
    """Saves an object with ``torch.save``, atomically; raises as :func:`atomic_write` does."""
    with atomic_write(path) as file:
        torch.save(obj, file)


def load_checkpoint(path: str | os.PathLike[str], mmap: bool = False) -> Any:
    """Reads a checkpoint to the CPU without running any code in it: what was saved, or a dict for safetensors.

    Tensors, plain Python values and ``argparse.Namespace`` (the ``args`` of official checkpoints) are read. Objects of
    other classes are left out with a warning; their dicts and lists become plain ones. With ``mmap`` tensors are mapped
    from disk instead of read and checked, but for files older than the zip format.

    Raises:
        InputError: There is no such file, or it is not a checkpoint; the message says what it is.
    """
    path = Path(path)
    with _in_one_line(path):
        form = check_form(path, whole=not mmap)
        return load_file(path) if form == "safetensors" else _unpickled(path, mmap and form == "zip")


def check_form(path: Path, whole: bool = True) -> str:
    """Returns what a file of weights is by its first bytes: ``zip``, ``pickle`` (from before it) or ``safetensors``.

    With ``whole`` the checksums in a zip file are compared, as torch never does. Raises :class:`InputError` for others.
    """
    with _in_one_line(path):
        require_file(path)
        if problem := describe_problem(path):
            raise InputError(f"{path} is no checkpoint: {problem}")
        with open(path, "rb") as file:
            head = file.read(16)
        if head[8:9] == b"{" or (path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80"))):
            with safe_open(path, framework="pt"):  # compares its header with its size
                return "safetensors"
        if path.suffix == ".safetensors":
            raise InputError(f"{path} is a file of torch.save: rename it to {path.stem}.pth")
        if head.startswith(b"PK\x03\x04"):
            _check_archive(path, whole)
        if head.startswith((b"PK\x03\x04", b"\x80")):
            return "zip" if head.startswith(b"PK") else "pickle"
        raise InputError(f"{path} is no file that torch.save or safetensors wrote: it begins with {head[:8]!r}")


def _check_archive(path: Path, whole: bool) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename.rpartition("/")[2] for entry in entries]
        if "data.pkl" not in names or "constants.pkl" in names:
            raise InputError(f"{path} is a zip archive of another kind (TorchScript, files to unpack): {listed(names)}")
        if any(entry.compress_type for entry in entries) or sum(e.file_size for e in entries) > path.stat().st_size:
            raise InputError(f"{path} was not opened: it is compressed, unlike torch's, and could fill the memory")
        # With `torch.serialization.set_crc32_options` all sums are 0.
        if whole and any(entry.CRC for entry in entries) and (name := archive.testzip()):
            raise zipfile.BadZipFile(f"the checksum of {name} differs")


@contextlib.contextmanager
def _in_one_line(path: Path) -> Iterator[None]:
    """Turns whatever reading a file raises inside the block into an :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} was not opened: {_forbidden_content(str(error))}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        message = next(iter(str(error).splitlines()), type(error).__name__)
        asked = re.search(r"allocate (\d+) bytes", message)
        if isinstance(error, MemoryError) or (asked and int(asked[1]) <= path.stat().st_size):
            raise  # not the file's fault
        advice = "fetch or copy it again, or choose an older one of its run"
        raise InputError(f"{path} is truncated or damaged ({message}): {advice}") from error


# torch's complaint of a class that it does not know, and the members of what stands for it: an inert record, or an
# empty dict or list where the file goes on to fill it.
_STAND_INS: tuple[tuple[str, dict[str, object]], ...] = (
    (r"GLOBAL (\S+) was not an allowed global", dict.fromkeys(("__init__", "__setstate__"), lambda *_: None)),
    (r"Can only SETITEMS? for dict.*<class '(\S+)'>", {"__new__": lambda *_: OrderedDict()}),
    (r"Can only append to lists.*<class '(\S+)'>", {"__new__": lambda *_: []}),
)
MOST_FOREIGN_CLASSES = 100  # each one costs a reading


def _unpickled(path: Path, mmap: bool) -> Any:
    """Reads a file with torch's weights-only reader, which is given stand-ins for the classes it does not know."""
    _warn_of_old_torch(torch.__version__)
    kinds: dict[str, int] = {}
    while True:
        stand_ins = {_stand_in(name, _STAND_INS[kind][1]): name for name, kind in kinds.items()}
        try:
            with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            inert = {stand_in: name for stand_in, name in stand_ins.items() if kinds[name] == 0}
            return _without_foreign(content, path, inert) if inert else content
        except pickle.UnpicklingError as error:
            found = ((kind, re.search(pattern, str(error))) for kind, (pattern, _) in enumerate(_STAND_INS))
            kind, match = next((pair for pair in found if pair[1]), (0, None))
            name = match[1] if match and "." in match[1] else f"builtins.{match and match[1]}"  # which torch leaves out
            if match is None or kinds.get(name) != (0 if kind else None) or len(kinds) == MOST_FOREIGN_CLASSES:
                raise
            kinds[name] = kind


def _stand_in(full_name: str, members: dict[str, object]) -> type:
    module, _, name = full_name.rpartition(".")  # by which torch finds it
    return type(name, (), {"__module__": module, **members})


def _without_foreign(content: object, path: Path, stand_ins: Mapping[type, str]) -> object:
    """Removes what stands for objects of other classes from dicts and lists."""

    def foreign(value: object) -> bool:
        return type(value) in stand_ins or (isinstance(value, type) and value in stand_ins)

    if foreign(content):
        raise InputError(f"{path} was not opened: {_forbidden_content(f'GLOBAL {listed(stand_ins.values(), 1)}')}")
    dropped: list[object] = []
    seen: set[int] = set()
    left = [content]
    while left:  # not by recursion: a file may be nested as deep as it likes, or contain itself
        value = left.pop()
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        if id(value) in seen or not isinstance(value, (dict, list, tuple)):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            dropped += (odd := [key for key, entry in value.items() if foreign(key) or foreign(entry)])
            for key in odd:
                del value[key]
        elif isinstance(value, list):
            value[:] = [entry for entry in value if not foreign(entry)]
        left += value.values() if isinstance(value, dict) else value
    classes = listed(sorted(stand_ins.values()))
    logger.warning("%s: left out, as objects of other programs (%s): %s", path, classes, listed(dropped) or "in lists")
    return content


@functools.cache
def _warn_of_old_torch(version: str) -> None:
    if version < "2.10":  # compared as versions
        logger.warning("torch %s, before 2.10, lets a harmful file corrupt memory (CVE-2026-24747)", version)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of names and values; raises :class:`InputError` if it is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} is not a JSON object: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object, but of type {type(found).__name__}")
    return found


def settings_in(checkpoint: Mapping[str, Any]) -> Mapping[str, object]:
    """Returns the settings of the run that wrote a checkpoint, which official files have as a ``Namespace``."""
    args = checkpoint.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return args if isinstance(args, Mapping) else {}


def position_of(checkpoint: Checkpoint) -> tuple[int, int]:
    """Returns where a run continues from a checkpoint: the epoch, and the optimizer steps already done in it."""
    progress = checkpoint.get("progress")
    try:
        if progress is not None:
            return int(progress["epoch"]), int(progress["step"])
        return int(checkpoint.get("epoch", -1)) + 1, 0  # an official file, written at the end of an epoch
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the checkpoint does not say where its run was: {error!r}") from error


def differences(names: Sequence[str], given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Shows the shapes in a file (``given``) and a model (``own``) of the first two of the ``names`` that differ."""

    def shape(tensors: Mapping[str, Tensor], name: str) -> str:
        return str(tuple(tensors[name].shape)) if name in tensors else "absent"

    return "; ".join(f"{n} {shape(given, n)} in the file, {shape(own, n)} in the model" for n in names[:2])


def require_file(path: Path) -> None:
    """Raises an :class:`InputError` with near matches unless ``path`` is a file."""
    if path.is_dir():
        raise InputError(f"{path} is a folder where a file is needed")
    if not path.is_file():
        if os.path.lexists(path):
            raise InputError(f"{path} is no regular file, but a pipe, a device or a broken link")
        raise InputError(f"there is no file {path}{did_you_mean_file(path)}")


def _forbidden_content(message: str) -> str:
    if match := re.search(r"GLOBAL ([\w.]+)", message):
        return (
            f"it asks to import and call {match[1]}, and code inside checkpoints is never run; "
            "save the weights alone (a state dict of tensors) where the file comes from"
        )
    match = re.search(r"WeightsUnpickler error:\s*([^\n]+)", message)
    return f"it is no file that torch.save wrote, or it is damaged{f' ({match[1]})' if match else ''}"


def describe_problem(path: str | os.PathLike[str]) -> str | None:
    """Says what is wrong with a file that should hold weights, or returns None if nothing is obviously wrong."""
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(1024)
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        size = path.stat().st_size
        return f"it is a truncated download or copy, of {size} bytes; fetch it again, or choose an older one of its run"
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
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return f"it is text that begins {head[:40].decode('ascii')!r}; fetch it again"
    return None


def offline() -> bool:
    """Whether ``BEIT_OFFLINE`` forbids downloads."""
    return os.environ.get("BEIT_OFFLINE", "0") not in ("", "0")


def download(
    url: str | Sequence[str], destination: str | os.PathLike[str], *, verify: Callable[[Path], object] | None = None
) -> Path:
    """Makes sure that ``destination`` holds the file at ``url``, downloading it at most once, and returns it as a path.

    One process downloads while others wait. The hash is written to ``<destination>.sha256`` after the download and
    checked on every later use.

    Args:
        url: An http or https address, or several that hold the same file, tried in this order.
        destination: Where the file goes.
        verify: Called with the downloaded file under a temporary name; raises :class:`InputError` to reject it.

    Raises:
        InputError: Nothing delivers it, it has changed, it is a web page or text, or missing with ``BEIT_OFFLINE=1``.
    """
    destination = Path(os.path.realpath(destination))
    urls = [url] if isinstance(url, str) else list(url)
    if not destination.exists():
        if offline():
            raise InputError(f"{destination} is missing and BEIT_OFFLINE is set: put the file of {urls[0]} there")
        with _one_process(destination):
            if not destination.exists():  # otherwise the process we waited for has downloaded it
                _download_from_any(urls, destination, verify)
                return destination
    check_recorded_hash(destination)
    return destination


def check_recorded_hash(path: Path) -> None:
    """Raises :class:`InputError` if a file differs from the hash recorded beside it; records it if there is none."""
    record = path.with_name(path.name + ".sha256")
    recorded = record.read_text(errors="replace").split()[:1] if record.exists() else []
    found = sha256_of(path)
    if not recorded:
        if problem := describe_problem(path):
            raise InputError(f"{path} is not the file it should be: {problem}")
        _record_hash(path, found)
    elif found != recorded[0].lower():
        problem = f"{path} has changed: its sha256 is {found[:12]}…, not {recorded[0][:12]!a}… as recorded"
        raise InputError(f"{problem}; delete {path.name} and {record.name} to download it again")


def _record_hash(path: Path, digest: str) -> None:
    """Writes ``<path>.sha256`` in the format of ``sha256sum -c``; failing to (read-only folder) is a warning."""
    try:
        with atomic_write(path.with_name(path.name + ".sha256")) as file:
            file.write(f"{digest}  {path.name}\n".encode())
    except InputError as error:
        logger.warning("the hash of %s was not recorded: %s", path, error)


@contextlib.contextmanager
def _one_process(destination: Path) -> Iterator[None]:
    """Holds ``<destination>.lock``, waiting while another process does; the lock dies with its process."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{destination}.lock")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process to download %s", destination.name)
            lock.acquire()
    except NotImplementedError:
        logger.warning("no file locks in %s: two processes may download the same file", destination.parent)
    except OSError as error:
        raise _write_error(destination, error) from error
    try:
        yield
    finally:
        # Whoever waits on the removed file finds the download complete, or at worst repeats it.
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def _download_from_any(urls: list[str], destination: Path, verify: Callable[[Path], object] | None) -> None:
    failures = []
    for url in urls:
        try:
            with atomic_write(destination) as file:
                _fetch(url, file, destination.name)
                part = Path(file.name)
                if problem := describe_problem(part):
                    raise InputError(f"{url} does not deliver the file: {problem}")
                if verify is not None:
                    verify(part)
                _record_hash(destination, sha256_of(part))
            return
        except InputError as error:
            failures.append(str(error))
    by_hand = f"You can download it by hand to {destination}"
    raise InputError(f"{destination.name} was not downloaded: {'; '.join(failures)}. {by_hand}")


def _fetch(url: str, file: IO[bytes], name: str) -> None:
    """Downloads into ``file``, trying again after network trouble and server errors."""
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url!r} is no http or https address")
    url = quote(url, safe="%/:?#[]@!$&'()*+,;=~")  # blanks and letters beyond ASCII
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
        file.seek(0)
        file.truncate()
        try:
            return _transfer(url, file, name)
        except HTTPError as error:
            error.close()
            failure = f"{url} answers {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except (HTTPException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            failure = f"{url} cannot be fetched ({error})"
    raise InputError(failure)


def _transfer(url: str, file: IO[bytes], name: str) -> None:
    """Downloads once; a body that ends early, which ``urllib`` takes for the whole, is an error."""
    with urlopen(Request(url, headers={"User-Agent": "beit"}), timeout=TIMEOUT_SECONDS) as response:
        length = int(response.headers.get("Content-Length") or 0)  # 0 if it is not announced
        logger.info("downloading %s%s", name, f" ({length / 1e6:.1f} MB)" if length else "")
        with tqdm(total=length or None, unit="B", unit_scale=True, disable=None) as progress:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                progress.update(len(chunk))
    file.flush()
    if file.tell() < length:
        raise HTTPException(f"truncated: the connection ended after {file.tell()} of {length} bytes")
