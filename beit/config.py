"""Typed configurations: one frozen dataclass per job, whose fields are the command-line flags and the YAML keys.

This is the only module that knows ``argparse`` and YAML. Values come from, weakest first: the dataclass defaults, a
YAML file given with ``--config`` (or as the argument ``config``, where the class has such a field), assignments such as
``--options lr=1e-3`` (where its :class:`SettingsFiles` has a flag for them), the flags on the command line.
"""

import argparse
import dataclasses
import logging
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from beit.errors import InputError, did_you_mean

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")
Size = int | tuple[int, int]

RECIPE_KEYS = ("base", "recipe")  # in a YAML file: the file it builds on, and facts about the run that are no settings
NOTHING = ("None", "null")
DEFAULTS_FOLLOW = "# The rest has its default."  # in a run's config.yaml


@dataclasses.dataclass(frozen=True)
class SettingsFiles:
    """Where the settings files of some jobs are, and how their settings may be called in assignments.

    A configuration class has its own as the class variable ``SETTINGS``; without one they are the recipes of ``beit``.

    Args:
        folder: Folder of the files that come with the package; those that begin with ``_`` are there to build on.
        overrides: The flags, without dashes, that take assignments ``KEY=VALUE``, stronger than a file.
        aliases: Other names that assignments may use: that name -> the field, or ``field.key`` of a mapping.
        without_effect: Keys that may be assigned but do nothing here -> why; said when they are.
        passed_over: Keys that a file may hold for other jobs, where this one has no such field.
    """

    folder: Path = Path(str(resources.files("beit"))) / "recipes"
    overrides: tuple[str, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    without_effect: Mapping[str, str] = dataclasses.field(default_factory=dict)
    passed_over: Collection[str] = ()


def option(
    default: Any,
    help: str,
    *,
    off: str | None = None,
    choices: Sequence[str] | None = None,
    no_effect: str | None = None,
    positional: bool = False,
    short: str | None = None,
    written_out: bool = False,
) -> Any:
    """Declares a configuration field together with its flag.

    Args:
        default: The default value; its type is the field's annotation.
        help: What the flag does, with units.
        off: For a boolean, the flag that switches it off (``--no_<name>`` otherwise).
        choices: The accepted values.
        no_effect: Why a flag that the official scripts have does nothing here; said once when it is used.
        positional: Whether the value stands on the command line without a flag; it must then be there.
        short: A second flag, such as ``-o``.
        written_out: For a boolean, whether the flag may take its value in words, as in ``--flag false``.
    """
    metadata = {
        "help": help,
        "off": off,
        "choices": choices,
        "no_effect": no_effect,
        "positional": positional,
        "short": short,
        "written_out": written_out,
    }
    return dataclasses.field(default=default, metadata=metadata)


def parse_size(text: str | int | Sequence[int]) -> Size:
    """Reads ``224`` as a square size and ``192x256`` as height × width, in pixels."""
    if isinstance(text, int):
        return text
    parts = text.lower().split("x") if isinstance(text, str) else list(text)
    sizes = [int(part) for part in parts]
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise ValueError("a size is one number, or HEIGHTxWIDTH")
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def parse_bool(text: str) -> bool:
    """Reads a truth value in words: ``true``, ``on`` or ``1``, ``false``, ``off`` or ``0``."""
    words = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def parse_assignment(text: str) -> tuple[str, Any]:
    """Reads ``key=value``, the value as YAML does (``depth=6`` is a number, ``qkv_bias=false`` a truth value)."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ValueError(f"{text!r} is not of the form key=value")
    return key, _yaml_value(value)


def read_command_line(config_class: type[ConfigT], argv: Sequence[str], prog: str, description: str) -> ConfigT:
    """Builds a configuration from command-line arguments and the YAML file that they name.

    Raises:
        InputError: An unknown flag or key, or a value of the wrong type.
    """
    parser = _build_parser(config_class, prog, description)
    flags = vars(parser.parse_args([_underscored(argument) for argument in argv]))
    yaml_name, assignments = flags.get("config"), flags.pop(_OVERRIDES, [])
    if "config" not in _fields(config_class):
        flags.pop("config", None)
    values = read_yaml(config_class, yaml_name) if yaml_name else {}
    config = config_class(**{**_override(config_class, values, assignments), **flags})
    _announce_flags_without_effect(config)
    return config


def read_yaml(config_class: type, name: str) -> dict[str, Any]:
    """Reads the settings of a YAML file: a path, or the name of a recipe that comes with the package.

    A file may name another one under ``base``, relative to itself or of the package, whose settings it overrides.

    Raises:
        InputError: No such file, not YAML, or a key that the job does not have.
    """
    files, fields = _files_of(config_class), _fields(config_class)
    values: dict[str, Any] = {}
    for path, content in _read_layers(name, files.folder):
        for key, value in content.items():
            if key in RECIPE_KEYS or (key in files.passed_over and key not in fields):
                continue
            if key not in fields:
                raise InputError(f"{path}: unknown key {key!r}{did_you_mean(str(key), fields)}")
            values[key] = _convert(*fields[key], value, f"{path}: {key}")
    return values


def read_facts(name: str) -> dict[str, Any]:
    """Reads what a recipe says about its run: ``recipe`` in its file, over the facts of the files it builds on.

    A ``note`` is the file's own.

    Raises:
        InputError: No such file, not YAML, or facts that are not ``key: value`` lines.
    """
    facts: dict[str, Any] = {}
    for path, content in _read_layers(name, SettingsFiles().folder):
        own = content.get("recipe") or {}
        if not isinstance(own, dict):
            raise InputError(f"{path}: recipe must hold 'key: value' lines, one for each fact")
        facts.pop("note", None)  # what is to be said of one run
        facts.update(own)
    return facts


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in SettingsFiles().folder.glob("[!_]*.yaml"))


def _read_layers(name: str, folder: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """Returns the content of a settings file, after that of the files it builds on."""
    path = _find_yaml(name, folder)
    content = _parse(path.read_bytes(), path)
    base = content.get("base")
    if not base:
        return [(path, content)]
    beside = path.parent / base
    below = beside if beside.is_file() else _find_yaml(str(base), folder)  # or one of the package
    if below.resolve() in (seen := (*seen, path.resolve())):
        raise InputError(f"{path}: base {base!r} leads back to a file that builds on it")
    return [*_read_layers(str(below), folder, seen), (path, content)]


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text.decode("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold 'key: value' lines, one for each setting")
    return content


def read_run_settings(path: Path) -> tuple[dict[str, Any], set[str] | None]:
    """Reads the ``config.yaml`` of any job's run folder.

    Returns:
        The settings as plain values, and the names of those that differ from their defaults, None if it does not say.

    Raises:
        InputError: It cannot be read, or is not YAML.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    before, marker, _ = text.partition(DEFAULTS_FOLLOW.encode())
    return _parse(text, path), set(_parse(before, path)) if marker else None


def to_plain(config: Any) -> dict[str, Any]:
    """Returns the settings as a dict of plain values, as they go into checkpoints and YAML files."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(config).items()}


def from_plain(config_class: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Builds a configuration from a checkpoint's ``args``; settings that the job does not have are left out."""
    fields = _fields(config_class)
    known = {key: _convert(*fields[key], value, key) for key, value in values.items() if key in fields}
    return config_class(**known)


def dump_yaml(config: Any) -> str:
    """Returns the settings as a YAML text that ``--config`` reads back; first those that differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    given: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in to_plain(config).items():
        (given if getattr(config, key) != defaults[key] else rest)[key] = value
    parts = [yaml.safe_dump(part, sort_keys=False) if part else "" for part in (given, rest)]
    return f"{parts[0]}{DEFAULTS_FOLLOW}\n{parts[1]}"


def to_flags(config: Any) -> list[str]:
    """Returns the arguments that make this configuration of the defaults; the inverse of :func:`read_command_line`.

    A value that no flag can give (None, or nothing, where the default is something) is left out.
    """
    arguments, flags = [], []
    for name, (field, reader) in _fields(type(config)).items():
        value = getattr(config, name)
        if value != field.default:
            words = _words(value, reader)
            if field.metadata["positional"]:
                arguments += words
            elif isinstance(value, bool):
                flags.append(f"--{name}" if value else field.metadata["off"] or f"--no_{name}")
            elif len(words) == 1 and words[0].startswith("-"):
                flags.append(f"--{name}={words[0]}")
            elif words:
                flags += [f"--{name}", *words]
    return arguments + flags


def _words(value: Any, reader: Callable) -> list[str]:
    """Returns a value as the words that stand after its flag."""
    if value is None:
        return []
    if reader is parse_size:
        return [str(value) if isinstance(value, int) else "x".join(map(str, value))]
    if isinstance(value, dict):
        return [f"{key}={_in_a_line(item)}" for key, item in value.items()]
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def _in_a_line(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1_000_000)
    return text.removesuffix("\n").removesuffix("\n...")  # which YAML writes after a value that is no list


_OVERRIDES = "assignments to settings"  # where the parser keeps them: no field can be called so


def _override(config_class: type, values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Returns the values with ``KEY=VALUE`` assignments applied; the last one of a key counts."""
    files, result = _files_of(config_class), dict(values)
    given: dict[str, tuple[str, Any]] = {}
    for text in assignments:
        key, equals, word = text.partition("=")
        where = f"--{files.overrides[0]} {text}"
        if not (key and equals):
            raise InputError(f"{where}: an assignment has the form KEY=VALUE")
        if key in files.without_effect:
            logger.warning("%s has no effect: %s", where, files.without_effect[key])
            continue
        name, item, (field, reader) = _find_setting(config_class, key, where)
        value = _yaml_value(word) if item else _convert(field, reader, _from_text(word, field, reader), where)
        other, same = given.get(f"{name}.{item}", (key, value))
        if other != key and same != value:
            raise InputError(f"{where}: {other} has set {name} to {same!r} already; here they are one setting")
        given[f"{name}.{item}"] = key, value
        result[name] = {**(result.get(name) or {}), item: value} if item else value
    return result


def _find_setting(config_class: type, key: str, where: str) -> tuple[str, str, tuple[dataclasses.Field, Callable]]:
    """Returns the field that an assignment means, and the key where it means one of a mapping's."""
    files = _files_of(config_class)
    fields = {name: it for name, it in _fields(config_class).items() if not it[0].metadata["positional"]}
    name, _, item = files.aliases.get(key, key).partition(".")
    if name not in fields or (item and fields[name][1] is not _read_assignments):
        hint = did_you_mean(key, {*fields, *files.aliases, *files.without_effect})
        raise InputError(f"{where}: unknown key {key!r}{hint}")
    return name, item, fields[name]


def _from_text(text: str, field: dataclasses.Field, reader: Callable) -> Any:
    """Reads the value of an assignment: ``None``, ``True``, ``a,b``, ``[a, b]`` or ``(a, b)``, else the text itself."""
    if text in NOTHING and (field.default is None or field.default == ""):
        return field.default
    if reader is _read_bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if reader is _read_assignments:
        return _yaml_value(text)
    if reader in (_read_floats, _read_ints, _read_strings, parse_size) and ("," in text or text[:1] in ("(", "[")):
        return [item.strip(" '\"") for item in text.strip("()[] ").split(",") if item.strip()]
    return [text] if reader in (_read_floats, _read_ints) else text


def _yaml_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{text!r} is no value: {' '.join(str(error).split())}") from error


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`InputError`, with near matches for unknown flags."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            hint = did_you_mean(unknown[0].split("=")[0], self._option_string_actions)
            self.error(f"unknown argument {unknown[0]}{hint}")
        return parsed


def _build_parser(config_class: type, prog: str, description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    fields, overrides = _fields(config_class), _files_of(config_class).overrides
    if "config" not in fields:
        parser.add_argument("--config", metavar="YAML", help="settings file or recipe name; flags override it")
    if overrides:
        text = "settings, stronger than the file's and weaker than flags"
        names = [f"--{name}" for name in overrides]
        parser.add_argument(*names, dest=_OVERRIDES, nargs="+", action="extend", metavar="KEY=VALUE", help=text)
    for name, (field, reader) in fields.items():
        _add_flag(parser, name, field, reader)
    return parser


def _add_flag(parser: argparse.ArgumentParser, name: str, field: dataclasses.Field, reader: Callable) -> None:
    meta, flag = field.metadata, f"--{name}"
    if meta["positional"]:
        several = {"nargs": "+", "action": _CollectTuple} if reader is _read_strings else {"type": reader}
        parser.add_argument(name, help=meta["help"].replace("%", "%%"), metavar=name.upper(), **several)
        return
    text = f"{meta['help']} (default: {field.default})".replace("%", "%%")
    if reader is _read_bool:
        in_words = {"nargs": "?", "const": True, "type": parse_bool, "metavar": "true|false"}
        parser.add_argument(
            flag, dest=name, help=text, **(in_words if meta["written_out"] else {"action": "store_true"})
        )
        off_help = f"switch {flag} off" if field.default or meta["off"] else argparse.SUPPRESS
        parser.add_argument(meta["off"] or f"--no_{name}", dest=name, action="store_false", help=off_help)
        return
    arguments: dict[str, Any] = {"type": _named_reader(reader), "help": text, "metavar": name.upper()}
    if meta["choices"]:
        arguments |= {"choices": meta["choices"], "metavar": None}
    if reader is _read_assignments:
        arguments |= {"nargs": "+", "type": parse_assignment, "action": _CollectAssignments, "metavar": "KEY=VALUE"}
    elif reader is _read_floats:
        arguments |= {"nargs": "+", "type": float, "action": _CollectTuple}
    elif reader is _read_ints:
        arguments |= {"nargs": "+", "type": int, "action": _CollectTuple}
    elif reader is _read_strings:
        arguments |= {"nargs": "+", "type": str, "action": _CollectTuple}
    parser.add_argument(*([meta["short"]] if meta["short"] else []), flag, dest=name, **arguments)


class _CollectAssignments(argparse.Action):
    def __call__(self, _parser: Any, namespace: Any, values: Any, _option: Any = None) -> None:
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), **dict(values)})


class _CollectTuple(argparse.Action):
    def __call__(self, _parser: Any, namespace: Any, values: Any, _option: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _fields(config_class: type) -> dict[str, tuple[dataclasses.Field, Callable]]:
    """Returns each field of a configuration with the function that reads its value from a text or from YAML."""
    hints = typing.get_type_hints(config_class)
    return {field.name: (field, _reader(hints[field.name])) for field in dataclasses.fields(config_class)}


def _files_of(config_class: type) -> SettingsFiles:
    return getattr(config_class, "SETTINGS", None) or SettingsFiles()


def _reader(annotation: Any) -> Callable[[Any], Any]:
    members = set(typing.get_args(annotation))
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        if tuple[int, int] in members:
            return parse_size
        (annotation,) = members - {types.NoneType}
    if annotation is bool:
        return _read_bool
    if annotation == tuple[float, ...]:
        return _read_floats
    if annotation == tuple[int, ...]:
        return _read_ints
    if annotation == tuple[str, ...]:
        return _read_strings
    if typing.get_origin(annotation) is dict:
        return _read_assignments
    if annotation in (int, float, str):
        return annotation
    raise TypeError(f"no reader for a field of type {annotation}")


def _read_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false expected")
    return value


def _read_floats(value: Any) -> tuple[float, ...]:
    return tuple(float(item) for item in _listed(value))


def _read_ints(value: Any) -> tuple[int, ...]:
    return tuple(_read_int(item) for item in _listed(value))


def _read_int(value: Any) -> int:
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError("a whole number expected")
    return int(value)


def _listed(value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError("a list of numbers expected")
    return value


def _read_strings(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(str(item) for item in value)


def _read_assignments(value: Any) -> dict[str, Any]:
    return dict(value)


def _convert(field: dataclasses.Field, reader: Callable, value: Any, where: str) -> Any:
    if value is None and types.NoneType in typing.get_args(field.type):
        return None
    try:
        if value is None:
            raise ValueError("a value expected")
        if reader is int:
            value = _read_int(value)
        if field.metadata["choices"] and value not in field.metadata["choices"]:
            raise ValueError(f"choose {', '.join(field.metadata['choices'])}")
        return reader(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: cannot use {value!r}: {error}") from error


def _named_reader(reader: Callable) -> Callable:
    """Gives ``parse_size`` the name that argparse shows in "invalid … value"."""
    return type("size", (), {"__new__": lambda _cls, text: parse_size(text)}) if reader is parse_size else reader


def _underscored(argument: str) -> str:
    """Spells ``--local-rank`` as ``--local_rank``; leaves values alone."""
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value if flag.startswith("--") else argument


def _find_yaml(name: str, folder: Path) -> Path:
    """Returns a file, or that of the package's folder; ``NAME``, ``NAME.yaml`` and ``NAME.py`` are the same one."""
    path = Path(name).with_suffix(".yaml") if name.endswith(".py") else Path(name)
    if path.is_file():
        return path
    stem, parents = path.name.removesuffix(".yaml"), path.parent.parts
    packaged = folder / f"{stem}.yaml"
    if packaged.is_file() and folder.parts[len(folder.parts) - len(parents) :] == parents:
        return packaged
    if Path(name).is_file():
        raise InputError(f"{name} is a Python file, which is not run: write its settings as 'key: value' in {path}")
    shipped = sorted(file.stem for file in folder.glob("*.yaml") if not file.name.startswith("_"))
    hint = did_you_mean(stem, {*shipped, *(file.stem for file in path.parent.glob("*.yaml"))})
    raise InputError(f"no settings file {name}{hint or '; the package has ' + ', '.join(shipped)}")


def _announce_flags_without_effect(config: Any) -> None:
    for field in dataclasses.fields(config):
        reason = field.metadata["no_effect"]
        if reason and getattr(config, field.name) != field.default:
            logger.warning("--%s has no effect: %s", field.name, reason)
