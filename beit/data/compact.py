"""Many strings in few arrays, and arrays on disk that all processes of a machine share."""

import mmap
import os
import struct
import zipfile
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from beit.storage import atomic_write

_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip archive's member: then its name and an extra field, of these lengths


@dataclass(frozen=True)
class Strings:
    """Many strings in two arrays: a hundredth of the objects, and pages that worker processes share."""

    blob: NDArray[np.uint8]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, strings: Iterable[str | bytes]) -> "Strings":
        """Takes strings, one after the other, or paths as the file system has them."""
        blob, ends = bytearray(), array("q")
        for string in strings:
            blob += string if isinstance(string, bytes) else os.fsencode(string)
            ends.append(len(blob))
        return cls(np.frombuffer(blob, dtype=np.uint8), as_array(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.blob[start : self.ends[i]].tobytes())


def as_array(values: "array[int]") -> NDArray[Any]:
    """Returns the numbers of an array of the standard library, without a copy."""
    return np.frombuffer(values, dtype=values.typecode) if values else np.zeros(0, dtype=values.typecode)


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes an ``.npz`` file, whole or not at all.

    Raises:
        InputError: The folder cannot be written, or the disk is full.
    """
    with atomic_write(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def map_arrays(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Opens an uncompressed ``.npz`` file without reading it into memory.

    The arrays are read-only views of the file: pages that are used are shared by all processes that have it open, and
    given back when memory is short. The check sums are verified, which reads the file once from end to end.

    Raises:
        ValueError: The file is damaged, compressed, or holds Python objects; other errors for other damage.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        if archive.testzip() is not None:
            raise ValueError("a check sum is wrong")
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        found = {}
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError("compressed arrays cannot be mapped")
            file.seek(member.header_offset)
            file.seek(sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))), os.SEEK_CUR)
            if npy.read_magic(file) != (1, 0):
                raise ValueError("an array of another version of the format")
            shape, _, dtype = npy.read_array_header_1_0(file)
            if dtype.hasobject or len(shape) > 1:
                raise ValueError("not an array of numbers")
            count = shape[0] if shape else 1
            values = np.frombuffer(whole, dtype, count, file.tell()) if count else np.zeros(0, dtype)
            found[member.filename.removesuffix(".npy")] = values
    return found
