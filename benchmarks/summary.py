"""Puts what all result files tell, ratios first, into the part of docs/speed.md between its markers.

python benchmarks/summary.py            write it
python benchmarks/summary.py --print    only print it
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
BEGIN, END = "<!-- measured -->\n", "<!-- end -->\n"


def results() -> Iterator[Mapping[str, Any]]:
    """Returns what is in the files of :func:`measure.write` that tell ratios."""
    for path in sorted(RESULTS.glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        if "headlines" in told:
            yield {**told, "file": path.name}


def markdown() -> str:
    """Returns the tables of each result file, that of the ratios first."""
    lines = []
    for told in results():
        facts = told["machine"]
        where = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} thread(s)"
        lines += [
            f"**[{told['benchmark']}](../benchmarks/results/{told['file']})**: `{facts['command']}`; {where}; "
            f"PyTorch {facts['packages']['torch']}; {facts['seconds_are']}, "
            f"load {facts['load_average_at_start']} before; {facts['date'][:10]}",
            "",
            "| ratio | of what | goal |",
            "| ---: | --- | --- |",
            *(f"| {line['ratio']:.2f} | {line['what']} | {_goal(line)} |" for line in told["headlines"]),
            "",
        ]
        for table in told.get("tables", []):
            (first, *header), *rows = table["rows"]
            lines += [
                f"{table['title']}:",
                "",
                _row([first, *header]),
                _row(["---", *("---:" for _ in header)]),
                *map(_row, rows),
                "",
            ]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _goal(line: Mapping[str, Any]) -> str:
    if line["goal"] is None:
        return ""
    return f"{line['goal']:.2f}, {'reached' if line['ratio'] >= line['goal'] else '**missed**'}"


def main() -> None:
    """Writes the tables."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--print", action="store_true", help="write nothing, print the tables")
    if made.parse_args().print:
        print(markdown())
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + markdown() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
