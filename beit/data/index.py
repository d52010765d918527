"""Which images there are: a folder, a list or tar shards, listed once, kept compactly, and on disk for the next run."""

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

from beit.data.compact import AnyArray, Strings, as_array, map_arrays, save_arrays
from beit.data.shards import Members, ShardReader, class_names, did_you_mean_file, expand, names_shards, scan
from beit.errors import InputError
from beit.storage import beit_home

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's folders

_INDEX_VERSION = 3
_STRINGS = ("watched", "classes", "folders", "names")  # in the kept index, each as two arrays
# A folder changed this shortly before it was listed may change again without its time stamp moving.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class ImageIndex:
    """The images in a folder, a list or shards, at about 50 bytes each; made by :func:`index_images`.

    Attributes:
        root: Absolute path of the folder, or of the folder that has the list or the shards.
        class_names: The folders directly below ``root`` if every image is in one, or the shards' classes; else empty.
    """

    root: str
    class_names: tuple[str, ...]
    _folders: Strings = field(repr=False)  # relative to the root; the shards, if there are members
    _class_of_folder: NDArray[np.int32] = field(repr=False)
    _names: Strings = field(repr=False)
    _folder_of: NDArray[np.int32] = field(repr=False)
    _members: Members | None = field(repr=False, default=None)
    _reader: ShardReader = field(repr=False, compare=False, default_factory=ShardReader)

    def __len__(self) -> int:
        return len(self._names)

    def fingerprint(self) -> str:
        """Returns a hash of the images' names, folders and classes in their order; no file is opened.

        It does not depend on where the root is. Of shards, the images' lengths count as well: names are mere numbers.
        """
        digest = hashlib.sha256(str(self.class_names).encode("utf-8", "surrogateescape"))
        arrays = [*vars(self._folders).values(), *vars(self._names).values(), self._class_of_folder, self._folder_of]
        arrays += [] if self._members is None else [self._members.lengths, self._members.labels]
        for values in arrays:
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def path(self, i: int) -> str:
        """Returns the path of image ``i``; in a shard, the shard's path and the name in it, for messages only."""
        i = range(len(self))[i]
        return os.path.join(self.root, self._folders[int(self._folder_of[i])], self._names[i])

    def file(self, i: int) -> str | io.BytesIO:
        """Returns what to open for image ``i``: its path, or its bytes in a shard (OSError if it cannot be read)."""
        i = range(len(self))[i]
        if self._members is None:
            return self.path(i)
        shard = os.path.join(self.root, self._folders[int(self._folder_of[i])])
        return io.BytesIO(self._reader.read(shard, int(self._members.offsets[i]), int(self._members.lengths[i])))

    def class_id(self, i: int) -> int | None:
        """Returns the position of image ``i``'s class in ``class_names``; None if there are no classes."""
        i = range(len(self))[i]
        if not self.class_names:
            return None
        return int(self._class_of_folder[self._folder_of[i]] if self._members is None else self._members.labels[i])


def image_files(given: Iterable[str]) -> list[str]:
    """Returns the given image files, with each folder replaced by the images in and below it.

    Raises :class:`InputError` if a path does not exist, or is a tar file.
    """
    paths: list[str] = []
    for path in given:
        if names_shards(path):
            raise InputError(f"{path}: results are named after image files, not read from tar shards; unpack them")
        if os.path.isdir(path):
            index = index_images(path)
            paths += [index.path(number) for number in range(len(index))]
        elif os.path.isfile(path):
            paths.append(path)
        else:
            raise InputError(f"there is no image {path}")
    return paths


def index_images(path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> ImageIndex:
    """Lists the images in a folder and below it, in a text file of paths, or in tar shards.

    A folder is listed as it is: a ``train`` folder inside it is not picked. Images are ordered by path, class by class.
    If every image is in a folder below ``path``, the folders directly below are the classes (as in torchvision's
    ``ImageFolder``; folders without images do not count). Hidden folders are skipped and links are followed. A text
    file has one path per line, absolute or relative to the file, in the order wanted.

    A path that ends in ``.tar`` names shards in WebDataset's format; it may have ranges, lists and wildcards, such as
    ``shards-{000000..000127}.tar``. Images come shard by shard, in the order of the files in each.

    The list is kept in ``cache_dir`` and used again until a folder in it (or the text file, or a shard) changes. It is
    memory-mapped, so all processes of a machine share it.

    Args:
        path: The folder, the text file, or the shards.
        cache_dir: Where to keep the list; ``None`` is ``index`` in ``$BEIT_HOME`` (or ``~/.cache/beit``).

    Raises:
        InputError: The path does not exist or cannot be read, or there is no image.
    """
    source = Path(os.path.abspath(os.path.expanduser(path)))
    shards = expand(str(source)) if names_shards(source) else []
    if not shards and not source.exists():
        raise InputError(f"no such folder or list of images: {source}{did_you_mean_file(source)}")
    folder = beit_home() / "index" if cache_dir is None else Path(cache_dir)
    cache = folder / hashlib.sha256(os.fsencode(source)).hexdigest()[:24]
    index = _load_index(cache, source, shards)
    if index is None:
        listing = _list_shards(shards) if shards else _list_folder(source) if source.is_dir() else _list_file(source)
        # Use the mapped copy if there is one: the listing is in this process's memory.
        kept = _save_index(cache, source, listing)
        index = (_load_index(cache, source, shards) if kept else None) or listing.index
    if source.is_file() and not shards:
        _require_some_exist(index, source)
    return index


@dataclass(frozen=True)
class _Listing:
    index: ImageIndex
    watched: Iterable[str]  # folders or shards (relative to the root) or the text file: a change makes the list stale
    stamps: list[int]  # their modification times in ns, taken before they were read
    began: int  # when the listing did, ns


def _list_folder(root: Path) -> _Listing:
    began = time.time_ns()
    images: dict[str, bytes] = {}  # the names in a folder, joined: a tenth of the memory of a list
    stamps: dict[str, int] = {}
    others: Counter[str] = Counter()
    for folder, stamp, names in _walk(str(root)):
        stamps[folder] = stamp
        found = [name for name in names if name.lower().endswith(EXTENSIONS)]
        others.update(os.path.splitext(name)[1].lower() or "no extension" for name in names)
        if found:
            images[folder] = b"\0".join(os.fsencode(name) for name in sorted(found))
    if not images:
        listed = ", ".join(f"{count} {extension}" for extension, count in others.most_common(5))
        raise InputError(
            f"no images in {root} or the folders below: looked for {' '.join(EXTENSIONS)}, "
            f"found {f'other files only ({listed})' if listed else 'no files at all'}"
        )
    # Class by class, then by path: "a/x" comes before "a-b", which plain string order would put first.
    folders = sorted(images, key=lambda folder: (folder.partition(os.sep)[0], folder))
    classes = tuple(dict.fromkeys(folder.partition(os.sep)[0] for folder in folders))
    classes = () if "" in images else classes
    ids = {name: i for i, name in enumerate(classes)}
    counts = [images[folder].count(b"\0") + 1 for folder in folders]
    index = ImageIndex(
        str(root),
        classes,
        Strings.of(folders),
        np.asarray([ids.get(folder.partition(os.sep)[0], -1) for folder in folders], dtype=np.int32),
        Strings.of(name for folder in folders for name in images.pop(folder).split(b"\0")),
        np.repeat(np.arange(len(folders), dtype=np.int32), counts),
    )
    return _Listing(index, stamps, list(stamps.values()), began)


def _walk(root: str) -> Iterator[tuple[str, int, list[str]]]:
    """Yields (folder relative to ``root``, its modification time in ns, its file names) for every folder."""
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while waiting:
        folder, above = waiting.pop()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            with os.scandir(path) as entries:
                # Not pipes or devices, whatever their names; a dead link counts as an image that cannot be read.
                found = [(e.name, e.is_dir()) for e in entries if e.is_dir() or e.is_file() or e.is_symlink()]
        except OSError as error:
            if not folder:
                raise InputError(f"cannot list {root}: {error.strerror}") from error
            logger.warning("skipped the folder %s: %s", path, error.strerror)
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in above:  # a link back to a folder above
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
        raise InputError(f"{source} is one image; give a folder of images, or a text file with one path per line")
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
                raise InputError(f"{source} is not a text file; give a folder, or a text file with one path per line")
            lines.seek(0)
            strings = Strings.of(names(lines))
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from error
    if not folder_of:
        raise InputError(f"the list of images {source} is empty; it needs one path per line")
    no_classes = np.full(len(folders), -1, dtype=np.int32)
    index = ImageIndex(str(source.parent), (), Strings.of(folders), no_classes, strings, as_array(folder_of))
    return _Listing(index, [source.name], [stamp], began)


def _list_shards(shards: list[str]) -> _Listing:
    began = time.time_ns()
    stamps = [os.stat(shard).st_mtime_ns for shard in shards]
    names, shard_of, members = scan(shards, EXTENSIONS)
    root = _root(Path(), shards)
    without = int((members.labels < 0).sum())
    if 0 < without < len(names):
        logger.warning("%d of %d images in %s have no class, so none is used", without, len(names), root)
    relative = [os.path.relpath(shard, root) for shard in shards]
    no_classes = np.full(len(shards), -1, dtype=np.int32)
    classes = class_names(root, members.labels)
    index = ImageIndex(root, classes, Strings.of(relative), no_classes, names, shard_of, members)
    return _Listing(index, relative, stamps, began)


def _root(source: Path, shards: list[str]) -> str:
    if shards:
        return os.path.commonpath([os.path.dirname(shard) for shard in shards])
    return str(source if source.is_dir() else source.parent)


def _require_some_exist(index: ImageIndex, source: Path) -> None:
    # A few are enough to notice a list made for another place; single missing files are found when they are read.
    sample = {i * (len(index) - 1) // 15 for i in range(16)}
    if not any(os.path.exists(index.path(i)) for i in sample):
        raise InputError(
            f"none of the files in the list {source} exists, for example {index.path(0)}; "
            "paths are absolute or relative to the list"
        )


def _key(source: Path) -> AnyArray:
    return np.frombuffer(f"{_INDEX_VERSION} ".encode() + os.fsencode(source), dtype=np.uint8)


def _save_index(cache: Path, source: Path, listing: _Listing) -> bool:
    """Keeps a listing on disk; returns whether it did."""
    if max(listing.stamps) > listing.began - _SETTLED_NS:
        return False
    index = listing.index
    arrays = {
        "key": _key(source),
        "stamps": np.asarray(listing.stamps),
        "class_of_folder": index._class_of_folder,
        "folder_of": index._folder_of,
        **({} if index._members is None else vars(index._members)),
    }
    watched, classes = Strings.of(listing.watched), Strings.of(index.class_names)
    for name, strings in zip(_STRINGS, (watched, classes, index._folders, index._names), strict=True):
        arrays |= {name: strings.blob, f"{name}_ends": strings.ends}
    try:
        save_arrays(cache, arrays)
    except OSError as error:  # the next run lists the images again, no more
        logger.info("could not keep the list of images in %s: %s", cache, error)
        return False
    return True


def _load_index(cache: Path, source: Path, shards: list[str]) -> ImageIndex | None:
    """Returns the kept index of ``source`` if there is one and nothing has changed since."""
    try:
        kept: dict[str, Any] = map_arrays(cache)
        watched, classes, folders, names = (Strings(kept[name], kept[f"{name}_ends"]) for name in _STRINGS)
        root = _root(source, shards)
        paths = [os.path.join(root, path) for path in watched]
        if (
            not np.array_equal(kept["key"], _key(source))
            or (shards and paths != shards)
            or [os.stat(path).st_mtime_ns for path in paths] != kept["stamps"].tolist()
        ):
            return None
        members = Members(kept["offsets"], kept["lengths"], kept["labels"]) if shards else None
        # Class names of shards are in a file beside them, which may have come later.
        labels = tuple(classes) if members is None else class_names(root, members.labels)
        return ImageIndex(root, labels, folders, kept["class_of_folder"], names, kept["folder_of"], members)
    except InputError:
        raise
    except Exception as error:  # a damaged cache can fail in any way, and must never stop a run
        if not isinstance(error, FileNotFoundError):
            logger.info("ignored the kept list of images %s: %s", cache, error)
        return None
