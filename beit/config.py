"""Typed configurations: one frozen dataclass per job, whose fields are the command-line flags and the YAML keys.

Only this module knows ``argparse`` and YAML. Values come from, weakest first: the defaults, a YAML file (``--config``,
or the argument ``config``), assignments such as ``--options lr=1e-3`` (see :class:`SettingsFiles`), and the flags.
"""

import argparse
import dataclasses
import functools
import logging
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from beit.errors import InputError, did_you_mean

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")
FunctionT = TypeVar("FunctionT", bound=Callable)
Size = int | tuple[int, int]
Values = dict[str, Any]  # settings by name; a value's type is its field's

RECIPE_KEYS = ("base", "recipe")  # in a YAML file: the file it builds on, and facts about the run that are no settings
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where it is built in: ten times as fast
NOTHING = ("None", "null")
DEFAULTS_FOLLOW = "# The rest has its default."  # in a run's config.yaml


@dataclasses.dataclass(frozen=True)
class SettingsFiles:
    """Where a job's settings files are, and what assignments such as ``--options lr=1e-3`` may name.

    Set as a configuration class's ``SETTINGS``; the default is the recipes of ``beit``.

    Args:
        folder: Folder of the files in the package; those that begin with ``_`` are there to build on.
        overrides: The flags, without dashes, that take assignments ``KEY=VALUE``, which override a file.
        keys: Aliases of single keys of a mapping: that name -> ``field.key``.
        without_effect: Keys that may be assigned but do nothing here -> why; logged when they are.
        shared_with: Another job's configuration whose keys a file may hold as well; they are ignored.
    """

    folder: Path = Path(str(resources.files("beit"))) / "recipes"
    overrides: tuple[str, ...] = ()
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    without_effect: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shared_with: type | None = None


def option(
    default: object,
    help: str,
    *,
    aliases: Sequence[str] = (),
    counts_batches: Sequence[str] = (),
    within: str = "",
    choices: Collection[str] | None = None,
    off: str | None = None,
    no_effect: str | None = None,
    positional: bool = False,
    short: str | None = None,
    must_exist: bool = False,
    yields_to: str = "",
) -> Any:  # whatever the annotation of the field is
    """Declares a configuration field together with its flag.

    Args:
        default: The default value; its type is the field's annotation.
        help: What the flag does, with units.
        aliases: Other names, accepted as flags (unless dotted), YAML keys, assignments and in a checkpoint's ``args``.
        counts_batches: Aliases whose values count batches, of which ``update_freq`` make one of this field's steps.
        within: Interval of the number, or of each of several, like ``[0, 1)`` or ``(0, inf)``; never NaN or infinite.
        choices: The accepted values; read when the parser is built, so a table can grow until then.
        off: For a boolean, the flag that switches it off (``--no_<name>`` otherwise).
        no_effect: Why a flag that the official scripts have does nothing here; logged when it is used.
        positional: Whether the value stands on the command line without a flag; it must then be given.
        short: A second flag, such as ``-o``.
        must_exist: Whether the value is the path of a file or folder that must be there.
        yields_to: A setting that, on the command line, takes the place of this one from a file.
    """
    metadata = {key: value for key, value in locals().items() if key != "default"}
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


def parse_assignment(text: str) -> tuple[str, object]:
    """Reads ``key=value``, the value as YAML does (``depth=6`` is a number, ``qkv_bias=false`` a truth value)."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ValueError(f"{text!r} is not of the form key=value")
    return key, _yaml_value(value)


def read_command_line(config_class: type[ConfigT], argv: Sequence[str], prog: str, description: str) -> ConfigT:
    """Builds a configuration from command-line arguments and the YAML file that they name.

    Raises:
        InputError: An unknown flag or key, a value of the wrong type or out of range, or a missing file.
    """
    parser = _build_parser(config_class, prog, description)
    given = vars(parser.parse_args([_underscored(argument) for argument in argv]))
    yaml_name, assignments, fields = given.get("config"), given.pop(_OVERRIDES, []), _fields(config_class)
    flags = {name: fields[name][1](v) if isinstance(v, list) else v for name, v in given.items() if name in fields}
    values = _read_keys(config_class, yaml_name) if yaml_name else {}
    values, assigned = _override(config_class, values, assignments)
    values, chosen = {**values, **flags}, {*assigned, *flags}
    for name, (field, _) in fields.items():
        if field.metadata["yields_to"] in chosen and name not in chosen:
            values.pop(name, None)
    config = config_class(**_in_steps(config_class, values))
    check_settings(config)
    _log_flags_without_effect(config)
    return config


def read_yaml(config_class: type, name: str) -> Values:
    """Reads the settings of a YAML file, by path or a recipe's name, over those of the ``base`` it names likewise.

    Raises:
        InputError: No such file, not YAML, or a key that the job does not have.
    """
    return _in_steps(config_class, _read_keys(config_class, name))


def read_facts(name: str) -> Values:
    """Reads a recipe's facts (``recipe``) over those of the files it builds on, whose ``note`` is not inherited.

    Raises:
        InputError: No such file, not YAML, or facts that are not ``key: value`` lines.
    """
    facts: Values = {}
    for path, content in _read_layers(name, SettingsFiles().folder):
        own = content.get("recipe") or {}
        if not isinstance(own, dict):
            raise InputError(f"{path}: recipe must hold 'key: value' lines, one for each fact")
        facts.pop("note", None)  # it is about one run
        facts.update(own)
    return facts


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in SettingsFiles().folder.glob("[!_]*.yaml"))


def read_run_settings(path: Path) -> tuple[Values, set[str] | None]:
    """Returns the plain settings of a run's ``config.yaml``, and which differ from the defaults (None if unknown).

    Raises:
        InputError: It cannot be read, or is not YAML.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    before, marker, _ = text.partition(DEFAULTS_FOLLOW.encode())
    return _parse(text, path), set(_parse(before, path)) if marker else None


def from_plain(config_class: type[ConfigT], values: Mapping) -> ConfigT:
    """Builds a configuration from a checkpoint's ``args``; settings that the job does not have are left out."""
    known = {key: value for key, value in values.items() if key in _names(config_class)}
    return config_class(**_in_steps(config_class, dict(_converted(config_class, known.items(), ""))))


def check_settings(config: object) -> None:
    """Raises :class:`InputError` for the first setting outside its choices or interval, or whose path is missing."""
    for name, (field, _) in _fields(type(config)).items():
        value, meta = getattr(config, name), field.metadata
        if value is None:
            continue
        if meta["choices"] is not None and value not in (field.default, *meta["choices"]):
            hint = did_you_mean(str(value), meta["choices"])
            raise InputError(f"--{name} {value}: choose {', '.join(meta['choices'])}{hint}")
        for number in _items(value):
            if meta["within"] and not _is_within(number, meta["within"]):
                shown = " ".join(map(str, _items(value)))
                raise InputError(f"--{name} {shown}: must be {_in_words(meta['within'])}")
        for path in _items(value) if meta["must_exist"] else ():
            _check_exists(name, path)


def _items(value: object) -> Sequence:
    return value if isinstance(value, tuple | list) else (value,)


def _check_exists(name: str, value: str) -> None:
    path = Path(value).expanduser()
    if value and not set("{*?[") & set(value) and not path.exists():  # shards-{000..127}.tar is left to its reader
        hint = did_you_mean(path.name, (other.name for other in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise InputError(f"{name.replace('_', ' ')} {value}: no such file or folder{hint}")


def _is_within(number: object, interval: str) -> bool:
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)


def _in_words(interval: str) -> str:
    low, high = interval[1:-1].replace(" ", "").split(",")
    if high == "inf":
        return f"above {low}" if interval[0] == "(" else "0 or more" if low == "0" else f"at least {low}"
    if interval[0] == "[" and interval[-1] == "]":
        return f"between {low} and {high}"
    lower = f"at least {low}" if interval[0] == "[" else f"above {low}"
    return f"{lower} and {'at most' if interval[-1] == ']' else 'below'} {high}"


def _read_keys(config_class: type, name: str) -> Values:
    """Reads a settings file and those it builds on, under the fields' own names."""
    files = _files_of(config_class)
    ignored = set(RECIPE_KEYS) | (set(_names(files.shared_with)) if files.shared_with else set())
    values: Values = {}
    for path, content in _read_layers(name, files.folder):
        own = {key: value for key, value in content.items() if key in _names(config_class) or key not in ignored}
        values.update(_converted(config_class, own.items(), f"{path}: "))
    return values


def _converted(config_class: type, items: Iterable[tuple[str, object]], where: str) -> Iterator[tuple[str, object]]:
    """Yields fields and values of settings that may go by any of their names."""
    names, fields, removed = _names(config_class), _fields(config_class), _removed(config_class)
    for key, value in items:
        if key in removed and value == removed[key][0]:  # the default, in a run's config.yaml
            continue
        if key in removed:
            raise InputError(f"{where}{key} is gone: {removed[key][1]}")
        if key not in names:
            raise InputError(f"{where}unknown key {key!r}{did_you_mean(str(key), names)}")
        field, reader = fields[names[key]]
        value = _convert(field, reader, value, f"{where}{key}")
        yield names[key], _Batches(value, key) if key in field.metadata["counts_batches"] else value


@dataclasses.dataclass(frozen=True)
class _Batches:
    """A duration in batches, given under an alias, until it is known how many batches make a step."""

    count: int
    name: str


def _in_steps(config_class: type, values: Values) -> Values:
    """Returns the values with durations in optimizer steps, whatever they were given in."""
    settled = dict(values)
    for name, value in values.items():
        if isinstance(value, _Batches):
            batches = values.get("update_freq", getattr(config_class, "update_freq", 1))
            if value.count % batches:
                raise InputError(f"{value.name} {value.count}: must be a multiple of update_freq, {batches}")
            settled[name] = value.count // batches
    return settled


def _read_layers(name: str, folder: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, Values]]:
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


def _parse(text: bytes, path: Path) -> Values:
    try:
        content = yaml.load(text.decode("utf-8"), Loader=_YAML) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold 'key: value' lines, one for each setting")
    return content


def to_plain(config: object) -> Values:
    """Returns the settings as a dict of plain values, as they go into checkpoints and YAML files."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(config).items()}


def dump_yaml(config: object) -> str:
    """Returns the settings as a YAML text that ``--config`` reads back; first those that differ from their defaults."""
    defaults = {name: field.default for name, (field, _) in _fields(type(config)).items()}
    given: Values = {}
    rest: Values = {}
    for key, value in to_plain(config).items():
        (given if getattr(config, key) != defaults[key] else rest)[key] = value
    parts = [yaml.safe_dump(part, sort_keys=False) if part else "" for part in (given, rest)]
    return f"{parts[0]}{DEFAULTS_FOLLOW}\n{parts[1]}"


_OVERRIDES = "assignments to settings"  # where the parser keeps them: no field can be called so


def _override(config_class: type, values: Values, assignments: Sequence[str]) -> tuple[Values, set[str]]:
    """Returns the values with ``KEY=VALUE`` assignments applied, the last one of a key, and the names of those."""
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
        value: Any = _yaml_value(word) if item else _convert(field, reader, _from_text(word, field, reader), where)
        other, same = given.get(f"{name}.{item}", (key, value))
        if other != key and same != value:
            raise InputError(f"{where}: {other} has set {name} to {same!r} already; here they are one setting")
        given[f"{name}.{item}"] = key, value
        value = _Batches(value, key) if key in field.metadata["counts_batches"] else value
        result[name] = {**(result.get(name) or {}), item: value} if item else value
    return result, {name.partition(".")[0] for name in given}


def _find_setting(config_class: type, key: str, where: str) -> tuple[str, str, tuple[dataclasses.Field, Callable]]:
    """Returns the field that an assignment means, and the key where it means one of a mapping's."""
    files = _files_of(config_class)
    fields = {name: it for name, it in _fields(config_class).items() if not it[0].metadata["positional"]}
    names = {key: name for key, name in _names(config_class).items() if name in fields}
    name, _, item = (key, "", "") if key in names else files.keys.get(key, key).partition(".")
    name = names.get(name, name)
    if key in (removed := _removed(config_class)):
        raise InputError(f"{where}: {key} is gone: {removed[key][1]}")
    if name not in fields or (item and fields[name][1] is not dict):
        hint = did_you_mean(key, {*names, *files.keys, *files.without_effect})
        raise InputError(f"{where}: unknown key {key!r}{hint}")
    return name, item, fields[name]


def _from_text(text: str, field: dataclasses.Field, reader: Callable) -> object:
    """Reads the value of an assignment: ``None``, ``True``, ``a,b``, ``[a, b]`` or ``(a, b)``, else the text itself."""
    if text in NOTHING and (field.default is None or field.default == ""):
        return field.default
    if reader is _read_bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if reader is dict:
        return _yaml_value(text)
    if reader in (*_SEVERAL, parse_size) and ("," in text or text[:1] in ("(", "[")):
        return [item.strip(" '\"") for item in text.strip("()[] ").split(",") if item.strip()]
    return [text] if reader in (_read_floats, _read_ints) else text


def _yaml_value(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{text!r} is no value: {' '.join(str(error).split())}") from error


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`InputError`, with near matches for unknown flags."""

    removed: Mapping[str, tuple[object, str]] = {}

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args)
        if unknown:
            flag = unknown[0].split("=")[0]
            if (name := flag.removeprefix("--").removeprefix("no_")) in self.removed:
                raise InputError(f"{flag} is gone: {self.removed[name][1]}")
            self.error(f"unknown argument {unknown[0]}{did_you_mean(flag, self._option_string_actions)}")
        return parsed


def _build_parser(config_class: type, prog: str, description: str) -> argparse.ArgumentParser:
    fields = _fields(config_class)
    positionals = [name.upper() for name, (field, _) in fields.items() if field.metadata["positional"]]
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *positionals, "[--FLAG VALUE ...]"]),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.removed = _removed(config_class)
    overrides = _files_of(config_class).overrides
    if "config" not in fields:
        parser.add_argument("--config", metavar="YAML", help="settings file or recipe name; flags override it")
    if overrides:
        text = "settings that override the file and are overridden by flags"
        names = [f"--{name}" for name in overrides]
        parser.add_argument(*names, dest=_OVERRIDES, nargs="+", action="extend", metavar="KEY=VALUE", help=text)
    groups: dict[str, list[str]] = {}
    for name in fields:
        groups.setdefault(_group(config_class, name), []).append(name)
    for title, names in reversed(groups.items()):  # a job's own first
        group = parser.add_argument_group(title) if title else parser
        for name in names:
            _add_flag(group, name, *fields[name], in_words=not positionals)
    return parser


def _group(config_class: type, name: str) -> str:
    """Returns the title that a flag stands under: ``GROUP`` of the class that first declares it, or of its bases."""
    owner = next(base for base in reversed(config_class.__mro__) if name in vars(base).get("__annotations__", ()))
    return getattr(owner, "GROUP", "")


def _add_flag(
    parser: argparse._ActionsContainer, name: str, field: dataclasses.Field, reader: Callable, in_words: bool
) -> None:
    meta = field.metadata
    if meta["positional"]:
        how: dict[str, Any] = {"nargs": "+"} if reader is _read_strings else {"type": reader}
        parser.add_argument(name, help=meta["help"].replace("%", "%%"), metavar=name.upper(), **how)
        return
    default = "" if field.default in (None, "", ()) else f" (default: {field.default})"
    text = f"{meta['help']}{default}".replace("%", "%%")
    aliases = [f"--{alias}" for alias in meta["aliases"] if "." not in alias]
    flags = [*([meta["short"]] if meta["short"] else []), f"--{name}", *aliases]
    arguments: dict[str, Any] = {"dest": name, "help": text}
    if reader is _read_bool:
        in_words_too = {"nargs": "?", "const": True, "type": parse_bool, "metavar": "true|false"}
        parser.add_argument(*flags, **arguments, **(in_words_too if in_words else {"action": "store_true"}))
        off_help = f"turn --{name} off" if field.default or meta["off"] else argparse.SUPPRESS
        parser.add_argument(meta["off"] or f"--no_{name}", dest=name, action="store_false", help=off_help)
        return
    if meta["choices"] is not None:
        arguments |= {"choices": list(meta["choices"])}
    elif reader is dict:
        arguments |= {"nargs": "+", "type": parse_assignment, "action": "extend", "metavar": "KEY=VALUE"}
    else:
        arguments |= {"type": _SEVERAL.get(reader, _size if reader is parse_size else reader), "metavar": name.upper()}
        arguments |= {"nargs": "+"} if reader in _SEVERAL else {}
    parser.add_argument(*flags, **arguments)
    for alias in (alias for alias in meta["counts_batches"] if "." not in alias):
        text = f"--{name} in batches, of which --update_freq make a step"
        parser.add_argument(f"--{alias}", dest=name, type=int, action=_CollectBatches, metavar=alias.upper(), help=text)


class _CollectBatches(argparse.Action):
    def __call__(self, _parser: object, namespace: object, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, _Batches(values, str(option)))


def _cached(function: FunctionT) -> FunctionT:
    return functools.cache(function)  # type: ignore[return-value]  # which takes more than the function does


@_cached
def _fields(config_class: type) -> dict[str, tuple[dataclasses.Field, Callable]]:
    """Returns each field of a configuration with the function that reads its value from a text or from YAML."""
    hints = typing.get_type_hints(config_class)
    return {field.name: (field, _reader(hints[field.name])) for field in dataclasses.fields(config_class)}


@_cached
def _names(config_class: type) -> dict[str, str]:
    """Returns every name of every setting -> its field."""
    fields: dict[str, Mapping] = {name: field.metadata for name, (field, _) in _fields(config_class).items()}
    names = {name: name for name in fields}
    for name, meta in fields.items():
        names |= dict.fromkeys((*meta["aliases"], *meta["counts_batches"]), name)
    return names


def _removed(config_class: type) -> Mapping[str, tuple[object, str]]:
    """Returns the settings of earlier versions that are gone -> their default then, and what to use instead."""
    return getattr(config_class, "REMOVED", {})


def _files_of(config_class: type) -> SettingsFiles:
    return getattr(config_class, "SETTINGS", None) or SettingsFiles()


def _reader(annotation: object) -> Callable:
    members = set(typing.get_args(annotation))
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        if tuple[int, int] in members:
            return parse_size
        (annotation,) = members - {types.NoneType}
    if typing.get_origin(annotation) is dict:
        return dict
    readers: dict[object, Callable] = {
        bool: _read_bool,
        tuple[float, ...]: _read_floats,
        tuple[int, ...]: _read_ints,
        tuple[str, ...]: _read_strings,
        **{plain: plain for plain in (int, float, str)},
    }
    if annotation not in readers:
        raise TypeError(f"no reader for a field of type {annotation}")
    return readers[annotation]


def _read_bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false expected")
    return value


def _read_floats(value: object) -> tuple[float, ...]:
    return tuple(float(item) for item in _listed(value))


def _read_ints(value: object) -> tuple[int, ...]:
    return tuple(_read_int(item) for item in _listed(value))


def _read_int(value: Any) -> int:
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError("a whole number expected")
    return int(value)


def _listed(value: object) -> Sequence:
    if not isinstance(value, list | tuple):
        raise ValueError("a list of numbers expected")
    return value


def _read_strings(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(str(item) for item in value)


_SEVERAL: dict[Callable, type] = {_read_floats: float, _read_ints: int, _read_strings: str}  # and the type of each


def _size(text: str) -> Size:
    return parse_size(text)


_size.__name__ = "size"  # which argparse shows in "invalid size value"


def _convert(field: dataclasses.Field, reader: Callable, value: Any, where: str) -> Any:
    if value is None and types.NoneType in typing.get_args(field.type):
        return None
    try:
        if value is None:
            raise ValueError("a value expected")
        if reader is int:
            value = _read_int(value)
        if field.metadata["choices"] is not None and value not in field.metadata["choices"]:
            raise ValueError(f"choose {', '.join(field.metadata['choices'])}")
        return reader(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: cannot use {value!r}: {error}") from error


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


def _log_flags_without_effect(config: object) -> None:
    for name, (field, _) in _fields(type(config)).items():
        reason = field.metadata["no_effect"]
        if reason and getattr(config, name) != field.default:
            logger.warning("--%s has no effect: %s", name, reason)
