"""Files that a command is asked to write: found writable before any work, and never in place of somebody else's."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from beit.errors import InputError, listed

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

MARK = (
    "written by beit"  # in the first bytes of what the library writes: as text of a PNG or SVG file, as a key elsewhere
)
MARKS = (MARK, 'content="beit report"')  # the latter on pages of version 0.1
MARK_WITHIN = 8192  # bytes
JSON_MARK = {"software": MARK}  # the first entry of a JSON file


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether the library has written a file, which it may then replace: the file is marked as such."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        head = file.read(MARK_WITHIN)
    return any(mark.encode() in head for mark in MARKS)


def check_outputs(flag: str, paths: Iterable[str | os.PathLike[str]], overwrite: bool = False) -> list[Path]:
    """Returns the files that ``flag`` asks for as paths; call it before any work.

    Args:
        flag: What asks for them, for messages: ``--output``.
        paths: The files; a leading ``~`` is the user's home folder.
        overwrite: Whether ``--overwrite`` allows to replace files that the library has not written.

    Raises:
        InputError: One is a folder or cannot be written, or some exist and are not marked as the library's.
    """
    files = [Path(os.path.expanduser(path)) for path in paths]
    for place in {file.parent for file in files}:
        there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise InputError(f"{flag} {place}: cannot be written, as {there} is no folder that you may write to")
    if folders := [file for file in files if file.is_dir()]:
        raise InputError(f"{flag} {folders[0]}: is a folder; name a file in it")
    try:
        foreign = [] if overwrite else [file for file in files if os.path.lexists(file) and not is_ours(file)]
    except OSError as error:
        raise InputError(f"{flag} {error.filename}: cannot be replaced: {error.strerror}") from error
    if foreign:
        what = "exists and was" if len(foreign) == 1 else "exist and were"
        raise InputError(f"{flag}: {listed(foreign)} {what} not written by beit; choose another name, or --overwrite")
    return files


def png_mark() -> "PngInfo":
    """Returns the text that marks a PNG file as the library's, for ``pnginfo`` of Pillow's ``Image.save``."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("Software", MARK)
    return text
