"""docs/speed.md tells what the result files hold."""

from pathlib import Path

from tests.shell import run

ROOT = Path(__file__).parents[1]


def test_the_table_is_that_of_the_result_files():
    # Breaks when a benchmark was run again and `python benchmarks/summary.py` was not, or a number was changed by hand.
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    measured = page.partition("<!-- measured -->\n")[2].partition("<!-- end -->\n")[0]
    assert measured.strip() == run("benchmarks/summary.py", "--print").stdout.strip()
    assert "| ratio | of what | goal |" in measured
