"""Which images there are: a folder, a list or tar shards, read once, kept compactly, and on disk for the next run."""

import hashlib
import io
import logging
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beit.data.compact import Strings, as_array, map_arrays, save_arrays
from beit.data.shards import Members, ShardReader, class_names, expand, names_shards, scan
from beit.errors import InputError, did_you_mean
from beit.storage import beit_home

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's folders

_INDEX_VERSION = 2
# A folder changed this shortly before it was listed may change again without its time stamp moving.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class ImageIndex:
    """The images below a folder, in a list or in shards, about 50 bytes each; made by :func:`index_images`.

    Attributes:
        root: Absolute path of the folder, or of the folder the list or the shards are in.
        class_names: Names of the folders directly below ``root``, when every image is below one; of shards, the names
            of their classes; else empty.
    """

    root: str
    class_names: tuple[str, ...]
    _folders: Strings = field(repr=False)
    _class_of_folder: NDArray[np.int32] = field(repr=False)
    _names: Strings = field(repr=False)
    _folder_of: NDArray[np.int32] = field(repr=False)
    _members: Members | None = field(repr=False, default=None)  # of shards, which are what the folders are then
    _reader: ShardReader = field(repr=False, compare=False, default_factory=ShardReader)

    def __len__(self) -> int:
        return len(self._names)

    def path(self, i: int) -> str:
        """Returns the path of image ``i``; in a shard, its name after the shard's path, for messages only."""
        i = range(len(self))[i]
        return os.path.join(self.root, self._folders[int(self._folder_of[i])], self._names[i])

    def file(self, i: int) -> str | io.BytesIO:
        """Returns what to open for image ``i``: its path, or its bytes out of a shard.

        Raises:
            OSError: The shard cannot be read.
        """
        i = range(len(self))[i]
        if self._members is None:
            return self.path(i)
        shard = os.path.join(self.root, self._folders[int(self._folder_of[i])])
        return io.BytesIO(self._reader.read(shard, int(self._members.offsets[i]), int(self._members.lengths[i])))

    def class_id(self, i: int) -> int | None:
        """Returns the position in ``class_names`` of image ``i``'s class; None where there are no classes."""
        i = range(len(self))[i]
        if not self.class_names:
            return None
        return int(self._class_of_folder[self._folder_of[i]] if self._members is None else self._members.labels[i])

    @property
    def bytes_held(self) -> int:
        """The size of the index, in bytes."""
        arrays: list[NDArray[Any]] = [
            self._folders.blob,
            self._folders.ends,
            self._class_of_folder,
            self._names.blob,
            self._names.ends,
        ]
        arrays.append(self._folder_of)
        if self._members is not None:
            arrays += vars(self._members).values()
        return sum(values.nbytes for values in arrays)


def image_files(given: Iterable[str]) -> list[str]:
    """Returns image files as they are named, and in place of a folder the images in it and below.

    Raises:
        InputError: One is not there, or is a tar file.
    """
    paths: list[str] = []
    for path in given:
        if names_shards(path):
            raise InputError(f"{path}: results are named after image files, not read from tar shards; unpack them")
        if os.path.isdir(path):
            index = index_images(path)
            paths += [str(index.path(number)) for number in range(len(index))]
        elif os.path.isfile(path):
            paths.append(path)
        else:
            raise InputError(f"there is no image {path}")
    return paths


def index_images(path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> ImageIndex:
    """Lists the images of a folder, of all folders below it, of a text file, or in tar shards.

    A folder is listed as it is: one named ``train`` inside it is not chosen. Its images come in the order of their
    paths, class by class. When every image is in a folder below ``path``, the folders directly below are the classes
    (as in torchvision's ``ImageFolder``, which a folder without images does not count for). Hidden folders are left
    out; links are followed. A text file has one path a line, absolute or relative to the file, in the order wanted.

    A path that ends in ``.tar`` names shards in WebDataset's format, with ranges, lists and wildcards as in
    ``shards-{000000..000127}.tar``. Their images come in the order of the shards, and in it as they are in the file.

    The list is kept in ``cache_dir`` and used again as long as no folder in it (the text file, no shard) has changed;
    it is then not read into memory but mapped, so that all processes of a machine share it.

    Args:
        path: The folder, the text file, or the shards.
        cache_dir: Where to keep the list; ``None`` is ``index`` in ``$BEIT_HOME`` (or ``~/.cache/beit``).

    Raises:
        InputError: The path does not exist or cannot be read, or there is no image.
    """
    source = Path(os.path.abspath(os.path.expanduser(path)))
    shards = expand(str(source)) if names_shards(source) else []
    if not shards and not source.exists():
        raise InputError(f"no such folder or list of images: {source}{_near(source)}")
    cache = _cache_file(source, cache_dir)
    index = _load_index(cache, source, shards)
    if index is None:
        listing = _list_shards(shards) if shards else _list_folder(source) if source.is_dir() else _list_file(source)
        # What was kept takes the place of what was listed, which is not mapped but in memory.
        kept = _save_index(cache, source, listing)
        index = (_load_index(cache, source, shards) if kept else None) or listing.index
    if source.is_file() and not shards:
        _require_some_exist(index, source)
    return index


@dataclass(frozen=True)
class _Listing:
    index: ImageIndex
    watched: list[str]  # folders (relative to the root) whose change makes the listing stale, or the list's name
    stamps: list[int]  # their modification times in ns, taken before they were read
    began: int  # when the listing did, ns


def _list_folder(root: Path) -> _Listing:
    began = time.time_ns()
    images: dict[str, bytes] = {}  # the names in a folder, joined: a tenth of the memory of a list
    counts: dict[str, int] = {}
    stamps: dict[str, int] = {}
    others: Counter[str] = Counter()
    for folder, stamp, names in _walk(str(root)):
        stamps[folder] = stamp
        found = [name for name in names if name.lower().endswith(EXTENSIONS)]
        others.update(os.path.splitext(name)[1].lower() or "no extension" for name in names)
        if found:
            images[folder] = b"\0".join(os.fsencode(name) for name in sorted(found))
            counts[folder] = len(found)
    if not images:
        raise InputError(_nothing_found(root, others))
    # Class by class, then by path: "a/x" comes before "a-b", which plain string order would put first.
    folders = sorted(images, key=lambda folder: (folder.partition(os.sep)[0], folder))
    classes = tuple(dict.fromkeys(folder.partition(os.sep)[0] for folder in folders))
    classes = () if "" in images else classes
    ids = {name: i for i, name in enumerate(classes)}
    index = ImageIndex(
        str(root),
        classes,
        Strings.of(folders),
        np.asarray([ids.get(folder.partition(os.sep)[0], -1) for folder in folders], dtype=np.int32),
        Strings.of(name for folder in folders for name in images.pop(folder).split(b"\0")),
        np.repeat(np.arange(len(folders), dtype=np.int32), [counts[folder] for folder in folders]),
    )
    return _Listing(index, list(stamps), list(stamps.values()), began)


def _walk(root: str) -> Iterator[tuple[str, int, list[str]]]:
    """Yields (folder relative to ``root``, its modification time in ns, its file names) for every folder."""
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while waiting:
        folder, above = waiting.pop()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            with os.scandir(path) as entries:
                # A pipe or a device is no image, whatever its name; a dead link is one that cannot be read.
                found = [(e.name, e.is_dir()) for e in entries if e.is_dir() or e.is_file() or e.is_symlink()]
        except OSError as error:
            if not folder:
                raise InputError(f"cannot list {root}: {error.strerror}") from error
            logger.warning("left out the folder %s: %s", path, error.strerror)
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in above:  # a link to a folder it is in
            continue
        yield folder, status.st_mtime_ns, [name for name, is_folder in found if not (is_folder or name.startswith("."))]
        waiting += [
            (os.path.join(folder, name), (*above, identity))
            for name, is_folder in found
            if is_folder and not name.startswith(".")
        ]


def _list_file(source: Path) -> _Listing:
    began = time.time_ns()
    if source.name.lower().endswith(EXTENSIONS):
        raise InputError(f"{source} is one image; give a folder of images, or a text file with a path on each line")
    folders: dict[str, int] = {}
    folder_of = array("i")

    def names(lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            if line := line.strip():
                folder, name = os.path.split(line)
                folder_of.append(folders.setdefault(folder, len(folders)))
                yield name

    try:
        stamp = source.stat().st_mtime_ns
        with source.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            if "\0" in lines.read(4096):
                raise InputError(f"{source} is not a text file; give a folder, or a text file with a path on each line")
            lines.seek(0)
            strings = Strings.of(names(lines))
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from error
    if not folder_of:
        raise InputError(f"the list of images {source} is empty; it needs one path a line")
    no_classes = np.full(len(folders), -1, dtype=np.int32)
    index = ImageIndex(str(source.parent), (), Strings.of(folders), no_classes, strings, as_array(folder_of))
    return _Listing(index, [source.name], [stamp], began)


def _list_shards(shards: list[str]) -> _Listing:
    began = time.time_ns()
    stamps = [os.stat(shard).st_mtime_ns for shard in shards]
    names, shard_of, members = scan(shards, EXTENSIONS)
    root = _folder_of_shards(shards)
    relative = [os.path.relpath(shard, root) for shard in shards]
    without = int((members.labels < 0).sum())
    if 0 < without < len(names):
        logger.warning("%d of %d images in %s have no class: all go without", without, len(names), root)
    classes = class_names(root, members.labels)
    no_classes = np.full(len(shards), -1, dtype=np.int32)
    index = ImageIndex(root, classes, Strings.of(relative), no_classes, names, shard_of, members)
    return _Listing(index, relative, stamps, began)


def _folder_of_shards(shards: list[str]) -> str:
    return os.path.commonpath([os.path.dirname(shard) for shard in shards])


def _require_some_exist(index: ImageIndex, source: Path) -> None:
    # A few are enough to notice a list made for another place; single missing files are found when they are read.
    sample = {i * (len(index) - 1) // 15 for i in range(16)}
    if not any(os.path.exists(index.path(i)) for i in sample):
        raise InputError(
            f"none of the files in the list {source} is there, for example {index.path(0)}; "
            "paths are absolute or relative to the list"
        )


def _near(source: Path) -> str:
    try:
        return did_you_mean(source.name, os.listdir(source.parent))
    except OSError:
        return f" ({source.parent} does not exist either)"


def _nothing_found(root: Path, others: Counter[str]) -> str:
    found = ", ".join(f"{count} {extension}" for extension, count in others.most_common(5))
    return (
        f"no images in {root} or the folders below: looked for {' '.join(EXTENSIONS)}, "
        f"found {f'other files only ({found})' if found else 'no files at all'}"
    )


def _cache_file(source: Path, cache_dir: str | os.PathLike[str] | None) -> Path:
    folder = beit_home() / "index" if cache_dir is None else Path(cache_dir)
    return folder / f"{hashlib.sha256(os.fsencode(source)).hexdigest()[:24]}.npz"


def _save_index(cache: Path, source: Path, listing: _Listing) -> bool:
    """Keeps a listing on disk; returns whether it did."""
    if max(listing.stamps) > listing.began - _SETTLED_NS:
        return False
    index, watched = listing.index, Strings.of(listing.watched)
    strings = {"watched": watched, "classes": Strings.of(index.class_names)}
    strings |= {"folders": index._folders, "names": index._names}
    arrays = {
        "version": np.asarray([_INDEX_VERSION]),
        "source": np.frombuffer(os.fsencode(source), dtype=np.uint8),
        "stamps": np.asarray(listing.stamps, dtype=np.int64),
        "class_of_folder": index._class_of_folder,
        "folder_of": index._folder_of,
        **{name: value.blob for name, value in strings.items()},
        **{f"{name}_ends": value.ends for name, value in strings.items()},
    }
    if index._members is not None:
        arrays |= vars(index._members)
    try:
        save_arrays(cache, arrays)
    except (OSError, InputError) as error:  # without it the next run lists again, no more
        logger.info("the list of images was not kept in %s: %s", cache, error)
        return False
    return True


def _load_index(cache: Path, source: Path, shards: list[str]) -> ImageIndex | None:
    """Returns the kept index of ``source`` if it is there and still true."""
    try:
        kept = map_arrays(cache)
        if int(kept["version"][0]) != _INDEX_VERSION or os.fsdecode(kept["source"].tobytes()) != str(source):
            return None
        index = _index_of(kept, source, shards)
        watched = Strings(kept["watched"], kept["watched_ends"])
        if shards and [os.path.join(index.root, watched[i]) for i in range(len(watched))] != shards:
            return None
        for i, stamp in enumerate(kept["stamps"].tolist()):
            if os.stat(os.path.join(index.root, watched[i])).st_mtime_ns != stamp:
                return None
        return index if 0 < len(index) == len(index._folder_of) else None
    except InputError:
        raise
    except Exception as error:  # a damaged cache can fail in any way, and is never a reason to stop
        if not isinstance(error, FileNotFoundError):
            logger.info("the kept list of images %s is of no use: %s", cache, error)
        return None


def _index_of(kept: dict[str, NDArray[Any]], source: Path, shards: list[str]) -> ImageIndex:
    strings = {name: Strings(kept[name], kept[f"{name}_ends"]) for name in ("classes", "folders", "names")}
    if shards:
        root, members = _folder_of_shards(shards), Members(kept["offsets"], kept["lengths"], kept["labels"])
        classes = class_names(root, members.labels)  # of a file beside the shards, which may have come later
    else:
        root, members = str(source if source.is_dir() else source.parent), None
        classes = tuple(strings["classes"][i] for i in range(len(strings["classes"])))
    return ImageIndex(
        root, classes, strings["folders"], kept["class_of_folder"], strings["names"], kept["folder_of"], members
    )
