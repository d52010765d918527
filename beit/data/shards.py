"""Images in tar files, as WebDataset writes them: found once, then read one by one, in any order.

Files that share a name up to the first dot belong to one sample: ``0007.jpg`` is an image, ``0007.cls`` its class, a
number in text. Nothing is ever extracted: an index records which bytes of which shard are an image.
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
from beit.errors import InputError, did_you_mean

SUFFIX = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
LABEL_EXTENSION = "cls"
CLASS_NAMES_FILE = "classes.txt"  # beside the shards: one class name per line, from class 0 on

_LONGEST_LABEL = 32
_MOST_SHARDS = 1_000_000
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

    Raises :class:`InputError` if a range cannot be used, or a shard does not exist.
    """
    if os.path.exists(pattern):
        return [pattern]
    names = list(itertools.islice(_braces_expanded(pattern), _MOST_SHARDS + 1))
    if len(names) > _MOST_SHARDS:
        raise InputError(f"{pattern} stands for more than {_MOST_SHARDS} files")
    paths = [path for name in names for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{pattern}: no such file: {missing[0]}{more}{did_you_mean_file(missing[0])}")
    if not paths:
        raise InputError(f"no file matches {pattern}")
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


def did_you_mean_file(path: str | os.PathLike[str]) -> str:
    """Returns `` (did you mean ...?)`` for the names beside a missing file, or that its folder is missing too."""
    folder, name = os.path.split(path)
    try:
        return did_you_mean(name, os.listdir(folder))
    except OSError:
        return f" ({folder} does not exist either)"


@dataclass(frozen=True)
class Members:
    """Where images are in their shards.

    Attributes:
        offsets: Of the first byte, int64 ``(N,)``.
        lengths: In bytes, int64 ``(N,)``.
        labels: Class numbers, int32 ``(N,)``; -1 where there is none.
    """

    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    labels: NDArray[np.int32]


def scan(paths: Sequence[str], extensions: Sequence[str]) -> tuple[Strings, NDArray[np.int32], Members]:
    """Finds the images in tar files by reading their headers; ``extensions`` are with the dot, in lower case.

    Returns the images' names in their shards, the number of each image's shard ``(N,)``, and where they are.

    Raises:
        InputError: A file is cut short, damaged or not a plain tar file, or there is no image.
    """
    shard_of, offsets, lengths, labels = array("i"), array("q"), array("q"), array("i")
    others: Counter[str] = Counter()

    def names() -> Iterator[str]:
        for number, path in enumerate(paths):
            images, classes = _images(path, extensions, others)
            for name, offset, length in images:
                shard_of.append(number)
                offsets.append(offset)
                lengths.append(length)
                labels.append(classes.get(_split(name)[0], -1))
                yield name

    strings = Strings.of(names())
    if not len(strings):
        found = ", ".join(f"{count} .{extension}" for extension, count in others.most_common(5)) or "no files at all"
        raise InputError(
            f"no images in {paths[0]} (of {len(paths)} shards): looked for {' '.join(extensions)}, found {found}"
        )
    return strings, as_array(shard_of), Members(as_array(offsets), as_array(lengths), as_array(labels))


def _images(
    path: str, extensions: Sequence[str], others: Counter[str]
) -> tuple[list[tuple[str, int, int]], dict[str, int]]:
    """Returns a shard's images and its classes by key, and counts the extensions of all other files."""
    images, classes = [], {}
    try:
        with open(path, "rb") as file:
            for member in _members(file, path):
                key, extension = _split(member.name)
                if f".{extension.lower()}" in extensions:
                    images.append((member.name, member.offset_data, member.size))
                elif extension == LABEL_EXTENSION:
                    content = os.pread(file.fileno(), min(member.size, _LONGEST_LABEL), member.offset_data)
                    classes[key] = _label(content, path, member.name)
                else:
                    others[extension or "no extension"] += 1
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return images, classes


def _split(name: str) -> tuple[str, str]:
    # As WebDataset: the key is the name up to the first dot after the last slash.
    folder, _, file = name.rpartition("/")
    key, _, extension = file.partition(".")
    return f"{folder}/{key}", extension


def _label(content: bytes, path: str, name: str) -> int:
    try:
        label = int(content)
    except ValueError:
        label = -1
    if not 0 <= label < 2**31:
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


def class_names(folder: str, labels: NDArray[np.int32]) -> tuple[str, ...]:
    """Returns the class names in ``classes.txt`` beside the shards or, without that file, the class numbers.

    If an image has no class there are no names. Raises :class:`InputError` if ``classes.txt`` has too few.
    """
    if labels.min() < 0:
        return ()
    count = int(labels.max()) + 1
    path = os.path.join(folder, CLASS_NAMES_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            names = tuple(file.read().splitlines())
    except FileNotFoundError:
        return tuple(map(str, range(count)))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if len(names) < count:
        raise InputError(f"{path} has {len(names)} names, but there is a class {count - 1} in the shards")
    return names


class ShardReader:
    """Reads pieces of files through at most ``limit`` descriptors that stay open; the least recently used is closed.

    Reads are positional, so a descriptor may be shared with a parent or child process. A pickled reader opens its own.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._opened = functools.lru_cache(limit)(_Descriptor)

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[int]]:
        return ShardReader, (self._limit,)

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Returns ``length`` bytes of a file; raises OSError if it cannot be read, or is shorter."""
        descriptor = self._opened(path)
        content = os.pread(descriptor.number, length, offset)
        if len(content) < length:
            raise OSError(errno.EIO, "the shard is cut short")
        return content


class _Descriptor:
    """An open file, closed with the last reference to it: another thread may still be reading an evicted one."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file to a shard without owner or time, so that the same images give the same shard."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    archive.addfile(info, io.BytesIO(content))
