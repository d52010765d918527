"""Which images there are: a folder or a list, read once, kept compactly, and on disk for the next run."""

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from beit.errors import InputError, did_you_mean
from beit.storage import atomic_write, beit_home

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's folders

_INDEX_VERSION = 1
# A folder changed this shortly before it was listed may change again without its time stamp moving.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class _Strings:
    """Many strings in two arrays: a hundredth of the objects, and pages that worker processes share."""

    blob: NDArray[np.uint8]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, strings: Iterable[str]) -> "_Strings":
        blob, ends = bytearray(), [0]
        for string in strings:
            blob += os.fsencode(string)
            ends.append(len(blob))
        return cls(np.frombuffer(bytes(blob), dtype=np.uint8), np.asarray(ends[1:], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.blob[start : self.ends[i]].tobytes())


@dataclass(frozen=True)
class ImageIndex:
    """The images below a folder or in a list, about 40 bytes each; made by :func:`index_images`.

    Attributes:
        root: Absolute path of the folder, or of the folder the list is in.
        class_names: Names of the folders directly below ``root``, when every image is below one; else empty.
    """

    root: str
    class_names: tuple[str, ...]
    _folders: _Strings = field(repr=False)
    _class_of_folder: NDArray[np.int32] = field(repr=False)
    _names: _Strings = field(repr=False)
    _folder_of: NDArray[np.int32] = field(repr=False)

    def __len__(self) -> int:
        return len(self._names)

    def path(self, i: int) -> str:
        """Returns the path of image ``i``."""
        i = range(len(self))[i]
        return os.path.join(self.root, self._folders[int(self._folder_of[i])], self._names[i])

    def class_id(self, i: int) -> int | None:
        """Returns the position in ``class_names`` of image ``i``'s class; None where there are no classes."""
        i = range(len(self))[i]
        return int(self._class_of_folder[self._folder_of[i]]) if self.class_names else None


def index_images(path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> ImageIndex:
    """Lists the images of a folder, of all folders below it, or of a text file.

    A folder is listed as it is: one named ``train`` inside it is not chosen. Its images come in the order of their
    paths, class by class. When every image is in a folder below ``path``, the folders directly below are the classes
    (as in torchvision's ``ImageFolder``, which a folder without images does not count for). Hidden folders are left
    out; links are followed. A text file has one path a line, absolute or relative to the file, in the order wanted.

    The list is kept in ``cache_dir`` and used again as long as no folder in it (or the text file) has changed.

    Args:
        path: The folder, or the text file.
        cache_dir: Where to keep the list; ``None`` is ``index`` in ``$BEIT_HOME`` (or ``~/.cache/beit``).

    Raises:
        InputError: The path does not exist or cannot be read, or there is no image.
    """
    source = Path(os.path.abspath(os.path.expanduser(path)))
    if not source.exists():
        raise InputError(f"no such folder or list of images: {source}{_near(source)}")
    cache = _cache_file(source, cache_dir)
    index = _load_index(cache, source)
    if index is None:
        listing = _list_folder(source) if source.is_dir() else _list_file(source)
        index = listing.index
        _save_index(cache, source, listing)
    if source.is_file():
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
    images: dict[str, list[str]] = {}
    stamps: dict[str, int] = {}
    others: Counter[str] = Counter()
    for folder, stamp, names in _walk(str(root)):
        stamps[folder] = stamp
        found = [name for name in names if name.lower().endswith(EXTENSIONS)]
        others.update(os.path.splitext(name)[1].lower() or "no extension" for name in names)
        if found:
            images[folder] = sorted(found)
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
        _Strings.of(folders),
        np.asarray([ids.get(folder.partition(os.sep)[0], -1) for folder in folders], dtype=np.int32),
        _Strings.of(name for folder in folders for name in images[folder]),
        np.repeat(np.arange(len(folders), dtype=np.int32), [len(images[folder]) for folder in folders]),
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
    folder_of: list[int] = []

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
            strings = _Strings.of(names(lines))
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from error
    if not folder_of:
        raise InputError(f"the list of images {source} is empty; it needs one path a line")
    no_classes = np.full(len(folders), -1, dtype=np.int32)
    index = ImageIndex(
        str(source.parent), (), _Strings.of(folders), no_classes, strings, np.asarray(folder_of, dtype=np.int32)
    )
    return _Listing(index, [source.name], [stamp], began)


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


def _save_index(cache: Path, source: Path, listing: _Listing) -> None:
    if max(listing.stamps) > listing.began - _SETTLED_NS:
        return
    index, watched = listing.index, _Strings.of(listing.watched)
    class_names = _Strings.of(index.class_names)
    try:
        with atomic_write(cache) as file:
            np.savez(
                file,
                version=np.int64(_INDEX_VERSION),
                source=np.frombuffer(os.fsencode(source), dtype=np.uint8),
                watched=watched.blob,
                watched_ends=watched.ends,
                stamps=np.asarray(listing.stamps, dtype=np.int64),
                classes=class_names.blob,
                classes_ends=class_names.ends,
                folders=index._folders.blob,
                folders_ends=index._folders.ends,
                class_of_folder=index._class_of_folder,
                names=index._names.blob,
                names_ends=index._names.ends,
                folder_of=index._folder_of,
            )
    except (OSError, InputError) as error:  # without it the next run lists again, no more
        logger.info("the list of images was not kept in %s: %s", cache, error)


def _load_index(cache: Path, source: Path) -> ImageIndex | None:
    """Returns the kept index of ``source`` if it is there and still true."""
    try:
        with np.load(cache, allow_pickle=False) as file:
            kept = {name: file[name] for name in file.files}
        if int(kept["version"]) != _INDEX_VERSION or os.fsdecode(kept["source"].tobytes()) != str(source):
            return None
        root = str(source if source.is_dir() else source.parent)
        watched = _Strings(kept["watched"], kept["watched_ends"])
        for i, stamp in enumerate(kept["stamps"].tolist()):
            if os.stat(os.path.join(root, watched[i])).st_mtime_ns != stamp:
                return None
        names, folder_of = _Strings(kept["names"], kept["names_ends"]), kept["folder_of"]
        if not 0 < len(names) == len(folder_of):
            return None
        class_names = _Strings(kept["classes"], kept["classes_ends"])
        return ImageIndex(
            root,
            tuple(class_names[i] for i in range(len(class_names))),
            _Strings(kept["folders"], kept["folders_ends"]),
            kept["class_of_folder"],
            names,
            folder_of,
        )
    except Exception as error:  # a damaged cache can fail in any way, and is never a reason to stop
        if not isinstance(error, FileNotFoundError):
            logger.info("the kept list of images %s is of no use: %s", cache, error)
        return None
