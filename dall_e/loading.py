"""Opens encoder and decoder files of any age without running code in them.

OpenAI published whole pickled modules, and unpickling a module runs what the file says. Here ``torch.load`` gets an
unpickler that only collects: objects of the listed classes become inert records of their state, and any name that is
not listed is an error. (Its own weights-only reader refuses modules in the format before torch 1.6.) A new module is
then filled with the tensors, since modules pickled in 2021 lack attributes that torch needs today.
"""

import json
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from dall_e.decoder import Decoder
from dall_e.encoder import Encoder


class ModelFileError(ValueError):
    """A file that does not hold an encoder or a decoder; the message says what it is instead."""


# The names that a file may mention.
_RECORDED_CLASSES = {
    *("dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.decoder.Decoder", "dall_e.decoder.DecoderBlock"),
    *("dall_e.utils.Conv2d", "torch.nn.modules.container.Sequential", "torch.nn.modules.activation.ReLU"),
    *("torch.nn.modules.pooling.MaxPool2d", "torch.nn.modules.linear.Identity"),
    "torch.nn.modules.upsampling.Upsample",
}
_TRUNCATED = "it is a truncated or damaged download or copy"


class _Record:
    """Stands for an object of a listed class: keeps its state, does nothing."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Collector(pickle.Unpickler):
    """An unpickler that knows only the listed names, and builds nothing but records, tensors and plain containers."""

    def find_class(self, module: str, name: str) -> object:
        """Returns what stands for ``module.name``, made anew each time, so that a file cannot alter ours."""
        full_name = f"{module}.{name}"
        if full_name in _RECORDED_CLASSES:
            return type(name, (_Record,), {})
        stand_ins = {
            "collections.OrderedDict": type(name, (dict,), {"__setstate__": lambda *_: None}),  # as state dicts are
            "torch._utils._rebuild_tensor_v2": lambda *where: torch._utils._rebuild_tensor(*where[:4]),
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch.device": lambda *names: ":".join(map(str, names)),
            **dict.fromkeys(("builtins.set", "__builtin__.set"), set),
        }
        if full_name not in stand_ins:
            raise ModelFileError(f"it asks to import {full_name}, and code inside model files is never run")
        return stand_ins[full_name]


def _read_pickle(path: Path) -> object:
    """Returns what ``torch.save`` wrote, in either of its formats, with records in place of modules."""
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else ["/data.pkl"]
    if [name.rpartition("/")[2] for name in names if name.endswith((".pkl", ".py"))] != ["data.pkl"]:
        raise ModelFileError("it is a zip archive that torch did not write, or TorchScript")
    if tarfile.is_tarfile(path):
        raise ModelFileError("it is a tar archive, not a file of torch.save")
    unpickling = SimpleNamespace(
        __name__="pickle", Unpickler=_Collector, load=lambda file, **how: _Collector(file, **how).load()
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old format holds the source text of classes, which is not compared
            return torch.load(path, map_location="cpu", pickle_module=unpickling, weights_only=False)
    except RuntimeError as error:
        if "magic number" in str(error):
            raise ModelFileError("it is a pickle that torch.save did not write") from error
        raise


def _tensors_of(state: object, prefix: str = "") -> dict[str, Tensor]:
    """Returns a module's parameters and buffers by their dotted names."""
    tensors: dict[str, Tensor] = {}
    for kind in ("_parameters", "_buffers", "_modules"):
        members = state.get(kind) if isinstance(state, dict) else None
        for name, member in (members or {}).items():
            if isinstance(member, Tensor):
                tensors[f"{prefix}{name}"] = member
            elif isinstance(member, _Record):
                tensors |= _tensors_of(member.state, f"{prefix}{name}.")
    return tensors


def _read_tensors(root: object) -> tuple[dict[str, Tensor], Mapping[str, object]]:
    """Returns tensors by name and plain attributes of a module's record or a state dict, maybe inside another dict."""
    if isinstance(root, _Record):
        return _tensors_of(root.state), root.state if isinstance(root.state, dict) else {}
    if isinstance(root, dict):
        tensors = {name: value for name, value in root.items() if isinstance(value, Tensor)}
        nested = [value for value in root.values() if isinstance(value, dict)]
        return (tensors, {}) if tensors or not nested else _read_tensors(nested[0])
    return {}, {}


def _check_kind(path: Path) -> None:
    """Recognises, by their first bytes, the files that people have instead of a model."""
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n").lower()
    refused = "probably a server's refusal; fetch it from another address"
    kinds = {
        "it is empty; fetch it again": not head,
        f"it is an XML message, {refused}": text.startswith(("<?xml", "<error")),
        f"it is an HTML page, {refused}": text.startswith("<"),
        "it is the log of wget (`-o` names the log, `-O` the file); fetch it again with -O": text.startswith("--2"),
        f"{_TRUNCATED}; fetch it again": head.startswith(b"PK") and not zipfile.is_zipfile(path),
        f"it begins with {head[:24]!r}, unlike any file of torch.save": not head.startswith((b"PK", b"\x80")),
    }
    if problem := next((problem for problem, applies in kinds.items() if applies), ""):
        raise ModelFileError(problem)


def _read_file(path: Path) -> tuple[dict[str, Tensor], Mapping[str, object]]:
    """Returns tensors by name and plain attributes from a file of any format."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # only this format needs more than torch

        config = path.with_name("config.json")
        return load_file(path), json.loads(config.read_text()).get(path.stem, {}) if config.exists() else {}
    _check_kind(path)
    return _read_tensors(_read_pickle(path))


def _build(tensors: Mapping[str, Tensor], attributes: Mapping[str, object]) -> Encoder | Decoder:
    """Builds a module of the sizes that the tensors have, and fills it with them."""
    first, last = tensors.get("blocks.input.w"), tensors.get("blocks.output.conv.w")
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        raise ModelFileError("it holds neither an encoder nor a decoder, with blocks.input.w and blocks.output.conv.w")
    n_blk = max(1, len({name.split(".")[2] for name in tensors if name.startswith("blocks.group_1.block_")}))
    mixed = bool(attributes.get("use_mixed_precision", True))
    model: Encoder | Decoder
    with torch.device("meta"):
        if first.shape[-1] == 1:  # the decoder begins with a 1×1 convolution, the encoder with a 7×7 one
            n_init, n_hid, channels, vocab = first.shape[0], last.shape[1], last.shape[0] // 2, first.shape[1]
            model = Decoder(n_init, n_hid, n_blk, channels, vocab, use_mixed_precision=mixed)
        else:
            n_hid, channels = first.shape[:2]
            model = Encoder(n_hid, n_blk, channels, last.shape[0], use_mixed_precision=mixed)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            other = f"found {found.get(name, 'none')}, expected {expected.get(name, 'none')}"
            raise ModelFileError(f"its {name} does not fit the other tensors' {type(model).__name__.lower()}: {other}")
    # copied, for tensors of a file may share a storage; assigned, for the model on "meta" has no memory
    copies = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in tensors.items()}
    model.load_state_dict(copies, assign=True)
    return model.requires_grad_(False)


def load_model(path: str | Path, device: torch.device | str | None = None) -> Encoder | Decoder:
    """Opens an encoder or a decoder, frozen and in evaluation mode; no code in the file is run.

    Args:
        path: A module pickled by OpenAI's package (in either format of ``torch.save``), a state dict, a
            ``.safetensors`` file, or a folder with one.
        device: Where to put the module; ``None`` is the CPU.

    Raises:
        ModelFileError: The file is missing, or holds something else; the message says what.
    """
    if str(path).startswith(("http://", "https://")):
        raise ModelFileError(f"{path} is an address: download the file first (`beit download tokenizer DIR`)")
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise ModelFileError(f"{path} should hold one .safetensors file, or name the one you want; found: {names}")
        path = found[0]
    if not path.is_file():
        raise ModelFileError(f"there is no file {path}")
    try:
        return _build(*_read_file(path)).to(device or "cpu").eval()
    except ModelFileError as error:
        raise ModelFileError(f"{path} cannot be used: {error}") from error
    except Exception as error:  # a damaged file can fail in any way, none of which runs code
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelFileError(f"{path} cannot be used: {_TRUNCATED} ({reason}); fetch it again") from error
