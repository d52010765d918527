"""Opens encoder and decoder files of any age without running code that is in them.

OpenAI published whole pickled modules, and unpickling a module runs what the file says. Here a restricted unpickler
only gathers: classes become inert :class:`_Record` objects that keep the state they are given, tensors become
descriptions that are looked up in the file's storages, and any name that is not on the short list ends the reading.
A freshly built :class:`Encoder` or :class:`Decoder` of the sizes found is then filled with the tensors, so that files
of 2021, whose submodules lack attributes that torch wants today, work on any version.
"""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from dall_e.decoder import Decoder
from dall_e.encoder import Encoder


class ModelFileError(ValueError):
    """A file that does not hold an encoder or a decoder; the message says what it is instead."""


# The names that a file may mention, all of which only become labels of records.
_RECORDED_CLASSES = {
    ("dall_e.encoder", "Encoder"),
    ("dall_e.encoder", "EncoderBlock"),
    ("dall_e.decoder", "Decoder"),
    ("dall_e.decoder", "DecoderBlock"),
    ("dall_e.utils", "Conv2d"),
    ("torch.nn.modules.container", "Sequential"),
    ("torch.nn.modules.activation", "ReLU"),
    ("torch.nn.modules.pooling", "MaxPool2d"),
    ("torch.nn.modules.linear", "Identity"),
    ("torch.nn.modules.upsampling", "Upsample"),
}
_STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Record:
    """Stands for an object of a listed class: keeps its state, does nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Mapping(dict):
    """Stands for an ordered dict, and forgets the attributes that state dicts have."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Storage:
    """A run of numbers in the file; ``data`` is filled once it has been read."""

    def __init__(self, dtype: torch.dtype, numel: int) -> None:
        self.dtype, self.numel = dtype, numel
        self.data: Tensor | None = None

    def read(self, data: bytes) -> None:
        """Takes the storage's bytes, which must be as many as were announced."""
        if len(data) != self.numel * self.dtype.itemsize:
            raise ModelFileError("it ends in the middle of a tensor: a truncated download or copy; fetch it again")
        self.data = torch.frombuffer(bytearray(data), dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)


class _TensorView:
    """Where a tensor lies in its storage; the file's own numbers, checked when it is read."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def tensor(self) -> Tensor:
        """The tensor itself, copied out; torch refuses sizes that reach beyond the storage."""
        if not isinstance(self.storage, _Storage) or self.storage.data is None:
            raise ModelFileError("a tensor in it has no numbers: the file is damaged")
        return torch.as_strided(self.storage.data, self.size, self.stride, self.offset).clone()


class _Function:
    """A listed function that pickles call; an object of its own, so that a file cannot alter ours."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any) -> Any:
        if self.name == "_rebuild_tensor_v2" and len(args) >= 4:
            return _TensorView(*args[:4])
        if self.name == "_rebuild_parameter" and args:
            return args[0]
        if self.name == "device":
            return ":".join(map(str, args))
        raise ModelFileError(f"it calls {self.name} in a way that is not known: the file is damaged")

    def __setstate__(self, state: Any) -> None:
        raise ModelFileError("it tries to alter a function: the file is damaged or harmful")


class _Gatherer(pickle.Unpickler):
    """An unpickler that knows the listed names only, and builds nothing but records, views, and plain containers.

    Args:
        file: The pickle.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}
        self._classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What stands for ``module.name``; an error for every name that is not listed."""
        if (module, name) in _RECORDED_CLASSES:
            return self._classes.setdefault(name, type(name, (_Record,), {}))
        if module == "torch" and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        if (module, name) in (
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"),
            ("torch", "device"),
        ):
            return _Function(name)
        if (module, name) == ("collections", "OrderedDict"):
            return _Mapping
        if module in ("builtins", "__builtin__") and name == "set":
            return set
        raise ModelFileError(f"it asks to import {module}.{name}, and code inside model files is never run")

    def persistent_load(self, pid: Any) -> Any:
        """A storage, or in the format before torch 1.6 a class with its source text, which is not looked at."""
        if isinstance(pid, tuple) and len(pid) >= 2 and pid[0] == "module":
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], torch.dtype):
            raise ModelFileError("it holds references of an unknown kind: the file is damaged")
        if len(pid) > 5 and pid[5] is not None:
            raise ModelFileError("it holds views of storages, which the released files do not")
        return self.storages.setdefault(str(pid[2]), _Storage(pid[1], int(pid[4])))


def _read_pickle(gatherer: _Gatherer) -> Any:
    try:
        return gatherer.load()
    except ModelFileError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way; none of them runs code
        raise ModelFileError(f"it is truncated or damaged ({type(error).__name__}: {error}); fetch it again") from error


def _gather_zip(path: Path) -> Any:
    """The root object of a file in the zip format (torch 1.6 and later)."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise ModelFileError("it is a zip archive that torch did not write")
            folder = names[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
                raise ModelFileError("it was written on a big-endian machine, which is not supported")
            gatherer = _Gatherer(io.BytesIO(archive.read(names[0])))
            root = _read_pickle(gatherer)
            for key, storage in gatherer.storages.items():
                storage.read(archive.read(f"{folder}data/{key}"))
            return root
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelFileError(f"it is a truncated or damaged download or copy ({error}); fetch it again") from error


def _gather_legacy(path: Path) -> Any:
    """The root object of a file in the format before torch 1.6: five pickles, then the storages one after the other."""
    with open(path, "rb") as file:
        if _read_pickle(_Gatherer(file)) != _LEGACY_MAGIC:
            raise ModelFileError("it is a pickle that torch.save did not write")
        _read_pickle(_Gatherer(file))  # version of the format
        system = _read_pickle(_Gatherer(file))
        if not isinstance(system, dict) or not system.get("little_endian", True):
            raise ModelFileError("it was written on a big-endian machine, which is not supported")
        gatherer = _Gatherer(file)
        root = _read_pickle(gatherer)
        for key in _read_pickle(_Gatherer(file)):
            storage = gatherer.storages.get(str(key))
            header = file.read(8)
            if storage is None or len(header) < 8 or struct.unpack("<q", header)[0] != storage.numel:
                raise ModelFileError("it is truncated or damaged: its tensors do not follow; fetch it again")
            announced = storage.numel * storage.dtype.itemsize
            storage.read(file.read(announced) if 0 <= announced <= path.stat().st_size else b"")
        return root


def _collect_tensors(record: _Record, prefix: str = "") -> dict[str, Tensor]:
    """The parameters and buffers below a module's record, by their dotted names."""
    state = record.state if isinstance(record.state, dict) else {}
    tensors = {}
    for kind in ("_parameters", "_buffers"):
        for name, view in (state.get(kind) or {}).items():
            if isinstance(view, _TensorView):
                tensors[f"{prefix}{name}"] = view.tensor()
    for name, child in (state.get("_modules") or {}).items():
        if isinstance(child, _Record):
            tensors.update(_collect_tensors(child, f"{prefix}{name}."))
    return tensors


def _read_tensors(root: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name and plain attributes, from a module's record or from a state dict (maybe inside another dict)."""
    if isinstance(root, _Record):
        return _collect_tensors(root), root.state if isinstance(root.state, dict) else {}
    if isinstance(root, dict):
        tensors = {name: view.tensor() for name, view in root.items() if isinstance(view, _TensorView)}
        nested = [value for value in root.values() if isinstance(value, dict)]
        return (tensors, {}) if tensors or not nested else _read_tensors(nested[0])
    return {}, {}


def _say_what_it_is(path: Path) -> str | None:
    """Names the files that people have instead of a model, from their first bytes; ``None`` when it may be one."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "it is empty; fetch it again"
    text = head.decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n").lower()
    if text.startswith("<"):
        kind = "an XML message" if text.startswith(("<?xml", "<error")) else "an HTML page"
        return f"it is {kind}, probably a server's refusal; fetch it from another address"
    if text.startswith("--2"):
        return "it is the log of wget (`-o` names the log, `-O` the file); fetch it again with -O"
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        return f"it is a truncated download or copy ({path.stat().st_size} bytes); fetch it again"
    if not head.startswith((b"PK", b"\x80")):
        return f"it begins with {head[:24]!r}, as no file of torch.save does; fetch it again"
    return None


def _safetensors_of(folder: Path) -> Path:
    """The one ``.safetensors`` file of a folder."""
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ModelFileError(
            f"{folder} should hold one .safetensors file, or name the one that you want; found: {names}"
        )
    return found[0]


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError  # only this format needs more than torch
    from safetensors.torch import load_file

    try:
        config = path.with_name("config.json")
        attributes = json.loads(config.read_text()).get(path.stem, {}) if config.exists() else {}
        return load_file(path), attributes
    except (SafetensorError, ValueError, AttributeError) as error:
        raise ModelFileError(f"it, or config.json beside it, is truncated or damaged ({error})") from error


def _build(tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> Encoder | Decoder:
    """A module of the sizes that the tensors have, filled with them."""
    first, last = tensors.get("blocks.input.w"), tensors.get("blocks.output.conv.w")
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        raise ModelFileError(
            "it holds neither an encoder nor a decoder: blocks.input.w or blocks.output.conv.w is missing"
        )
    blocks = {name.split(".")[2] for name in tensors if name.startswith("blocks.group_1.block_")}
    sizes: dict[str, Any] = {
        "n_blk_per_group": max(1, len(blocks)),
        "use_mixed_precision": bool(attributes.get("use_mixed_precision", True)),
    }
    model: Encoder | Decoder
    with torch.device("meta"):
        # The decoder begins with a 1×1 convolution, the encoder with a 7×7 one.
        if first.shape[-1] == 1:
            sizes |= {"n_init": first.shape[0], "vocab_size": first.shape[1]}
            model = Decoder(n_hid=last.shape[1], output_channels=last.shape[0] // 2, **sizes)
        else:
            sizes |= {"n_hid": first.shape[0], "input_channels": first.shape[1], "vocab_size": last.shape[0]}
            model = Encoder(**sizes)
    _check_shapes(model, tensors)
    # assign: no second copy of the numbers, and no initialisation to wait for
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.requires_grad_(False)


def _check_shapes(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises a :class:`ModelFileError` that names the first parameter which is missing, unknown or of another shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    kind = type(model).__name__
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ModelFileError(
                f"its {name} does not fit the {kind.lower()} that the other tensors describe: "
                f"found {found.get(name, 'none')}, expected {expected.get(name, 'none')}"
            )


def load_model(path: str | Path, device: torch.device | str | None = None) -> Encoder | Decoder:
    """Opens an encoder or a decoder; no code in the file is run.

    It takes a module as OpenAI published it or its package writes it (both formats of ``torch.save``), a state dict, a
    ``.safetensors`` file, or a folder with one, as :func:`save_model` writes it.

    Args:
        path: The file or folder.
        device: Where to put the module; the CPU where it is ``None``.

    Returns:
        The module, frozen and in evaluation mode.

    Raises:
        ModelFileError: The file is missing, or holds something else; the message says what.
    """
    if str(path).startswith(("http://", "https://")):
        raise ModelFileError(f"{path} is an address: download the file first (`beit download tokenizer DIR`)")
    path = Path(path)
    if path.is_dir():
        path = _safetensors_of(path)
    if not path.is_file():
        raise ModelFileError(f"there is no file {path}")
    try:
        return _build(*_read_file(path)).to(device or "cpu").eval()
    except ModelFileError as error:
        raise ModelFileError(f"{path} cannot be used: {error}") from error


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name and plain attributes from a file of any of the formats."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if problem := _say_what_it_is(path):
        raise ModelFileError(problem)
    try:
        return _read_tensors(_gather_zip(path) if zipfile.is_zipfile(path) else _gather_legacy(path))
    except ModelFileError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, OverflowError, MemoryError) as error:
        raise ModelFileError(f"it is damaged ({type(error).__name__}: {error}); fetch it again") from error


def save_model(model: Encoder | Decoder, folder: str | Path) -> Path:
    """Writes ``encoder.safetensors`` or ``decoder.safetensors`` and its sizes into the folder's ``config.json``.

    One folder can hold both.

    Args:
        model: What to write.
        folder: Made if it is missing.

    Returns:
        The safetensors file.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = type(model).__name__.lower()
    names = ["n_hid", "n_blk_per_group", "vocab_size", "use_mixed_precision"]
    names += ["input_channels"] if isinstance(model, Encoder) else ["n_init", "output_channels"]
    config = folder / "config.json"
    sizes = json.loads(config.read_text()) if config.exists() else {}
    sizes[kind] = {name: getattr(model, name) for name in names}
    path = folder / f"{kind}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    config.write_text(json.dumps(sizes, indent=2) + "\n")
    return path
