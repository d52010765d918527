"""Writes what the result files hold into the docs: ratios to docs/speed.md, all tables to docs/measured/speed.md.

python benchmarks/summary.py            write both
python benchmarks/summary.py --print    only print them
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import RESULTS, processor

DOCS = Path(__file__).parents[1] / "docs"
PAGE, TABLES = DOCS / "speed.md", DOCS / "measured" / "speed.md"
BEGIN, END = "<!-- measured -->\n", "<!-- end -->\n"
ABOUT = """# All speed measurements

Written by `python benchmarks/summary.py` from the files in [benchmarks/results](../../benchmarks/results/);
[speed.md](../speed.md) explains them.

"""


def results() -> Iterator[Mapping[str, Any]]:
    """Yields the contents of the files of :func:`measure.write` that have ratios."""
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "headlines" in content:
            yield {**content, "file": path.name}


def ratios() -> str:
    """Returns one table with the ratios of all benchmarks, a column for each processor, in Markdown."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for result in results():
        name = f"[{result['benchmark']}](measured/speed.md#{result['benchmark']})"
        for line in result["headlines"]:
            rows.setdefault((name, line["what"]), {})[processor(result["machine"])] = _ratio(line)
    columns = sorted({column for row in rows.values() for column in row})
    lines = [_row(["benchmark", "of what", *columns]), _row(["---", "---", *("---:" for _ in columns)])]
    lines += [_row([*place, *(row.get(column, "") for column in columns)]) for place, row in rows.items()]
    return "\n".join([*lines, ""])


def tables() -> str:
    """Returns a page with the machine and the tables of each benchmark, in Markdown."""
    lines: list[str] = []
    for result in results():
        facts = result["machine"]
        where = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} thread(s)"
        heading = f"## {result['benchmark']}"
        lines += [] if heading in lines else [heading, ""]
        lines += [
            f"`{facts['command']}` ([file](../../benchmarks/results/{result['file']})); {where}; "
            f"PyTorch {facts['packages']['torch']}; {facts['seconds_are']}, "
            f"load {facts['load_average_at_start']} before; {facts['date'][:10]}",
            "",
        ]
        for table in result.get("tables", []):
            (first, *header), *rows = table["rows"]
            lines += [
                f"{table['title']}:",
                "",
                _row([first, *header]),
                _row(["---", *("---:" for _ in header)]),
                *map(_row, rows),
                "",
            ]
    return ABOUT + "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ratio(line: Mapping[str, Any]) -> str:
    if line["goal"] is None:
        return f"{line['ratio']:.2f}"
    ratio = f"{line['ratio']:.2f}" if line["ratio"] >= line["goal"] else f"**{line['ratio']:.2f}**"
    return f"{ratio} (≥ {line['goal']:.2f})"


def main() -> None:
    """Writes both pages."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--print", action="store_true", help="write nothing, print the tables")
    if made.parse_args().print:
        print(ratios(), tables(), sep="\n", end="")
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + ratios() + END + after, encoding="utf-8")
    TABLES.write_text(tables(), encoding="utf-8")


if __name__ == "__main__":
    main()
