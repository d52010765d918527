"""``beit shards``: packs images into tar files in WebDataset's format; ``beit index``: lists them before many runs."""

import logging
import os
import shlex
import sys
import tarfile
from pathlib import Path

from tqdm import tqdm

from beit.commands.settings import IndexConfig, ShardsConfig
from beit.data.index import EXTENSIONS, EncodedImages, index_images
from beit.data.shards import CLASS_NAMES_FILE, LABEL_EXTENSION, add_member
from beit.errors import InputError
from beit.outputs import check_outputs
from beit.storage import atomic_write

logger = logging.getLogger(__name__)


def main(config: ShardsConfig) -> None:
    """Writes shards and prints the ``--data_path`` that reads them; raises InputError if there are no images."""
    if not config.data_path or not config.output_dir:
        raise InputError("give the images and a folder for the shards: beit shards DATA_PATH OUTPUT_DIR")
    check_outputs("OUTPUT_DIR", [Path(config.output_dir, ".shards-000000.tar")], overwrite=True)
    pattern = write_shards(index_images(config.data_path), config.output_dir, config.images_per_shard)
    sys.stdout.write(f"--data_path {shlex.quote(pattern)}\n")


def print_index(config: IndexConfig) -> None:
    """Lists images and caches the list, so that later runs start at once; raises InputError if there are none."""
    sys.stdout.write(f"{len(index_images(config.data_path)):,} images in {config.data_path}; runs start at once now\n")


def write_shards(index: EncodedImages, destination: str | os.PathLike[str], images_per_shard: int = 10_000) -> str:
    """Packs images into shards, byte by byte and in order, so that a run sees the same samples.

    Image 12 is ``00000012.jpg`` and its class, if there are classes, ``00000012.cls``; ``classes.txt`` beside the
    shards has the class names. An unreadable file keeps its place as an empty one, so it is unreadable in the shard
    too. The last shard may have fewer images. Shards have hidden names until all are written, so that those of a killed
    process are not taken for the whole; the next one replaces them.

    Returns the ``--data_path`` that reads them.

    Raises:
        InputError: There are shards already, a class name has a line break, or the folder cannot be written.
    """
    folder = Path(os.path.abspath(os.path.expanduser(destination)))
    present = next(iter(sorted(folder.glob("shards-*.tar"))), None)
    if present is not None:
        raise InputError(f"{present} exists already: give another folder, or remove its shards first")
    if broken := [name for name in index.class_names if set(name) & set("\r\n")]:
        raise InputError(f"{CLASS_NAMES_FILE} has one name per line, which {broken[0]!r} is not: rename that class")
    starts = range(0, len(index), images_per_shard)
    missing = 0
    # No progress bar in log files.
    for number, start in enumerate(tqdm(starts, unit="shard", disable=None)):
        images = range(start, min(start + images_per_shard, len(index)))
        with (
            atomic_write(folder / f".shards-{number:06d}.tar") as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            missing += sum(not _add(archive, index, image) for image in images)
    if index.class_names:
        with atomic_write(folder / CLASS_NAMES_FILE) as file:
            file.write("".join(f"{name}\n" for name in index.class_names).encode("utf-8", "surrogateescape"))
    for number in reversed(range(len(starts))):  # the first last, as no pattern but a wildcard does without it
        os.replace(folder / f".shards-{number:06d}.tar", folder / f"shards-{number:06d}.tar")
    if missing:
        logger.warning("%d of %d files could not be read; they are empty in the shards", missing, len(index))
    name = f"{{000000..{len(starts) - 1:06d}}}" if len(starts) > 1 else "000000"
    return str(folder / f"shards-{name}.tar")


def _add(archive: tarfile.TarFile, index: EncodedImages, number: int) -> bool:
    try:
        source = index.file(number)
        content = Path(source).read_bytes() if isinstance(source, str) else source.read()
    except (OSError, ValueError) as error:  # a path may have a null byte
        logger.warning("cannot read %s: %s", index.path(number), getattr(error, "strerror", error))
        content = b""
    extension = os.path.splitext(index.path(number))[1].lower()
    # A list may have any names; in a shard, one without an extension of images would be left out.
    add_member(archive, f"{number:08d}{extension if extension in EXTENSIONS else EXTENSIONS[0]}", content)
    label = index.class_id(number)
    if label is not None:
        add_member(archive, f"{number:08d}.{LABEL_EXTENSION}", str(label).encode())
    return bool(content)
