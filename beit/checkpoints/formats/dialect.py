"""What a dialect is: other names for the same parameters, in both directions, and the files they are written to."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from beit.checkpoints.formats.segmentation import Heads

Names = frozenset[str]
Weights = Mapping[str, Tensor]
Content = dict[str, Any]  # of a checkpoint or a JSON file, or what they record
Files = dict[str, Content]

LAYER_NORM_EPS = 1e-6  # in our models and timm's


@dataclass(frozen=True)
class WholeModel:
    """A complete model in official names, to be written in some format."""

    weights: dict[str, Tensor]
    arguments: Content  # of our constructor, with vocab_size (pre-training) or num_classes
    metadata: Content  # that the checkpoint records; see :mod:`beit.checkpoints.read`
    images: Content  # their mean, std, crop_pct, crop_mode and interpolation
    labels: list[str] | None = None  # names of the classes, if they are known
    position_index: Tensor | None = None  # rows of the bias tables, int64 (N + 1, N + 1); None without tables
    heads: Heads | None = None  # of a segmentor
    layer_norm_eps: float = LAYER_NORM_EPS


@dataclass(frozen=True)
class Dialect:
    """A format of weights: a single file, a folder, or both."""

    matches: Callable[[Names], bool]  # given names without the prefixes of wrappers
    to_official: Callable[[Weights], dict[str, Tensor]]  # without index buffers
    from_official: Callable[[Weights, Tensor | None], dict[str, Tensor]]  # given the position index if there are tables
    file: Callable[[WholeModel], Content] | None = None  # its content, without what every file records
    folder: Callable[[WholeModel, Path], Files] | None = None  # its files: tensors (.safetensors) or JSON
    suffixes: Sequence[str] = (".pth", ".pt")  # of the single file
    segmentors: bool = False  # whether it has the heads of segmentation


@dataclass(frozen=True)
class NameTable:
    """Official names on one side, another library's on the other.

    A path stands for a parameter or for a module whose parameters follow it: ``norm1`` also renames ``norm1.weight``.
    """

    outside: Mapping[str, str]  # paths outside the blocks
    inside: Mapping[str, str]  # paths inside a block
    blocks: str  # the other library's name for "blocks"
    heads: Mapping[str, str] = field(default_factory=dict)  # prefixes, which are replaced whatever follows them

    def theirs(self, name: str) -> str | None:
        """Returns the other library's name for an official one, or None if it is not in the table."""
        return _rename(name, "blocks", self.blocks, (self.outside, self.inside))

    def official(self, name: str) -> str:
        """Returns the official name for the other library's; one that is not in the table stays as it is."""
        renamed = replace_prefix(name, _inverted(self.heads))
        tables = _inverted(self.outside), _inverted(self.inside)
        return renamed or _rename(name, self.blocks, "blocks", tables) or name


def replace_prefix(name: str, prefixes: Mapping[str, str]) -> str | None:
    """Returns a name with another prefix, or None if it begins with none of them."""
    return next((new + name[len(old) :] for old, new in prefixes.items() if name.startswith(old)), None)


def _inverted(table: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


def _rename(name: str, source: str, target: str, tables: tuple[Mapping[str, str], Mapping[str, str]]) -> str | None:
    block = re.match(rf"{re.escape(source)}\.(\d+)\.", name)
    prefix, path = (f"{target}.{block[1]}.", name[block.end() :]) if block else ("", name)
    table = tables[block is not None]
    module, _, leaf = path.rpartition(".")
    if path in table:
        return prefix + table[path]
    return f"{prefix}{table[module]}.{leaf}" if module in table else None
