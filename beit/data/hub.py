"""Images in Hugging Face data sets: on the hub, or in local folders of Parquet, Arrow or other files.

``hf:NAME_OR_FOLDER[:SPLIT][?image=COLUMN&label=COLUMN&name=CONFIGURATION]`` is one; the columns are found by their
types. Rows are read one by one and decoded as files are, so that a sample is the same whatever it is stored in.
"""

import hashlib
import io
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from beit.errors import InputError, counted, listed
from beit.storage import beit_home, offline

logger = logging.getLogger(__name__)

PREFIX = "hf:"
TRAINING, VALIDATION = ("train",), ("validation", "val", "valid", "test")  # splits, the first of them that is there
# Columns likewise, of those whose types fit; label maps are images too.
IMAGE, MASK = ("image", "img"), ("mask", "annotation", "label")
LABEL = ("label", "labels", "class", "cls", "fine_label")
MOST_CLASSES = 1_000_000
_SOURCE = re.compile(r"hf:(?P<place>[^?]+?)(?::(?P<split>[A-Za-z_][\w.-]*(\[[^]]*\])?))?(?:\?(?P<columns>.*))?")


def names_hub(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a Hugging Face data set."""
    return os.fspath(path).startswith(PREFIX)


def has_split(source: str) -> bool:
    """Whether a source names one of its splits."""
    found = _SOURCE.fullmatch(source)
    return found is not None and found["split"] is not None


@dataclass(frozen=True)
class HubImages:
    """A column of images in a data set, with the methods of an ``ImageIndex``."""

    root: str  # as it was given, with its split, for messages
    class_names: tuple[str, ...]  # empty without a column of labels, or if a row has none
    _rows: Any  # a datasets.Dataset
    _column: str
    _labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self._rows)

    def path(self, i: int) -> str:
        """Returns what to call image ``i`` in a message."""
        return f"{self.root}#{range(len(self))[i]}"

    def file(self, i: int) -> str | io.BytesIO:
        """Returns what to open for image ``i``: its bytes or its path; OSError if there is neither."""
        value = self._rows[range(len(self))[i]][self._column]
        value = value if isinstance(value, Mapping) else {"path" if isinstance(value, str) else "bytes": value}
        if value.get("bytes") is not None:
            return io.BytesIO(value["bytes"])
        if not value.get("path"):
            raise OSError("the row has no image")
        return str(value["path"])

    def class_id(self, i: int) -> int | None:
        """Returns the class of image ``i``; None if there are no classes."""
        return int(self._labels[i]) if self.class_names else None

    def fingerprint(self) -> str:
        """Returns a hash of the classes, and of the images' lengths or, where they are files, names; reads no image."""
        import pyarrow.compute as pc  # a part of datasets

        content, names = self._rows.data.column(self._column), []
        if "struct" in str(content.type):
            paths, content = pc.struct_field(content, "path"), pc.struct_field(content, "bytes")
            if content.null_count == len(content):
                names = [os.path.basename(path) for path in paths.to_pylist()]
        lengths = pc.fill_null(pc.binary_length(content), -1).to_numpy().astype(np.int64)
        about = ascii((self.class_names, names)).encode(), self._labels.tobytes(), lengths.tobytes()
        return hashlib.sha256(b"".join(about)).hexdigest()


def open_hub(source: str, splits: Sequence[str] = TRAINING, masks: bool = False) -> HubImages:
    """Opens a split of a data set; one on the hub is downloaded once.

    Args:
        source: As described above.
        splits: If it names no split, the first of these that is there.
        masks: Take the label maps, which are ``label``, and not the images.

    Raises:
        InputError: The extra is missing, there is no such data set, split or column, or it cannot be read.
    """
    if (found := _SOURCE.fullmatch(source)) is None:
        raise InputError(f"{source!r}: a Hugging Face data set is given as hf:NAME_OR_FOLDER[:SPLIT]")
    given = dict(parse_qsl(found["columns"] or ""))
    if odd := given.keys() - {"image", "label", "name"}:
        raise InputError(f"{source}: ?{listed(odd)}: known are image=COLUMN, label=COLUMN and name=CONFIGURATION")
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise InputError(f"{source} is read with Hugging Face datasets: pip install datasets") from error
    split, rows = _split(datasets, source, found["place"], found["split"], given.get("name"), splits)
    pictures = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    types = {field.name: str(field.type) for field in rows.data.schema}
    every = list(types)
    packed = [name for name, kind in types.items() if kind.startswith(("binary", "large_binary", "struct<bytes"))]
    classes = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    classes = classes or [name for name in LABEL if name in types and name not in packed]
    image, label = _column(source, every, "image", given, pictures or packed, IMAGE), ""
    if masks:
        image = _column(source, every, "label", given, [name for name in pictures if name != image], MASK)
    else:
        label = _column(source, every, "label", given, classes, LABEL)
    if not image:
        what = "label maps" if masks else "images"
        raise InputError(f"{source} has no column of {what} that its type tells: it has {listed(every, 9)}")
    if not types[image].startswith(("binary", "large_binary", "struct<", "string", "large_string")):
        raise InputError(f"{source}: column {image} holds {types[image]}, not images; it has {listed(every, 9)}")
    names, labels = _classes(source, rows, label)
    rows = rows.with_format(None).select_columns([image])
    rows = rows.cast_column(image, datasets.Image(decode=False)) if image in pictures else rows
    if isinstance(first := rows[0][image], str) and not os.path.isfile(first):
        what = f"begins with {first[:40]!r}, no image file"
        raise InputError(f"{source}: column {image} {what}; ?image=COLUMN names another")
    where = f", {counted(len(names), 'class')} in column {label}" if names else ""
    logger.info("%s: %s in column %s of %s%s", source, counted(len(rows), "image"), image, split, where)
    end = len(PREFIX + found["place"])
    root = source if found["split"] else f"{source[:end]}:{split}{source[end:]}"
    return HubImages(root, names, rows, image, labels)


def _split(
    datasets: Any, source: str, place: str, split: str | None, name: str | None, splits: Sequence[str]
) -> tuple[str, Any]:
    """Returns the name of a split and its rows, of which there are some."""
    place = os.path.expanduser(place)
    if os.path.isfile(place):
        raise InputError(f"{source} is a file: give the folder of Parquet or Arrow files")
    saved = any(os.path.isfile(os.path.join(place, file)) for file in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            found = datasets.load_from_disk(place)
        else:
            cache = beit_home() / "datasets" if os.environ.get("BEIT_HOME") else None
            if offline():  # set after the packages have read their own variable
                import_module("huggingface_hub").constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
            found = datasets.load_dataset(place, name, split=split, cache_dir=cache)
    except Exception as error:  # the library's own, pyarrow's and those of its HTTP client
        here = "" if os.path.isdir(place) else f"; there is no folder {place} here"
        raise InputError(f"{source} cannot be opened: {' '.join(str(error).split())[:300]}{here}") from error
    if isinstance(found, datasets.Dataset):
        found = {split or "train": found}
    chosen = split or next((name for name in splits if name in found), "")
    if not chosen and splits == TRAINING and len(found) == 1:
        chosen = next(iter(found))
    if chosen not in found:
        raise InputError(f"{source} has no split {chosen or ' or '.join(splits)}: it has {listed(found, 9)}")
    if not len(found[chosen]):
        raise InputError(f"{source}: {chosen} has no rows")
    return chosen, found[chosen]


def _column(
    source: str,
    every: Sequence[str],
    key: str,
    given: Mapping[str, str],
    fitting: Sequence[str],
    usual: Sequence[str],
) -> str:
    """Returns the column given, else of the fitting ones that with a usual name, with a warning if it is a guess."""
    if key in given and given[key] not in every:
        raise InputError(f"{source} has no column {given[key]!r}: it has {listed(every, 9)}")
    chosen = given.get(key) or next((name for name in (*usual, *fitting) if name in fitting), "")
    if key not in given and len(fitting) > 1 and chosen != usual[0]:
        text = "%s: column %s is taken, of %s; ?%s=COLUMN names another"
        logger.warning(text, source, chosen, listed(fitting, 9), key)
    return chosen


def _classes(source: str, rows: Any, column: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Returns the names of the classes, none if any row has no class, and each row's class, ``(N,)``."""
    no_classes = (), np.full(len(rows), -1)
    if not column:
        return no_classes
    labels = rows.data.column(column)
    without, values = np.array(labels.is_null()), labels.drop_null().to_numpy()
    words = values.dtype == object and all(isinstance(value, str) for value in values)
    if not words and len(values) and (values.dtype.kind not in "iub" or values.max() >= MOST_CLASSES):
        what = f"{labels.type}, not names or numbers of classes"
        if values.dtype.kind in "iu":
            what = f"class numbers up to {values.max()}, of {MOST_CLASSES - 1} at most"
        raise InputError(f"{source}: column {column} holds {what}; ?label=COLUMN names another")
    without[~without] = values == "" if words else values < 0
    if without.any():
        if not without.all():
            text = "%s: left out all classes, since %d of %d rows have none in column %s, the first row %d"
            logger.warning(text, source, without.sum(), len(rows), column, without.argmax())
        return no_classes
    if words:
        found, values = np.unique(values.astype(str), return_inverse=True)
        return tuple(found.tolist()), values
    values = values.astype(np.int64)
    names = tuple(getattr(rows.features[column], "names", None) or map(str, range(int(values.max()) + 1)))
    if empty := [names[number] for number in sorted({*range(len(names))} - {*values.tolist()})]:
        logger.warning("%s: %s without images (%s)", source, counted(len(empty), "class"), listed(empty))
    return names, values
