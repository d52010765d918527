"""docs/speed.md and docs/measured/speed.md hold the numbers of the result files."""

from pathlib import Path

from tests.shell import run

DOCS = Path(__file__).parents[1] / "docs"


def test_the_tables_are_those_of_the_result_files():
    # Breaks when a benchmark was run again and `python benchmarks/summary.py` was not, or a number was changed by hand.
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    ratios = page.partition("<!-- measured -->\n")[2].partition("<!-- end -->\n")[0]
    tables = (DOCS / "measured" / "speed.md").read_text(encoding="utf-8")
    assert f"{ratios}\n{tables}" == run("benchmarks/summary.py", "--print").stdout
    assert "| benchmark | ratio | of what | goal |" in ratios
