"""Images in tar files as WebDataset keeps them: found once, then read one by one, in any order.

A sample is what shares a name up to the first point: ``0007.jpg`` is an image, ``0007.cls`` its class, a number in
text. Nothing is ever extracted: an index says where in which file the bytes of an image are.
"""

import errno
import glob
import io
import itertools
import os
import re
import tarfile
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beit.data.compact import Strings, as_array
from beit.errors import InputError, did_you_mean

SUFFIX = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
LABEL_EXTENSION = "cls"
CLASS_NAMES_FILE = "classes.txt"  # beside the shards: a class name on each line, from class 0 on

_BLOCK = 512
_END = bytes(_BLOCK)
_LONGEST_LABEL = 32
_MOST_SHARDS = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_OCTAL = re.compile(rb"[0-7]+(?=[ \0])")  # of a header's numbers
_CONTROL = re.compile(r"[\0-\x1f\x7f]")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


# --------------------------------------------------------------------------------------------------- which shards
def names_shards(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of tar files, such as ``shards-{000000..000127}.tar``, ``shards-*.tar`` or ``one.tar``.

    Raises:
        InputError: The tar files are compressed.
    """
    text = os.fspath(path)
    if os.path.isdir(text):
        return False
    if text.lower().endswith(COMPRESSED):
        raise InputError(f"{text}: an image cannot be found in a compressed file; unpack it to a plain .tar")
    return text.lower().endswith(SUFFIX)


def expand(pattern: str) -> list[str]:
    """Returns the files that a pattern names: ranges and lists in braces in their order, then ``*?[]`` by name.

    Raises:
        InputError: A range cannot be used, or a shard is not there.
    """
    if os.path.exists(pattern):
        return [pattern]
    names = list(itertools.islice(_braces_expanded(pattern), _MOST_SHARDS + 1))
    if len(names) > _MOST_SHARDS:
        raise InputError(f"{pattern} stands for more than {_MOST_SHARDS} files")
    paths = [path for name in names for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{len(paths)} shards are asked for, of which {missing[0]}{more} is not there{_near(missing[0])}"
        )
    if not paths:
        raise InputError(f"no file fits {pattern}")
    return paths


def _braces_expanded(pattern: str) -> Iterator[str]:
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    for choice in _choices(braces[1], pattern):
        yield from _braces_expanded(pattern[: braces.start()] + choice + pattern[braces.end() :])


def _choices(content: str, pattern: str) -> Iterable[str]:
    ends = _RANGE.fullmatch(content)
    if ends is None:
        return content.split(",")
    first, last = int(ends[1]), int(ends[2])
    if first > last:
        raise InputError(f"{pattern}: the range {{{content}}} goes down; give the smaller number first")
    width = len(ends[1]) if ends[1].startswith("0") or len(ends[1]) == len(ends[2]) else 0
    return (f"{number:0{width}d}" for number in range(first, last + 1))


def _near(path: str) -> str:
    try:
        return did_you_mean(os.path.basename(path), os.listdir(os.path.dirname(path)))
    except OSError:
        return f" ({os.path.dirname(path)} does not exist)"


# ------------------------------------------------------------------------------------------------ what is in them
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
    """Finds the images in tar files, by reading the headers only.

    Args:
        paths: The files.
        extensions: Of images, with the point, in small letters.

    Returns:
        The images' names in their shards, the number of each image's shard ``(N,)``, and where they are.

    Raises:
        InputError: A file is cut short, no tar or not plain, or there is no image.
    """
    shard_of, offsets, lengths, labels = array("i"), array("q"), array("q"), array("i")
    others: Counter[str] = Counter()

    def names() -> Iterator[str]:
        for number, path in enumerate(paths):
            images, classes, rest = _samples(path, extensions)
            others.update(rest)
            for name, offset, length in images:
                shard_of.append(number)
                offsets.append(offset)
                lengths.append(length)
                labels.append(classes.get(_split(name)[0], -1))
                yield name

    strings = Strings.of(names())
    if not len(strings):
        found = ", ".join(f"{count} .{extension}" for extension, count in others.most_common(5)) or "nothing at all"
        raise InputError(
            f"no images in {paths[0]} (of {len(paths)} shards): looked for {' '.join(extensions)}, found {found}"
        )
    return strings, as_array(shard_of), Members(as_array(offsets), as_array(lengths), as_array(labels))


def _samples(path: str, extensions: Sequence[str]) -> tuple[list[tuple[str, int, int]], dict[str, int], Counter[str]]:
    """Returns a shard's images, its classes by key, and how many other files of which extension it has."""
    images, classes, others = [], {}, Counter[str]()
    try:
        with open(path, "rb", buffering=0) as file:
            for name, offset, length in _members(file, path):
                key, extension = _split(name)
                if f".{extension.lower()}" in extensions:
                    images.append((name, offset, length))
                elif extension == LABEL_EXTENSION:
                    classes[key] = _label(os.pread(file.fileno(), min(length, _LONGEST_LABEL), offset), path, name)
                else:
                    others[extension or "no extension"] += 1
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return images, classes, others


def _split(name: str) -> tuple[str, str]:
    # As WebDataset: what belongs together shares a name up to the first point after the last slash.
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


def _members(file: io.FileIO, path: str) -> Iterator[tuple[str, int, int]]:
    """Yields (name, offset, length) of a tar archive's files.

    The standard library's reader takes an archive that breaks off in a header for one that ends there. Of its code
    the parser of single headers is used, for those out of the ordinary.
    """
    size, at = os.fstat(file.fileno()).st_size, 0
    extended: dict[str, str] = {}  # what a header before said of the next one
    while True:
        header = os.pread(file.fileno(), _BLOCK, at)
        if len(header) < _BLOCK:
            raise InputError(f"{path} is cut short: it ends at byte {size} without the end mark of a tar file")
        if header == _END:
            return
        name, length, kind = _plain(header) or _parsed(header, path, at)
        start, length = at + _BLOCK, int(extended.get("size", length))
        name = extended.get("path", name)
        at = start + -(-length // _BLOCK) * _BLOCK
        if at > size:
            raise InputError(f"{path} is cut short: {name} should end at byte {start + length} of {size}")
        if kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            extended |= _extension(kind, os.pread(file.fileno(), length, start), path)
            continue
        if kind in (tarfile.REGTYPE, tarfile.AREGTYPE):
            _check_name(name, path)
            yield name, start, length
        elif kind not in (tarfile.DIRTYPE, tarfile.XGLTYPE):
            raise InputError(f"{path}: {name} is a link or a special file; shards hold plain files only")
        extended = {}


def _plain(header: bytes) -> tuple[str, int, bytes] | None:
    """Returns name, length and kind in an ordinary header of a plain file; None for any other. Several times faster."""
    length, check = _OCTAL.match(header, 124), _OCTAL.match(header, 148)
    if header[156:157] != tarfile.REGTYPE or header[345] or length is None or check is None:
        return None
    if int(check[0], 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        return None
    name, zero, _ = header[:100].partition(b"\0")
    return (os.fsdecode(name), int(length[0], 8), tarfile.REGTYPE) if zero and name[-1:] not in (b"", b"/") else None


def _parsed(header: bytes, path: str, at: int) -> tuple[str, int, bytes]:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        return info.name, info.size, info.type
    except tarfile.HeaderError as error:
        if at == 0:
            raise InputError(f"{path} is no tar file, or a compressed one; shards are plain tar files") from error
        raise InputError(f"{path} is damaged: at byte {at} there should be a file's header ({error})") from error


def _extension(kind: bytes, content: bytes, path: str) -> dict[str, str]:
    """Parses a header for what does not fit into one: GNU's long name, or POSIX's records ``LENGTH KEY=VALUE``."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": os.fsdecode(content.rstrip(b"\0"))}
    records = {}
    while content.rstrip(b"\0"):
        length = int(content.split(b" ", 1)[0]) if re.match(rb"[1-9]\d{0,8} ", content) else 0
        key, equals, value = content[:length].rstrip(b"\n").partition(b" ")[2].partition(b"=")
        if not equals:
            raise InputError(f"{path} is damaged: an extended header cannot be read")
        if key.startswith(b"GNU.sparse"):
            raise InputError(f"{path} holds sparse files; shards hold plain files only")
        records[key.decode("utf-8", "replace")] = os.fsdecode(value)
        content = content[length:]
    return {key: records[key] for key in ("path", "size") if key in records}


def _check_name(name: str, path: str) -> None:
    # Names are only shown and compared; but what leads out of a folder is not what it says it is.
    if name.startswith("/") or ".." in name.split("/") or _CONTROL.search(name):
        raise InputError(f"{path} holds a file of the name {name!r}, which is refused")


def class_names(folder: str, labels: NDArray[np.int32]) -> tuple[str, ...]:
    """Returns the names of classes: those of ``classes.txt`` in the folder of the shards, else their numbers.

    Without a class for every image there are none.

    Raises:
        InputError: There are classes without a name.
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


# ----------------------------------------------------------------------------------------------- reading, writing
class ShardReader:
    """Reads pieces of files, from descriptors that stay open; the ones used least recently are closed.

    Each piece is read at its own position, so that a descriptor may be shared with a parent or a child process. What
    is sent to another process opens its own.

    Args:
        limit: Files kept open.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()

    def __reduce__(self) -> Any:
        return ShardReader, (self._limit,)

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Returns ``length`` bytes of a file.

        Raises:
            OSError: It cannot be read, or is shorter.
        """
        descriptor = self._open.get(path) or _Descriptor(path)
        self._open[path] = descriptor
        self._open.move_to_end(path)
        if len(self._open) > self._limit:
            self._open.popitem(last=False)
        content = os.pread(descriptor.number, length, offset)
        if len(content) < length:
            raise OSError(errno.EIO, "the shard is cut short")
        return content


class _Descriptor:
    """An open file, closed with the last reference to it: a thread may still read what another one has put away."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file to a shard, with nothing of where and when it was made: the same images give the same shard."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    archive.addfile(info, io.BytesIO(content))
