"""Which checkpoint a run goes on from, and what becomes of an earlier run in its folder."""

import errno
import json
import platform
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from beit.errors import InputError
from beit.training.checkpoint import LAST, RunFolder
from beit.training.environment import command_line
from beit.training.session import open_session
from tests.training.test_loop import make_trainer


def begin(folder, *, path="", auto=True, start_epoch=0, settings="lr: 1\n", records=()):
    with open_session(device="cpu", output_dir=str(folder), settings=settings, seed=0) as session:
        trainer = make_trainer(None)
        trainer.records.update(records)
        session.resume(trainer, path=str(path), auto=auto, start_epoch=start_epoch)
        return divmod(trainer.first_step, trainer.settings.period.steps)


def save(path, epoch, step):
    path.parent.mkdir(exist_ok=True)
    folder = RunFolder(path.parent)
    folder.save(path.name, make_trainer(None)._state(10 * epoch + step))
    folder.close()


def test_the_newest_of_the_folder_comes_before_a_path_it_has_got_further_than(tmp_path):
    save(tmp_path / "other" / "checkpoint-1.pth", 2, 0)
    assert begin(tmp_path / "run", path=tmp_path / "other" / "checkpoint-1.pth") == (2, 0)
    save(tmp_path / "run" / LAST, 2, 3)
    assert begin(tmp_path / "run", path=tmp_path / "other" / "checkpoint-1.pth") == (2, 3)
    assert begin(tmp_path / "run", path=tmp_path / "other" / "checkpoint-1.pth", auto=False) == (2, 0)


def test_a_run_that_starts_over_sets_the_checkpoints_of_the_earlier_one_aside(tmp_path):
    # Breaks if they stay: the new run would be taken for the old one, and keeping the newest would delete its own.
    for epoch in (0, 4):
        save(tmp_path / f"checkpoint-{epoch}.pth", epoch + 1, 0)
    save(tmp_path / LAST, 4, 2)
    assert begin(tmp_path, auto=False, start_epoch=1) == (1, 0)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["checkpoint-0.pth"]
    (aside,) = tmp_path.glob("previous-*")
    assert sorted(path.name for path in aside.iterdir()) == ["checkpoint-4.pth", LAST]


def test_a_start_that_fails_leaves_the_settings_of_the_run_alone(tmp_path):
    begin(tmp_path)
    with pytest.raises(InputError, match="--start_epoch 3"):
        begin(tmp_path, start_epoch=3, settings="lr: 7\n")
    assert (tmp_path / "config.yaml").read_text() == "lr: 1\n"


def test_settings_of_the_run_that_has_trained_are_kept(tmp_path):
    # Breaks if a start that trains nothing writes its own: a report would show them beside another run's numbers.
    begin(tmp_path, records={"engine.json": b"1"})
    save(tmp_path / "checkpoint-2.pth", 3, 0)
    assert begin(tmp_path, settings="lr: 9\n", records={"engine.json": b"9"}) == (3, 0)  # all is done
    assert (tmp_path / "config.yaml").read_text() == "lr: 1\n"
    assert (tmp_path / "engine.json").read_text() == "1"
    (tmp_path / "checkpoint-2.pth").unlink()
    begin(tmp_path, settings="lr: 9\n")
    assert (tmp_path / "config.yaml").read_text() == "lr: 9\n"
    (kept,) = tmp_path.glob("config-until-*.yaml")
    assert kept.read_text() == "lr: 1\n"


def test_a_run_writes_down_what_it_runs_on_but_not_where(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["run_beit_pretraining.py", "--config", "pretrain_base_22k"])
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace())
    begin(tmp_path)
    written = (tmp_path / "environment.json").read_text()
    environment = json.loads(written)
    assert environment["torch"] == torch.__version__
    assert environment["python"] == platform.python_version()
    assert environment["device"].startswith("CPU")
    assert environment["processes"] == 1
    assert environment["command"] == ["python", "run_beit_pretraining.py", "--config", "pretrain_base_22k"]
    assert socket.gethostname() not in written


def test_a_command_is_told_as_it_was_typed(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace())
    assert command_line(["/venv/bin/beit", "pretrain", "--lr", "1"]) == ["beit", "pretrain", "--lr", "1"]
    assert command_line(["-c"]) == []
    package = SimpleNamespace(__spec__=SimpleNamespace(name="beit.__main__"))
    monkeypatch.setitem(sys.modules, "__main__", package)
    assert command_line(["/lib/beit/__main__.py", "demo"]) == ["python", "-m", "beit", "demo"]


HOLD = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


@pytest.fixture
def held(tmp_path):
    """A run folder that another process has locked until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdout.readline()
        yield other.stdin
        other.stdin.close()


def test_a_run_that_was_started_again_waits_for_the_one_before_it_to_let_go(tmp_path, held, monkeypatch, caplog):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with caplog.at_level("INFO"):
        threading.Timer(0.5, held.close).start()
        assert begin(tmp_path) == (0, 0)
    assert caplog.text.count("which should end: waiting") == 1


def test_a_run_in_the_folder_of_another_is_refused_at_once(tmp_path, held):
    with pytest.raises(InputError, match="in use by another process; wait for that run to end"):
        begin(tmp_path)


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def refuse(*_arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", refuse)
    assert begin(tmp_path) == (0, 0)
    assert "no locks there (Function not implemented)" in caplog.text
