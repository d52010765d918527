"""Every benchmark of `make bench` runs, in sizes that measure nothing."""

import os
import re
import subprocess
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
def test_a_benchmark_says_its_ratio_first_and_keeps_quick_runs_to_itself(name):
    # Breaks when what a benchmark calls has changed, its ratio is not what one reads first, or a quick run overwrites
    # measured numbers.
    results = {path: path.read_bytes() for path in (ROOT / "benchmarks" / "results").iterdir()}
    command = [sys.executable, f"benchmarks/{name}.py", "--quick"]  # afresh: threads may hang in a forked process
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    told = done.stdout
    assert re.search(r"^\d+\.\d\dx  ", told, re.MULTILINE), told
    assert {path: path.read_bytes() for path in (ROOT / "benchmarks" / "results").iterdir()} == results
