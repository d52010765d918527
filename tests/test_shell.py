"""Commands that tests run are processes as a user's: status, streams, environment, arguments, and no state shared."""

import subprocess

import pytest

from tests.shell import ROOT, run

pytestmark = pytest.mark.slow  # the first command imports torch


def test_a_command_is_a_process_of_its_own():
    code = "import os, sys, numpy; print(sys.argv, os.environ['MARK'], os.getcwd()); print(numpy.random.rand())"
    one, two = (run("-c", code, "a b", MARK="x").stdout.splitlines() for _ in range(2))
    assert one[0] == two[0] == f"['-c', 'a b'] x {ROOT}"
    assert one[1] != two[1]


def test_how_it_ends_is_seen():
    # Breaks if a process that fails, or is killed, counts as a success, or takes the next ones with it.
    assert run("-c", "print('said'); raise SystemExit(3)", check=False).returncode == 3
    failed = run("-c", "import atexit; atexit.register(print, 'last'); 1 / 0", check=False)
    assert (failed.returncode, failed.stdout) == (1, "last\n")
    assert failed.stderr.rstrip().endswith("ZeroDivisionError: division by zero")
    assert run("-c", "import os; os.kill(os.getpid(), 9)", check=False).returncode == -9
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run("-c", "1 / 0")
    with pytest.raises(subprocess.TimeoutExpired):
        run("-c", "import time; time.sleep(60)", timeout=0.2)
    assert run("-c", "import sys; print('beit' in sys.modules)").stdout == "False\n"


def test_scripts_and_modules_run():
    assert "--data_path" in run("run_beit_pretraining.py", "--help").stdout
    assert "usage" in run("-m", "beit", "--help").stdout
