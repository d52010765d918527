"""Every benchmark of `make bench` runs, in sizes that measure nothing."""

import re
import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
(LISTED,) = re.findall(r"^BENCHMARKS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_make_bench_runs_all_there_are():
    # Breaks when a benchmark is added to the folder and not to the Makefile.
    none = {"measure", "summary", "reproduce_small"}  # the last one is no benchmark of speed
    assert set(LISTED.split()) == {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - none


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", LISTED.split())
def test_a_benchmark_says_its_ratio_first_and_keeps_quick_runs_to_itself(name, monkeypatch, capsys, caplog):
    # Breaks when what a benchmark calls has changed, its ratio is not what one reads first, or a quick run overwrites
    # measured numbers. In this process: most import torch, timm and transformers, which takes longer than the rest.
    folder = ROOT / "benchmarks"
    results = {path: path.read_bytes() for path in (folder / "results").iterdir()}
    caplog.set_level("INFO", "beit")  # restored after the test, whatever the benchmark sets
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick"])
    runpy.run_path(str(folder / f"{name}.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert re.search(r"^\d+\.\d\dx  ", told, re.MULTILINE), told
    assert {path: path.read_bytes() for path in (folder / "results").iterdir()} == results
