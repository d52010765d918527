"""Typed configurations: one frozen dataclass per job, whose fields are the command-line flags and the YAML keys.

Only this module knows ``argparse`` and YAML. Values come from, weakest first: the defaults, a YAML file (``--config``,
or the argument ``config``), assignments such as ``--options lr=1e-3`` (see :class:`SettingsFiles`), and the flags. All
of them, and a dataclass made in Python, go through the same converters, chosen by the fields' annotations.
"""

import argparse
import dataclasses
import datetime
import functools
import inspect
import logging
import math
import os
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from beit.errors import InputError, did_you_mean, did_you_mean_file

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")
FunctionT = TypeVar("FunctionT", bound=Callable)
Size = int | tuple[int, int]
Values = dict[str, Any]  # settings by name; a value's type is its field's

RECIPE_KEYS = ("base", "recipe")  # in a YAML file: the file it builds on, and facts about the run that are no settings
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where it is built in: ten times as fast
NOTHING = ("None", "null")
WORDS = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
DEFAULTS_FOLLOW = "# The rest has its default."  # in a run's config.yaml


@dataclasses.dataclass(frozen=True)
class SettingsFiles:
    """Where a job's settings files are, and what assignments such as ``--options lr=1e-3`` may name.

    Set as a configuration class's ``SETTINGS``; the default is the recipes of ``beit``.
    """

    folder: Path = Path(str(resources.files("beit"))) / "recipes"  # in it, _*.yaml are there to build on
    overrides: tuple[str, ...] = ()  # flags, without dashes, that take assignments KEY=VALUE, which override a file
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)  # aliases of a mapping's keys -> field.key
    without_effect: Mapping[str, str] = dataclasses.field(default_factory=dict)  # other keys -> why they do nothing
    shared_with: type | None = None  # another job's configuration, whose keys in a file are ignored


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
        choices: The accepted values; read when the parser is built, so a table can grow until then. Several are
            separated by blanks or commas.
        off: For a boolean, the flag that switches it off (``--no_<name>`` otherwise).
        no_effect: Why a flag that the official scripts have does nothing here; logged when it is used.
        positional: Whether the value stands on the command line without a flag; it must then be given.
        short: A second flag, such as ``-o``.
        must_exist: Whether the value is the path of a file or folder that must be there.
        yields_to: A setting that, on the command line, takes the place of this one from a file.
    """
    metadata = {key: value for key, value in locals().items() if key != "default"}
    return dataclasses.field(default=default, metadata=metadata)


def read_command_line(config_class: type[ConfigT], argv: Sequence[str], prog: str, description: str) -> ConfigT:
    """Builds a configuration from command-line arguments and the YAML file that they name.

    Raises:
        InputError: An unknown flag or key, a value of the wrong type or out of range, or a missing file.
    """
    parser = _build_parser(config_class, prog, description)
    arguments = [_underscored(argument) for argument in argv]
    given = vars(parser.parse_args(arguments))
    names, words = _names(config_class), (argument[2:].partition("=")[0] for argument in arguments)
    spelt = {names[word]: word for word in words if names.get(word) in given}  # which may be an alias
    assignments = given.pop(_OVERRIDES, [])
    return _read_given(config_class, {spelt.get(key, key): given[key] for key in given}, "--", assignments)


def read_keywords(config_class: type[ConfigT], given: Mapping[str, object]) -> ConfigT:
    """Builds a configuration from the settings that :func:`read_command_line` has as flags, by any of their names.

    Raises:
        InputError: As from a command line.
    """
    values = dict(given)
    for name, (field, reader) in _fields(config_class).items():
        off = (field.metadata["off"] or f"--no_{name}").removeprefix("--")
        if reader is _read_bool and isinstance(values.get(off), bool):
            values[name] = not values.pop(off)
    return _read_given(config_class, values, "")


def keywords_of(config_class: type) -> tuple[list[inspect.Parameter], str]:
    """Returns what :func:`read_keywords` takes, under the settings' own names, and a text with a line about each."""
    given = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default="", annotation="str")
    parameters, lines = {"config": given}, {"config": "settings file or recipe name; what is given here overrides it"}
    for name, (field, _) in _fields(config_class).items():
        parameters[name] = given.replace(name=name, default=field.default, annotation=field.type)
        lines[name] = field.metadata["help"]
    return list(parameters.values()), "\n".join(f"    {name}: {text}" for name, text in lines.items())


def _read_given(config_class: type[ConfigT], given: Values, where: str, assignments: Sequence[str] = ()) -> ConfigT:
    """Builds a configuration from given values, over those of assignments and of the YAML file named ``config``."""
    yaml_name, fields = str(given.get("config") or ""), _fields(config_class)
    items = (item for item in given.items() if item[0] != "config" or "config" in fields)
    flags = dict(_converted(config_class, items, where))
    values = _read_keys(config_class, yaml_name) if yaml_name else {}
    values, assigned = _override(config_class, values, assignments)
    values, chosen = {**values, **flags}, {*assigned, *flags}
    for name, (field, _) in fields.items():
        if field.metadata["yields_to"] in chosen and name not in chosen:
            values.pop(name, None)
    config = read_settings(config_class(**_in_steps(config_class, values)))
    for name, (field, _) in fields.items():
        if field.metadata["no_effect"] and getattr(config, name) != field.default:
            logger.warning("--%s has no effect: %s", name, field.metadata["no_effect"])
    return config


def read_yaml(config_class: type, name: str) -> Values:
    """Reads a YAML file's settings, by path or recipe's name, over its ``base``'s; raises InputError for other keys."""
    return _in_steps(config_class, _read_keys(config_class, name))


def read_facts(name: str) -> Values:
    """Reads a recipe's facts (``recipe``) over those of the files it builds on, whose ``note`` is not inherited."""
    facts: Values = {}
    for path, content in _read_layers(name, SettingsFiles.folder):
        own = content.get("recipe") or {}
        if not isinstance(own, dict):
            raise InputError(f"{path}: recipe must hold 'key: value' lines, one for each fact")
        facts.pop("note", None)  # it is about one run
        facts.update(own)
    return facts


def recipe_names(folder: Path = SettingsFiles.folder) -> list[str]:
    """Returns the names of the recipes that come with the package, or of another folder's settings files, sorted."""
    return sorted(path.stem for path in folder.glob("[!_]*.yaml"))


def read_run_settings(path: Path) -> tuple[Values, set[str] | None]:
    """Returns the plain settings of a run's ``config.yaml``, and which differ from the defaults (None if unknown)."""
    text = _content(path)
    before, marker, _ = text.partition(DEFAULTS_FOLLOW.encode())
    return _parse(text, path), set(_parse(before, path)) if marker else None


def from_plain(config_class: type[ConfigT], values: Mapping) -> ConfigT:
    """Builds a configuration from a checkpoint's ``args``; settings that the job does not have are left out."""
    known = {key: value for key, value in values.items() if key in _names(config_class)}
    return config_class(**_in_steps(config_class, dict(_converted(config_class, known.items(), ""))))


def read_settings(config: ConfigT) -> ConfigT:
    """Returns a configuration, wherever it was made, with every setting in its field's type.

    Raises:
        InputError: A setting is of another type or outside its choices or interval, or its path is missing.
    """
    return dataclasses.replace(config, **_read(config))  # type: ignore[type-var]  # any dataclass


class ReadWhenMade:
    """Base of settings of which there are none but those that :func:`read_settings` returns."""

    def __post_init__(self) -> None:
        vars(self).update(_read(self))


def _read(config: object) -> Values:
    values: Values = {}
    for name, (field, reader) in _fields(type(config)).items():
        values[name] = value = _convert(field, reader, getattr(config, name), f"--{name}")
        within = field.metadata["within"]
        for number in _items(value) if within and value is not None else ():
            if not _is_within(number, within):
                shown = " ".join(map(str, _items(value)))
                raise InputError(f"--{name} {shown}: must be {_in_words(within)}")
        for path in _items(value) if field.metadata["must_exist"] and value else ():
            _check_exists(name, path)
    return values


def _items(value: object) -> Sequence:
    return value if isinstance(value, tuple | list) else (value,)


def _check_exists(name: str, value: str) -> None:
    # What stands for several files, such as shards-{000..127}.tar, or a data set: its reader checks.
    if value and not set("{*?[") & set(value) and not value.startswith("hf:") and not os.path.exists(value):
        raise InputError(f"{name.replace('_', ' ')} {value}: no such file or folder{did_you_mean_file(value)}")


def _is_within(number: float, interval: str) -> bool:
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
        own = ((key, value) for key, value in content.items() if key in _names(config_class) or key not in ignored)
        values.update(_converted(config_class, own, f"{path}: "))
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
        yield names[key], _Batches(value, f"{where}{key}") if key in field.metadata["counts_batches"] else value


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
            batches = max(1, values.get("update_freq", getattr(config_class, "update_freq", 1)))
            if value.count % batches:
                raise InputError(f"{value.name} {value.count}: must be a multiple of update_freq, {batches}")
            settled[name] = value.count // batches
    return settled


def _read_layers(name: str, folder: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, Values]]:
    """Returns the content of a settings file, after that of the files it builds on."""
    path = _find_yaml(name, folder)
    content = _parse(_content(path), path)
    base = str(content.get("base") or "")
    if not base:
        return [(path, content)]
    beside = path.parent / base
    below = beside if os.path.isfile(beside) else _find_yaml(base, folder, f"{path}: ")  # or one of the package
    if below.resolve() in (seen := (*seen, path.resolve())):
        raise InputError(f"{path}: base {base!r} leads back to a file that builds on it")
    return [*_read_layers(str(below), folder, seen), (path, content)]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _parse(text: bytes, path: Path) -> Values:
    content = _load_yaml(text, f"{path} is not a YAML file") or {}
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
    parts = (yaml.safe_dump(part, sort_keys=False) if part else "" for part in (given, rest))
    return f"{DEFAULTS_FOLLOW}\n".join(parts)


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
    if name not in fields or (item and fields[name][1] is not _read_dict):
        hint = did_you_mean(key, {*names, *files.keys, *files.without_effect})
        raise InputError(f"{where}: unknown key {key!r}{hint}")
    return name, item, fields[name]


def _from_text(text: str, field: dataclasses.Field, reader: Callable) -> object:
    """Reads the value of an assignment: ``None``, ``True``, ``a,b``, ``[a, b]`` or ``(a, b)``, else the text itself."""
    if text in NOTHING and (field.default is None or field.default == ""):
        return None
    if reader is _read_dict:
        return _yaml_value(text)
    if (reader is _read_size or isinstance(reader, _Several)) and ("," in text or text[:1] in ("(", "[")):
        return [item.strip(" '\"") for item in text.strip("()[] ").split(",") if item.strip()]
    return text


def _load_yaml(text: str | bytes, problem: str) -> object:
    """Returns what a YAML text holds; raises InputError, which begins with the ``problem``, if it is none."""
    try:
        return yaml.load(text.decode("utf-8") if isinstance(text, bytes) else text, Loader=_YAML)
    except Exception as error:  # of a date without such a day, an !!int without digits or deep nesting it may be any
        raise InputError(f"{problem}: {' '.join(str(error).split())}") from error


def _yaml_value(text: str) -> object:
    return _load_yaml(text, f"{text!r} is no value")


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`InputError`, with near matches for unknown flags."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args)
        if unknown:
            shown = [name for name, it in self._option_string_actions.items() if it.help is not argparse.SUPPRESS]
            hint = did_you_mean(unknown[0].split("=")[0], shown)
            self.error(f"unknown argument {unknown[0]}{hint}")
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
    for name in _removed(config_class):
        # refused with the values
        parser.add_argument(f"--{name}", f"--no_{name}", dest=name, nargs="?", help=argparse.SUPPRESS)
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
        several: dict[str, Any] = {"nargs": "+"} if isinstance(reader, _Several) else {}
        parser.add_argument(name, help=meta["help"].replace("%", "%%"), metavar=name.upper(), **several)
        return
    default = "" if field.default in (None, "", ()) else f" (default: {field.default})"
    text = f"{meta['help']}{default}".replace("%", "%%")
    aliases = [f"--{alias}" for alias in meta["aliases"] if "." not in alias]
    flags = [*([meta["short"]] if meta["short"] else []), f"--{name}", *aliases]
    arguments: dict[str, Any] = {"dest": name, "help": text}
    if reader is _read_bool:
        in_words_too = {"nargs": "?", "const": True, "metavar": "true|false"}
        parser.add_argument(*flags, **arguments, **(in_words_too if in_words else {"action": "store_true"}))
        off_help = f"turn --{name} off" if field.default or meta["off"] else argparse.SUPPRESS
        parser.add_argument(meta["off"] or f"--no_{name}", dest=name, action="store_false", help=off_help)
        return
    arguments["metavar"] = name.upper() if meta["choices"] is None else f"{{{','.join(meta['choices'])}}}"
    if reader is _read_dict:
        arguments |= {"nargs": "+", "action": "extend", "metavar": "KEY=VALUE"}
    elif isinstance(reader, _Several):
        arguments["nargs"] = "+"
    parser.add_argument(*flags, **arguments)
    for alias in (alias for alias in meta["counts_batches"] if "." not in alias):
        parser.add_argument(f"--{alias}", help=f"--{name} in batches, of which --update_freq make a step")


_cached: Callable[[FunctionT], FunctionT] = functools.cache  # type: ignore[assignment]  # which takes more


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
            return _read_size
        (annotation,) = members - {types.NoneType}
    readers: dict[object, Callable] = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_text}
    if typing.get_origin(annotation) is dict:
        return _read_dict
    if typing.get_origin(annotation) is tuple:
        return _Several(readers[typing.get_args(annotation)[0]])
    if annotation not in readers:
        raise TypeError(f"no reader for a field of type {annotation}")
    return readers[annotation]


def _read_bool(value: object) -> bool:
    word = str(value).lower() if isinstance(value, bool | str) else ""
    if word not in WORDS:
        raise ValueError("expected true or false")
    return WORDS[word]


def _number(value: Any) -> float:
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _read_float(value: object) -> float:
    if not math.isfinite(number := _number(value)):
        raise ValueError("expected a finite number")
    return number


def _read_int(value: object) -> int:
    number = _number(value)
    if not number.is_integer() or abs(number) >= 1e15:  # floats are exact up to there
        raise ValueError("expected a whole number of at most 15 digits")
    return int(number)


def _read_text(value: object) -> str:
    """Reads a text or a path; a leading ``~`` is the user's home folder."""
    if isinstance(value, int | float | datetime.date) and not isinstance(value, bool):
        value = str(value)  # what YAML takes for more than a text, such as a folder named by a date
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise ValueError("expected a text or a path")
    path = os.path.expanduser(text)
    if path.startswith("~") and os.sep in path:
        raise ValueError("there is no such user, or no home folder")
    return str(path)


def _read_size(value: object) -> Size:
    """Reads ``224`` as a square size and ``192x256`` as height × width, in pixels."""
    parts = value.lower().split("x") if isinstance(value, str) else value
    sizes = [_read_int(part) for part in (parts if isinstance(parts, list | tuple) else [parts])]
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise ValueError("a size is one number, or HEIGHTxWIDTH")
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def _read_dict(value: object) -> Values:
    """Reads settings by name, or texts ``key=value``: ``depth=6`` is a number, ``qkv_bias=false`` a truth value."""
    if not isinstance(value, Mapping):
        parts = [str(text).partition("=") for text in _listed(value)]
        if any("=" in word.partition(" ")[2] for *_, word in parts):
            raise ValueError("give each KEY=VALUE by itself, not several in one text")
        value = {key if equals else "": _yaml_value(word) for key, equals, word in parts}
    if not all(isinstance(key, str) and key for key in value):
        raise ValueError("expected KEY=VALUE, with finite numbers")
    return {key: _read_item(item) for key, item in value.items()}


def _read_item(value: Any) -> object:
    """Reads a number, text or truth value, which may be NumPy's, nothing, or a list or tuple of them."""
    if isinstance(value, list | tuple):
        return type(value)(_read_item(item) for item in value)
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, int | float | str | None) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("expected KEY=VALUE, with finite numbers")
    return value


def _listed(value: object) -> Sequence:
    values = [value] if isinstance(value, str | os.PathLike) else value
    if not isinstance(values, Sequence) or isinstance(values, bytes):
        raise ValueError("expected a list")
    return values


@dataclasses.dataclass(frozen=True)
class _Several:
    """Reads several values, each with the same reader."""

    each: Callable[[Any], Any]

    def __call__(self, value: object) -> tuple:
        return tuple(self.each(item) for item in _listed(value))


def _convert(field: dataclasses.Field, reader: Callable, value: Any, where: str) -> Any:
    if value is None and (field.default in (None, "") or types.NoneType in typing.get_args(field.type)):
        return "" if field.default == "" else None
    choices = field.metadata["choices"]
    try:
        if value is None:
            raise ValueError("expected a value")
        if choices is not None and isinstance(reader, _Several):
            value = [word for item in _listed(value) for word in str(item).split(",")]
        read = reader(value)
        if choices is not None and read != field.default and (odd := [it for it in _items(read) if it not in choices]):
            raise ValueError(f"choose {', '.join(choices)}{did_you_mean(str(odd[0]), choices)}")
    except ValueError as error:
        raise InputError(f"{where}: cannot use {_SHORT.repr(value)}: {error}") from error
    return read


_SHORT = reprlib.Repr()  # a YAML file of few lines can hold values of any size
_SHORT.maxstring = _SHORT.maxother = 100


def _underscored(argument: str) -> str:
    """Spells ``--local-rank`` as ``--local_rank``; leaves values alone."""
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value if flag.startswith("--") else argument


def _find_yaml(name: str, folder: Path, where: str = "") -> Path:
    """Returns a file, or that of the package's folder; ``NAME``, ``NAME.yaml`` and ``NAME.py`` are the same one."""
    path = Path(name).with_suffix(".yaml") if name.endswith(".py") else Path(name)
    if os.path.isfile(path):
        return path
    stem, parents = path.name.removesuffix(".yaml"), path.parent.parts
    packaged = folder / f"{stem}.yaml"
    if os.path.isfile(packaged) and folder.parts[len(folder.parts) - len(parents) :] == parents:
        return packaged
    if os.path.isfile(name):
        raise InputError(f"{where}{name} is Python, which is not run: write its settings as 'key: value' in {path}")
    shipped = recipe_names(folder)
    hint = did_you_mean(stem, {*shipped, *(file.stem for file in path.parent.glob("*.yaml"))})
    raise InputError(f"{where}no settings file {name}{hint or '; the package has ' + ', '.join(shipped)}")
