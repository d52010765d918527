"""Of a report: what the runs have reached, beside what was published."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from beit.commands.run_record import KINDS, Measure, RunRecord
from beit.errors import InputError
from beit.visualization.diagram import short
from beit.visualization.markup import Content, Markup, element
from beit.visualization.page import cell, fold, table

QUOTED = element("span", "quoted", class_="tag quoted")
MEASURED = element("span", "measured", class_="tag measured")
NO_QUOTE = "no published number"
MOST_ROWS = 60  # of one file of results
COLUMNS = ("Result", "Quoted", "Measured", "Best")


def shown(measure: Measure, value: float) -> str:
    """Returns a measured number as it is read."""
    scaled = value * measure.scale
    return (f"{scaled:.2f}" if measure.unit else short(scaled)) + measure.unit


# The summary


def summary(runs: Sequence[RunRecord]) -> Content:
    """Returns a card for each run, and how runs of a kind compare."""
    cards = element("ul", *(_card(run, number) for number, run in enumerate(runs)), class_="cards")
    return [element("p", verdict(runs)), cards]


def verdict(runs: Sequence[RunRecord]) -> str:
    """Returns in words how it went."""
    unfinished = [run.name for run in runs if not _state(run)[1]]
    parts = [f"Not finished: {', '.join(unfinished)}." if unfinished else "All finished."]
    if len(runs) == 1:
        parts = []
    for kind in dict.fromkeys(run.kind for run in runs):
        same = [run for run in runs if run.kind is kind]
        measure = next((m for m in kind.measures if all(run.last(m.key) is not None for run in same)), None)
        if len(same) > 1 and measure is not None:
            ranked = sorted(same, key=lambda run: run.last(measure.key), reverse=measure.higher)  # type: ignore[arg-type, return-value]
            values = (f"{shown(measure, run.last(measure.key) or 0.0)} {run.name}" for run in ranked)
            parts.append(f"{kind.name[0].upper()}{kind.name[1:]}, {measure.label}: {', '.join(values)}.")
    return " ".join(parts)


def _card(run: RunRecord, number: int) -> Markup:
    text, fine = _state(run)
    measures = run.measures()
    figure = None
    if measures:
        value = shown(measures[0], run.last(measures[0].key) or 0.0)
        figure = element("p", element("b", value), element("span", measures[0].label), class_="figure")
    return element(
        "li",
        element("h3", element("a", run.name, href=f"#run-{number}")),
        element("div", run.kind.name, class_="kind"),
        figure,
        element("ul", *(element("li", remark) for remark in remarks(run))),
        element("div", text, class_=f"state {'good' if fine else 'warn'}"),
        class_="card",
    )


def _state(run: RunRecord) -> tuple[str, bool]:
    loss = run.entries[-1].get("train_loss")
    if isinstance(loss, float) and not math.isfinite(loss):
        return f"diverged: the loss is {loss}", False
    done = f"{run.done:,} {run.unit}{'s' * (run.done != 1)}"
    if run.planned is None:
        return f"{done} done", True
    if run.done >= run.planned:
        return f"✓ finished: {done}", True
    return f"! not finished: {run.done:,} of {run.planned:,} {run.unit}s", False


def remarks(run: RunRecord) -> list[Content]:
    """Returns what there is to say about a run's result, each in a line."""
    told: list[Content] = []
    accuracy, baseline = run.last("test_mlm_acc"), run.last("test_most_frequent_acc")
    if accuracy is not None and baseline:
        told.append(
            f"{accuracy / baseline:.1f} times the score of always naming the most frequent token ({short(baseline)})"
        )
    for measure in run.measures()[1:3]:
        told.append(f"{measure.label}: {shown(measure, run.last(measure.key) or 0.0)}")
    measured = next((m for m in run.measures() if _is_number(_quoted(run).get(m.quoted))), None)
    if measured is not None:
        told.append(_comparison(run, measured))
    if skipped := sum(entry.get("skipped_steps") or 0 for entry in run.entries[-1:]):
        told.append(f"{short(skipped)} updates were skipped, since their gradients were not finite")
    return told


def _comparison(run: RunRecord, measure: Measure) -> Content:
    quoted = float(_quoted(run)[measure.quoted])
    difference = (run.last(measure.key) or 0.0) * measure.scale - quoted
    other = "; it was run with other settings, see below" if run.departures() else ""
    where = (
        "the same as"
        if abs(difference) < 1e-3 * abs(quoted)
        else f"{short(abs(difference), 2)} {'above' if difference > 0 else 'below'}"
    )
    return [f"{measure.label}: {where} the ", QUOTED, f" {quoted:g}{other}"]


# The tables


def tables(runs: Sequence[RunRecord], further: Mapping[str, Mapping[str, Any]]) -> Content:
    """Returns results with quoted and measured numbers side by side, and those of other jobs."""
    titles = [
        element("th", COLUMNS[0], scope="col"),
        element("th", QUOTED, element("small", "by the recipe's source"), scope="col", class_="number"),
        element("th", MEASURED, element("small", "end of this run"), scope="col", class_="number"),
        element("th", COLUMNS[3], element("small", "measured, and when"), scope="col", class_="number"),
    ]
    caption = element("caption", "Quoted and measured results of each run", class_="unseen")
    bodies = [_body(run, number) for number, run in enumerate(runs)]
    main = element("table", caption, element("thead", element("tr", *titles)), *bodies, class_="stack results")
    files = {**further, **{f"{run.name}/{name}": content for run in runs for name, content in run.results.items()}}
    parts = [part for name, content in files.items() if (part := _file(name, content))]
    return [element("div", main, class_="panel"), [element("h3", "Further results") if parts else None, *parts]]


def _body(run: RunRecord, number: int) -> Markup:
    group = element(
        "tr",
        element(
            "th",
            element("a", run.name, href=f"#run-{number}"),
            element("small", _origin(run)),
            colspan=4,
            scope="rowgroup",
        ),
        class_="group",
    )
    return element("tbody", group, *(_row(run, *row) for row in rows(run)))


def _origin(run: RunRecord) -> str:
    if run.recipe is None:
        return f"{run.kind.name}; not started from a recipe"
    data = f", {run.recipe.facts['data']}" if "data" in run.recipe.facts else ""
    text = f"{run.kind.name}; recipe {run.recipe.name}{data}; quoted from: {run.recipe.facts['source']}"
    if departures := run.departures():
        differences = (f"{key} {_text(theirs)} → {_text(ours)}" for key, (theirs, ours) in departures.items())
        text += f"; run with other settings than the recipe's: {', '.join(differences)}"
    return text


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


def rows(run: RunRecord) -> list[tuple[str, str, Measure | None]]:
    """Returns what the table says of a run: what it is, as quoted, as measured."""
    quoted = _quoted(run)
    told: list[tuple[str, str, Measure | None]] = [
        (m.label, _quote(quoted.pop(m.quoted, None), m.unit), m) for m in run.measures()
    ]
    known = {m.quoted: m for kind in KINDS for m in kind.measures if m.quoted}
    if run.last("n_parameters") is not None:
        told.append(("parameters", _quote(quoted.pop("parameters", None), ""), Measure("n_parameters", "parameters")))
    for key, value in _flat(quoted):
        label = known[key].label if key in known else key
        logged = Measure(key, key) if run.last(key) is not None else None
        told.append((label, _quote(value, known[key].unit if key in known else ""), logged))
    return told


def _row(run: RunRecord, label: str, quoted: str, measure: Measure | None) -> Markup:
    value = None if measure is None else run.last(measure.key)
    best = run.best(measure) if measure in run.kind.measures else None  # there is none of a norm, or of a size
    measured: Content = "not of this run"
    if measure is not None and value is not None:
        measured = element("data", shown(measure, value), value=repr(value))
    best_text = None
    if measure is not None and best is not None and len(run.entries) > 1:
        best_text = [shown(measure, best[0]), element("small", f" {run.unit} {best[1]:,}")]
    return element(
        "tr",
        element("th", label, scope="row"),
        cell(quoted or NO_QUOTE, COLUMNS[1], "number" if quoted else "number none"),
        cell(measured, COLUMNS[2], "number measured" if value is not None else "number none"),
        cell(best_text, COLUMNS[3], "number"),
    )


def _quoted(run: RunRecord) -> dict[str, Any]:
    return dict(run.recipe.facts["quoted"]) if run.recipe is not None else {}


def _quote(value: Any, unit: str) -> str:
    if value is None:
        return ""
    if not _is_number(value):
        return str(value)
    return (f"{value:,}" if isinstance(value, int) else f"{value}") + unit


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Results of other jobs


def read_files(paths: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Reads JSON files of results.

    Raises:
        InputError: One is missing, or is no JSON object.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for path in map(Path, paths):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"--results {path}: {error.strerror}") from error
        except ValueError as error:
            raise InputError(f"--results {path} is no JSON file") from error
        if not isinstance(content, dict):
            raise InputError(f"--results {path} must hold a JSON object: names and numbers")
        found[str(path)] = content
    return found


def _file(name: str, content: Mapping[str, Any]) -> list[Content]:
    numbers = [(key, value) for key, value in _flat(content) if isinstance(value, bool | int | float)]
    if not numbers:
        return []
    values = [[key.replace("_", " "), _value(value)] for key, value in numbers[:MOST_ROWS]]
    more = f"{len(numbers) - MOST_ROWS} more are in the file." if len(numbers) > MOST_ROWS else None
    shown_table = table(("Result", "Measured"), values, "plain", f"Results in {name}")
    note = element("p", more, class_="note") if more else None
    return [fold(name, element("div", shown_table, class_="panel"), note, remark=f"{len(numbers)} numbers, measured")]


def _value(value: bool | int | float) -> Content:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return element("data", short(value), value=repr(value))


def _flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}: ")
        elif not isinstance(value, list):
            yield f"{before}{key}", value
