"""docs/speed.md and docs/measured/speed.md hold the numbers of the result files."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_tables_are_those_of_the_result_files(monkeypatch, capsys):
    # Breaks when a benchmark was run again and `python benchmarks/summary.py` was not, or a number was changed by hand.
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    ratios = page.partition("<!-- measured -->\n")[2].partition("<!-- end -->\n")[0]
    tables = (DOCS / "measured" / "speed.md").read_text(encoding="utf-8")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script that lies there
    monkeypatch.setattr("sys.argv", ["summary.py", "--print"])
    runpy.run_path(str(ROOT / "benchmarks" / "summary.py"), run_name="__main__")
    assert f"{ratios}\n{tables}" == capsys.readouterr().out
    assert "| benchmark | of what | AMD EPYC |" in ratios
