"""Images in tar files, as WebDataset writes them: found once, then read one by one, in any order.

Files that share a name up to the first dot belong to one sample: ``0007.jpg`` is an image, ``0007.cls`` its class, a
number in text. A name may have more dots: ``a.1.jpg`` is an image too, but not beside ``a.jpg``, whose sample it
belongs to. Nothing is ever extracted: an index records which bytes of which shard are an image.
"""

import errno
import functools
import glob
import io
import itertools
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from beit.data.compact import Strings, as_array
from beit.errors import InputError, did_you_mean_file

SUFFIX = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
LABEL_EXTENSION = "cls"
CLASS_NAMES_FILE = "classes.txt"  # beside the shards: one class name per line, from class 0 on

_LONGEST_LABEL = 32
_AT_ONCE = 1 << 20  # bytes
_MOST_SHARDS = _MOST_CLASSES = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_CONTROL = re.compile(r"[\0-\x1f\x7f]")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def names_shards(path: str | os.PathLike[str]) -> bool:
    """Whether a path names tar files, such as ``shards-{000000..000127}.tar``, ``shards-*.tar`` or ``one.tar``.

    Raises :class:`InputError` if they are compressed.
    """
    text = os.fspath(path)
    if os.path.isdir(text):
        return False
    if text.lower().endswith(COMPRESSED):
        raise InputError(f"{text}: images cannot be read from a compressed archive; decompress it to a plain .tar")
    return text.lower().endswith(SUFFIX)


def expand(pattern: str) -> list[str]:
    """Returns the files that a pattern names: ranges and lists in braces in their order, then ``*?[]`` by name.

    A folder that exists is taken as it is spelled, whatever is in its name, and so is a file.

    Raises :class:`InputError` if a range cannot be used, or a shard does not exist.
    """
    if os.path.isfile(pattern):
        return [pattern]
    folder = pattern
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    names = list(itertools.islice(_braces_expanded(pattern[len(folder) :]), _MOST_SHARDS + 1))
    if len(names) > _MOST_SHARDS:
        raise InputError(f"{pattern} stands for more than {_MOST_SHARDS} files")
    paths: list[str] = []
    for name in names:  # one that matches nothing stays, as a file that is missing
        paths += sorted(glob.glob(glob.escape(folder) + name)) or [folder + name]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        what = "no file matches" if glob.has_magic(missing[0].removeprefix(folder)) else "no such file:"
        raise InputError(f"{pattern}: {what} {missing[0]}{more}{did_you_mean_file(missing[0])}")
    return paths


def _braces_expanded(pattern: str) -> Iterator[str]:
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    choices: Iterable[str] = braces[1].split(",")
    if ends := _RANGE.fullmatch(braces[1]):
        first, last = int(ends[1]), int(ends[2])
        if first > last:
            raise InputError(f"{pattern}: the range {braces[0]} goes down; give the smaller number first")
        width = len(ends[1]) if ends[1].startswith("0") or len(ends[1]) == len(ends[2]) else 0
        choices = (f"{number:0{width}d}" for number in range(first, last + 1))
    for choice in choices:
        yield from _braces_expanded(pattern[: braces.start()] + choice + pattern[braces.end() :])


@dataclass(frozen=True)
class Members:
    """Where images are in their shards, and their classes, ``(N,)`` each."""

    offsets: NDArray[np.int64]  # of the first byte
    lengths: NDArray[np.int64]  # in bytes
    labels: NDArray[np.int32]  # -1 for none


def scan(paths: Sequence[str], extensions: Sequence[str]) -> tuple[Strings, NDArray[np.int32], Members, Counter[str]]:
    """Finds the images in tar files by reading their headers; ``extensions`` are with the dot, in lower case.

    Returns the images' names in their shards, the number of each image's shard ``(N,)``, where they are, and how many
    files of which extension are neither images nor belong to one.

    Raises:
        InputError: A file is cut short, damaged or not a plain tar file, or has two members of one name.
    """
    shard_of, offsets, lengths, labels = array("i"), array("q"), array("q"), array("i")
    others: Counter[str] = Counter()

    def names() -> Iterator[str]:
        for number, path in enumerate(paths):
            for name, offset, length, label in _images(path, extensions, others):
                shard_of.append(number)
                offsets.append(offset)
                lengths.append(length)
                labels.append(label)
                yield name

    strings = Strings.of(names())
    return strings, as_array(shard_of), Members(as_array(offsets), as_array(lengths), as_array(labels)), others


def _images(path: str, extensions: Sequence[str], others: Counter[str]) -> Iterator[tuple[str, int, int, int]]:
    """Yields name, offset, length and class (-1 for none) of a shard's images; counts the other files' extensions."""
    places: dict[str, tuple[int, int]] = {}
    classes: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            for member in _members(file, path):
                if member.name in places:
                    raise InputError(f"{path} has two files {member.name}: names in a shard must differ")
                places[member.name] = member.offset_data, member.size
                stem, extension = os.path.splitext(member.name)
                if extension == f".{LABEL_EXTENSION}":
                    content = os.pread(file.fileno(), min(member.size, _LONGEST_LABEL), member.offset_data)
                    classes[stem] = _label(content, path, member.name)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    names = [name for name in places if not os.path.basename(name).startswith(".")]
    stems = {os.path.splitext(name)[0] for name in names if name.lower().endswith(tuple(extensions))}
    samples = stems | set(map(_key, stems))
    for name in names:
        (stem, extension), key = os.path.splitext(name), _key(name)
        image = extension.lower() in extensions
        if image and (stem == key or key not in stems):
            yield name, *places[name], classes.get(stem, classes.get(key, -1))
        elif image or not {stem, key} & samples:
            others[name.removeprefix(key).lower()] += 1


def _key(name: str) -> str:
    # As WebDataset: the name up to the first dot after the last slash.
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _label(content: bytes, path: str, name: str) -> int:
    try:
        label = int(content)
    except ValueError:
        label = -1
    if not 0 <= label < _MOST_CLASSES:
        raise InputError(f"{path}: {name} is not the number of a class: {content[:16]!r}")
    return label


def _members(file: io.BufferedReader, path: str) -> Iterator[tarfile.TarInfo]:
    """Yields the plain files of a tar archive; ``tarfile`` accepts archives cut short, so the end mark is checked."""
    size, at = os.fstat(file.fileno()).st_size, 0
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
            for member in archive:
                at = archive.offset
                if at > size:
                    break
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise InputError(f"{path}: {member.name} is a link or a special file; shards hold plain files only")
                if member.name.startswith("/") or ".." in member.name.split("/") or _CONTROL.search(member.name):
                    raise InputError(f"{path}: a file named {member.name!r} is refused")
                yield member
    except tarfile.TarError as error:
        if at == 0 and size >= tarfile.BLOCKSIZE:
            raise InputError(f"{path} is not a tar file, or it is compressed; shards are plain tar files") from error
    block = os.pread(file.fileno(), tarfile.BLOCKSIZE, at)
    if len(block) < tarfile.BLOCKSIZE:
        raise InputError(f"{path} is cut short: it ends at byte {size} without the end mark of a tar file")
    if any(block):
        raise InputError(f"{path} is damaged: there is no valid header at byte {at}")
    file.seek(at)
    while rest := file.read(_AT_ONCE):
        if rest.strip(b"\0"):
            raise InputError(f"{path} goes on after its end mark at byte {at}: give archives one by one, not joined")


def class_names(folder: str, labels: NDArray[np.int32]) -> tuple[str, ...]:
    """Returns the class names in ``classes.txt`` beside the shards or, without that file, the class numbers.

    If an image has no class there are no names. Raises :class:`InputError` if ``classes.txt`` has too few.
    """
    if labels.min() < 0:
        return ()
    count = int(labels.max()) + 1
    path = os.path.join(folder, CLASS_NAMES_FILE)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            if "\0" in (content := file.read()):
                raise ValueError("it is not UTF-8 text")
        names = tuple(content.removesuffix("\n").split("\n"))  # not splitlines: names may have other breaks
    except FileNotFoundError:
        return tuple(map(str, range(count)))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if len(names) < count:
        raise InputError(f"{path} has {len(names)} names, but there is a class {count - 1} in the shards")
    return names


class ShardReader:
    """Reads pieces of files through at most ``limit`` files that stay open; the least recently used is closed.

    Reads are positional, so a file may be shared with a parent or child process. A pickled reader opens its own.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        # Closed with the last reference: another thread may still be reading one that has been evicted.
        self._opened = functools.lru_cache(limit)(functools.partial(open, mode="rb", buffering=0))

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[int]]:
        return ShardReader, (self._limit,)

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Returns ``length`` bytes of a file; raises OSError if it cannot be read, or is shorter."""
        content = os.pread(self._opened(path).fileno(), length, offset)
        if len(content) < length:
            raise OSError(errno.EIO, "the shard is cut short")
        return content


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file to a shard without owner or time, so that the same images give the same shard."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    archive.addfile(info, io.BytesIO(content))
