"""Which images there are: a folder, a list or tar shards, listed once, kept compactly, and on disk for the next run."""

import hashlib
import heapq
import io
import json
import logging
import operator
import os
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit.data.compact import Strings, as_array, map_arrays, save_arrays
from beit.data.hub import PREFIX, HubImages, names_hub, open_hub
from beit.data.shards import SUFFIX, Members, ShardReader, class_names, expand, names_shards, scan
from beit.errors import InputError, counted, did_you_mean_file, listed
from beit.storage import beit_home

logger = logging.getLogger(__name__)

# Of the files that are images; what is in a file decides how it is decoded.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".avif", ".jp2", ".tif", ".tiff", ".bmp", ".tga"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
ARRAYS = ".npy"
_IN_TABLES = f"a folder of Parquet or Arrow files is given as {PREFIX}FOLDER"
_OTHER_SOURCES = {".parquet": _IN_TABLES, ".arrow": _IN_TABLES, SUFFIX: f"tar shards are given as 'FOLDER/*{SUFFIX}'"}

_INDEX_VERSION = 4
# What changes with a file or folder; copies and archives set the modification time back, so it alone is not enough.
_stamp = operator.attrgetter("st_mtime_ns", "st_ctime_ns", "st_ino", "st_size")
# A folder changed this shortly before it was listed may change again without its time stamp moving.
_SETTLED_NS = 2_000_000_000

Stamps = Mapping[str, tuple[int, ...]]


class Images(Protocol, Sized):
    """Images by number, wherever they are."""

    @property
    def root(self) -> str:
        """Where they are, for messages."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes by id; empty if there are none."""

    def path(self, i: int) -> str:
        """Returns what to call image ``i`` in a message."""

    def file(self, i: int) -> str | IO[bytes] | Image.Image:
        """Returns what to open for image ``i``, or the RGB image itself."""

    def class_id(self, i: int) -> int | None:
        """Returns the class of image ``i``; None if there are no classes."""

    def fingerprint(self) -> str:
        """Returns a hash that tells whether images and classes are the same, in the same order."""


@dataclass(frozen=True)
class ImageIndex:
    """The images in a folder, a list or shards, at about 50 bytes each; made by :func:`index_images`."""

    root: str  # absolute path of the folder, or of the folder that has the list or the shards
    class_names: tuple[str, ...]  # the folders below root if every image is in one, or the shards' classes; else empty
    _folders: Strings = field(repr=False)  # relative to the root; the shards, if there are members
    _class_of_folder: NDArray[np.int32] = field(repr=False)
    _names: Strings = field(repr=False)
    _folder_of: NDArray[np.int32] = field(repr=False)
    _members: Members | None = field(repr=False, default=None)
    left_out: tuple[str, ...] = ()  # what was found there and not taken, such as "12 .txt"
    _reader: ShardReader = field(repr=False, compare=False, default_factory=ShardReader)

    def __len__(self) -> int:
        return len(self._names)

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

    def fingerprint(self) -> str:
        """Returns a hash of names, folders and classes in their order, and of lengths in shards; reads no image."""
        members = () if self._members is None else (self._members.lengths, self._members.labels)
        strings = (*vars(self._folders).values(), *vars(self._names).values())
        digest = hashlib.sha256(ascii(self.class_names).encode())
        for values in (*strings, self._class_of_folder, self._folder_of, *members):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()


EncodedImages = ImageIndex | HubImages  # of both, ``file`` is a path or bytes


@dataclass(frozen=True)
class IndexedImage:
    """An image that is no file of its own: in a tar shard or a data set. Its text names it in messages."""

    index: EncodedImages
    number: int

    def __str__(self) -> str:
        return self.index.path(self.number)

    def file(self) -> str | io.BytesIO:
        """Returns what to open; OSError if it cannot be read."""
        return self.index.file(self.number)


def image_files(given: Iterable[str], limit: int = sys.maxsize) -> list[str | IndexedImage]:
    """Returns at most ``limit`` images: files as they are, of folders, shards and data sets those at even distances.

    Raises :class:`InputError` if a path does not exist, or holds no images.
    """
    found: list[str | IndexedImage] = []
    for path in given:
        if (indexed := names_shards(path) or names_hub(path)) or os.path.isdir(path):
            index = index_images(path)
            taken = spread(len(index), limit)
            found += [IndexedImage(index, number) for number in taken] if indexed else map(index.path, taken)
        elif os.path.isfile(path):
            found.append(path)
        else:
            raise InputError(f"there is no image {path}")
    return found[:limit]


def spread(count: int, limit: int) -> list[int]:
    """Returns at most ``limit`` of the numbers below ``count``, evenly spaced."""
    taken = min(count, limit)
    return [number * count // taken for number in range(taken)]


def index_files(given: Sequence[str]) -> EncodedImages:
    """Lists image files and the images in folders, without classes; or one text file of paths, shards or a data set."""
    if len(given) == 1 and (given[0].endswith(".txt") or names_shards(given[0]) or names_hub(given[0])):
        return index_images(given[0])
    if alone := [path for path in given if names_shards(path) or names_hub(path)]:
        raise InputError(f"{alone[0]}: is read by itself, not with other images")
    paths, folders = list(map(str, image_files(given))), dict[str, int]()
    folder_of = [folders.setdefault(os.path.dirname(path), len(folders)) for path in paths]
    names, no_classes = Strings.of(map(os.path.basename, paths)), np.full(len(folders), -1, dtype=np.int32)
    return ImageIndex("", (), Strings.of(folders), no_classes, names, np.asarray(folder_of, dtype=np.int32))


def index_images(path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> EncodedImages:
    """Lists the images in a folder and below it, in a text file of paths, or in tar shards.

    A folder is listed as it is: a ``train`` folder inside it is not picked. Images are ordered by path, class by class.
    If every image is in a folder below ``path``, the folders directly below are the classes (as in torchvision's
    ``ImageFolder``; folders without images do not count). Hidden folders are skipped, links are followed, and a folder
    that they lead to again is left out. A text file has one path per line, absolute or relative to the file, in the
    order wanted; lines that start with ``#`` are comments.

    A path that ends in ``.tar`` names shards in WebDataset's format; it may have ranges, lists and wildcards, such as
    ``shards-{000000..000127}.tar``. Images come shard by shard, in the order of the files in each.

    A path that begins with ``hf:`` is a Hugging Face data set, see :mod:`beit.data.hub`.

    Each call logs the number of images and warns of what was left out. The list is kept in ``cache_dir``, by default
    ``index`` in ``$BEIT_HOME`` (or ``~/.cache/beit``), and used again until a folder in it (or the text file, or a
    shard) changes, unless something could not be read. It is memory-mapped, so all processes of a machine share it.

    Raises:
        InputError: The path is empty, does not exist or cannot be read, or there is no image.
    """
    if not os.fspath(path):
        raise InputError("--data_path is missing: give a folder of images, a text file of paths, or tar shards")
    if names_hub(path):
        return open_hub(os.fspath(path))
    source = Path(os.path.abspath(os.path.expanduser(path)))
    shards = expand(str(source)) if names_shards(source) else []
    is_folder = os.path.isdir(source)
    if not (shards or is_folder or os.path.isfile(source)):
        raise InputError(f"no such folder or list of images: {source}{did_you_mean_file(source)}")
    folders = [os.path.dirname(path) for path in shards or [str(source)]]
    root = str(source) if is_folder else os.path.commonpath(folders)
    folder = beit_home() / "index" if cache_dir is None else Path(cache_dir)
    cache, began = folder / hashlib.sha256(os.fsencode(f"{_INDEX_VERSION} {source}")).hexdigest()[:24], time.time_ns()
    index = _load_index(cache, root, shards)
    if index is None:
        index, watched = _list_shards(root, shards) if shards else (_list_folder if is_folder else _list_file)(source)
        if _save_index(cache, index, watched, began):
            # Use the mapped copy: the listing is in this process's memory.
            index = _load_index(cache, root, shards) or index
    if not (shards or is_folder):
        _require_some_exist(index, source)
    _announce(index, source)
    return index


def _announce(index: ImageIndex, source: Path) -> None:
    """Logs how many images there are of how many classes, and warns of what was left out."""
    labels = index._class_of_folder[index._folder_of] if index._members is None else index._members.labels
    counts, left_out = np.bincount(labels[labels >= 0], minlength=len(index.class_names)), list(index.left_out)
    if index.class_names:
        least, most = int(counts.min()), int(counts.max())
        places = f"{counted(len(counts), 'class')}, {least:,} {f'to {most:,} ' * (least < most)}in each"
        if empty := [name for name, count in zip(index.class_names, counts, strict=True) if not count]:
            left_out.append(f"{counted(len(empty), 'class')} without images ({listed(empty)})")
    else:
        places = counted(len(index._folders), "folder" if index._members is None else "shard")
        if counts.any():
            left_out.append(f"all classes, since {len(index) - counts.sum()} of {len(index)} images have none")
    logger.info("%s: %s in %s", source, counted(len(index), "image"), places)
    if left_out:
        logger.warning("%s: left out %s", source, listed(left_out, 8))


def _list_folder(root: Path) -> tuple[ImageIndex, Stamps]:
    images: dict[str, bytes] = {}  # the names in a folder, joined: a tenth of the memory of a list
    arrays: dict[str, bytes] = {}
    watched: dict[str, tuple[int, ...]] = {}
    others: Counter[str] = Counter()
    skipped: list[str] = []
    for folder, stamp, names in _walk(str(root), skipped):
        watched[folder] = stamp
        if found := sorted([name for name in names if name.lower().endswith(EXTENSIONS)]):
            images[folder] = os.fsencode("\0".join([*found, ""]))
        if len(found) < len(names):
            rest = [name for name in names if not name.lower().endswith(EXTENSIONS)]
            others.update(os.path.splitext(name)[1].lower() for name in rest)
            if found := sorted(name for name in rest if name.lower().endswith(ARRAYS)):
                arrays[folder] = os.fsencode("\0".join([*found, ""]))
    if not images and arrays:  # beside images they are something else, such as features
        images = arrays
        others.pop(ARRAYS)
    left_out = _left_out(len(images), f"{root} or the folders below", others, skipped)
    # Class by class, then by path: "a/x" comes before "a-b", which plain string order would put first.
    folders = sorted(images, key=lambda folder: (folder.partition(os.sep)[0], folder))
    classes = tuple(dict.fromkeys(folder.partition(os.sep)[0] for folder in folders))
    classes = () if "" in images else classes
    ids = {name: i for i, name in enumerate(classes)}
    if empty := sorted(name for name in watched if classes and name and os.sep not in name and name not in ids):
        left_out = (f"{counted(len(empty), 'class folder')} without images ({listed(empty)})", *left_out)
    counts = [images[folder].count(b"\0") for folder in folders]
    index = ImageIndex(
        str(root),
        classes,
        Strings.of(folders),
        np.asarray([ids.get(folder.partition(os.sep)[0], -1) for folder in folders], dtype=np.int32),
        Strings.split(images.pop(folder) for folder in folders),
        np.repeat(np.arange(len(folders), dtype=np.int32), counts),
        left_out=left_out,
    )
    # Nothing that is watched need change when what could not be read is repaired.
    return index, {} if skipped else watched


def _walk(root: str, skipped: list[str]) -> Iterator[tuple[str, tuple[int, ...], list[str]]]:
    """Yields (folder relative to ``root``, its stamp, its file names) for every folder, each once.

    Folders behind links come last, so that none is left out for a link to it.
    """
    waiting = [(False, "")]
    entered: set[tuple[int, int]] = set()
    while waiting:
        linked, folder = heapq.heappop(waiting)
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            with os.scandir(path) as entries:
                found = [entry for entry in entries if entry.name[0] != "."]
            files = [entry.name for entry in found if entry.is_file(follow_symlinks=False)]
        except OSError as error:
            if not folder:
                raise InputError(f"cannot list {root}: {error.strerror}") from error
            skipped.append(f"{folder}: {error.strerror}")
            continue
        identity = (status.st_dev, status.st_ino)
        if linked and identity in entered:
            skipped.append(f"{folder}: a link to a folder listed already")
            continue
        entered.add(identity)
        for entry in found if len(files) < len(found) else ():  # folders and links; no pipes, whatever their names
            try:
                if entry.is_dir():
                    heapq.heappush(waiting, (linked or entry.is_symlink(), os.path.join(folder, entry.name)))
                elif entry.is_symlink():  # a dead one counts as an image that cannot be read
                    files.append(entry.name)
            except OSError as error:
                skipped.append(f"{os.path.join(folder, entry.name)}: {error.strerror}")
        yield folder, _stamp(status), files


def _left_out(images: int, where: str, others: Counter[str], skipped: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns in words what a listing left out; raises :class:`InputError` if that is all there is."""
    words = [f"{counted(len(skipped), 'path')} ({listed(skipped)})"] if skipped else []
    words += [f"{count:,} {extension or 'no extension'}" for extension, count in others.most_common()]
    if not images:
        found = listed(words, 8) or "no files at all"
        hint = next((f"; {how}" for extension, how in _OTHER_SOURCES.items() if extension in others), "")
        raise InputError(f"no images in {where}: looked for {' '.join(EXTENSIONS)}, found {found}{hint}")
    return tuple(words)


def _list_file(source: Path) -> tuple[ImageIndex, Stamps]:
    if source.name.lower().endswith(EXTENSIONS):
        raise InputError(f"{source} is one image; give a folder of images, or a text file with one path per line")
    folders: dict[str, int] = {}
    folder_of = array("i")

    def names(lines: Iterable[str]) -> Iterator[str]:
        for line in map(str.strip, lines):
            if line and not line.startswith("#"):
                folder, name = os.path.split(line)
                is_image = name.lower().endswith(EXTENSIONS)
                if not name or name.lower().endswith(SUFFIX) or (not is_image and (source.parent / line).is_dir()):
                    raise InputError(f"{source} lists {line}: give folders and tar shards themselves, not in a list")
                folder_of.append(folders.setdefault(folder, len(folders)))
                yield name

    try:
        watched = {source.name: _stamp(source.stat())}
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
    return index, watched


def _list_shards(root: str, shards: list[str]) -> tuple[ImageIndex, Stamps]:
    watched = {os.path.relpath(shard, root): _stamp(os.stat(shard)) for shard in shards}
    names, shard_of, members, others = scan(shards, EXTENSIONS)
    left_out = _left_out(len(names), f"{shards[0]} (of {counted(len(shards), 'shard')})", others)
    relative = Strings.of(os.path.relpath(shard, root) for shard in shards)
    no_classes = np.full(len(shards), -1, dtype=np.int32)
    classes = class_names(root, members.labels)
    index = ImageIndex(root, classes, relative, no_classes, names, shard_of, members, left_out)
    return index, watched


def _require_some_exist(index: ImageIndex, source: Path) -> None:
    # A few are enough to notice a list made for another place; single missing files are found when they are read.
    sample = {i * (len(index) - 1) // 15 for i in range(16)}
    if not any(os.path.exists(index.path(i)) for i in sample):
        raise InputError(
            f"none of the files in the list {source} exists, for example {index.path(0)}; "
            "paths are absolute or relative to the list"
        )


def _save_index(cache: Path, index: ImageIndex, watched: Stamps, began: int) -> bool:
    """Keeps a listing on disk; returns whether it did."""
    if not watched or max(modified for modified, *_ in watched.values()) > began - _SETTLED_NS:
        return False
    about = {"watched": watched, "classes": index.class_names, "left_out": index.left_out}
    arrays = {
        "about": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
        "folders": index._folders.blob,
        "folders_ends": index._folders.ends,
        "names": index._names.blob,
        "names_ends": index._names.ends,
        "class_of_folder": index._class_of_folder,
        "folder_of": index._folder_of,
        **({} if index._members is None else vars(index._members)),
    }
    try:
        save_arrays(cache, arrays)
    except OSError as error:  # the next run lists the images again, no more
        logger.info("could not keep the list of images in %s: %s", cache, error)
        return False
    return True


def _load_index(cache: Path, root: str, shards: list[str]) -> ImageIndex | None:
    """Returns the kept index of ``source`` if there is one and nothing has changed since."""
    try:
        kept: dict[str, Any] = map_arrays(cache)
        about = json.loads(kept["about"].tobytes())
        paths = [os.path.join(root, path) for path in about["watched"]]
        stamps = [list(_stamp(os.stat(path))) for path in paths]
        if (shards and paths != shards) or stamps != list(about["watched"].values()):
            return None
        members = Members(kept["offsets"], kept["lengths"], kept["labels"]) if shards else None
        # Class names of shards are in a file beside them, which may have come later.
        labels = tuple(about["classes"]) if members is None else class_names(root, members.labels)
        folders, names = (Strings(kept[name], kept[f"{name}_ends"]) for name in ("folders", "names"))
        arrays = kept["class_of_folder"], names, kept["folder_of"]
        return ImageIndex(root, labels, folders, *arrays, members, tuple(about["left_out"]))
    except InputError:
        raise
    except Exception as error:  # a damaged cache can fail in any way, and must never stop a run
        if not isinstance(error, FileNotFoundError):
            logger.info("ignored the kept list of images %s: %s", cache, error)
        return None
