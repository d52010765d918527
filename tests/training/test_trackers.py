"""What trackers are told: the lines of log.txt, in one run however often it is resumed; the packages for real."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beit.errors import InputError
from beit.registry import TRACKERS
from beit.tasks import base
from beit.tasks.base import trackers_of
from beit.tasks.settings import RunOptions
from beit.training import trackers
from beit.training.trackers import Trackio, WandB
from tests.integration.conftest import images, pretraining_flags, tokenizer  # noqa: F401  (fixtures)
from tests.integration.job_losses import commands, write_images
from tests.training.test_loop import continued, make_trainer, network, step

ROOT = Path(__file__).parents[2]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


class Package:
    """Stands for wandb: keeps what it is told, and refuses steps that go back."""

    def __init__(self):
        self.runs, self.rows, self.ended, self.Image = {}, [], [], lambda image: image

    def init(self, **arguments):
        self.runs.setdefault(arguments["name"], []).append(arguments)
        return self

    @property
    def step(self):
        return max((step + 1 for step, _ in self.rows), default=0)

    def log(self, values, step):
        assert step >= self.step - 1, "a server drops this"
        self.rows.append((step, values))

    def finish(self, exit_code=None):
        self.ended.append(exit_code)


class TrackioPackage(Package):
    """Stands for trackio, which takes any step, as often as it is told."""

    step = None

    @property
    def _next_step(self):
        return max((step + 1 for step, _ in self.rows), default=0)

    def log(self, values, step):
        self.rows.append((step, values))


@pytest.fixture
def package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Package())
    return sys.modules["wandb"]


def tracked(folder, **settings):
    trainer = make_trainer(folder, **settings)
    trainer.report_to, trainer.config = [WandB], {"lr": 1e-3}
    return trainer


def test_a_run_is_told_as_log_txt_has_it_and_resumed_as_one(tmp_path, package):
    trainer = tracked(tmp_path, save_last_every=7)
    stop = trainer.step

    def failing(model, batch, step):
        if step == 17:
            raise RuntimeError("killed")
        return stop(model, batch, step)

    trainer.step = failing
    with pytest.raises(RuntimeError, match="killed"):
        trainer.fit()
    trainer.folder.close()
    resumed = tracked(tmp_path, model=network(), save_last_every=7)
    newest = torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)
    resumed.resume(newest, "checkpoint-last.pth")
    resumed.fit()
    (name, starts), *others = package.runs.items()
    assert not others
    assert len(starts) == 2
    assert name.startswith(f"{tmp_path.name}-")
    assert {start["id"] for start in starts} == {name[-8:]}
    assert {(start["project"], start["resume"]) for start in starts} == {("beit", "allow")}
    assert starts[0]["config"]["lr"] == 1e-3
    assert starts[0]["config"]["environment"]["torch"] == torch.__version__
    assert package.ended == [1, 0]
    entries = [(step, values) for step, values in package.rows if "epoch" in values]
    assert [step for step, _ in entries] == [10, 20, 30]
    assert [values for _, values in entries] == log_of(tmp_path)
    assert [step for step, values in package.rows if "loss/loss" in values] == list(range(30))


@pytest.mark.parametrize("killed", [17, 20])
def test_trackio_is_told_of_no_step_twice(tmp_path, monkeypatch, killed):
    # Killed within an epoch, after the checkpoint of step 14 or where the epoch is saved.
    monkeypatch.setitem(sys.modules, "trackio", package := TrackioPackage())

    def failing(model, batch, number):
        if number == killed:
            raise RuntimeError("killed")
        return step(model, batch, number)

    trainer = make_trainer(tmp_path, step=failing, save_last_every=7)
    trainer.report_to = [Trackio]
    with pytest.raises(RuntimeError, match="killed"):
        trainer.fit()
    trainer.folder.close()
    resumed = continued(tmp_path, save_last_every=7)
    resumed.report_to = [Trackio]
    resumed.fit()
    assert [step for step, values in package.rows if "epoch" in values] == [10, 20, 30]
    assert [step for step, values in package.rows if "loss/loss" in values] == list(range(30))


def test_a_run_that_starts_over_is_another_one(tmp_path, package):
    for _ in range(2):
        trainer = tracked(tmp_path)
        package.rows.clear()
        trainer.fit()
        trainer.folder.close()
    assert len(package.runs) == 2
    assert len(list(tmp_path.glob("wandb_run-until-*.txt"))) == 1


def test_a_picture_comes_where_its_epoch_ends(tmp_path, package):
    trainer = tracked(tmp_path)
    trainer.on_epoch_end = lambda epoch, shown: shown.write_image("one", torch.full((3, 4, 5), epoch / 2), epoch)
    trainer.fit()
    pictures = [(step, values["one"]) for step, values in package.rows if "one" in values]
    assert [(step, picture.size, picture.getpixel((0, 0))[0]) for step, picture in pictures] == [
        (10, (5, 4), 0),
        (20, (5, 4), 127),
        (30, (5, 4), 255),
    ]


def test_other_processes_than_the_main_one_tell_nothing(monkeypatch, package):
    monkeypatch.setattr(trackers.distributed, "on_main", lambda action: None)
    tracked(None).fit()
    assert not package.runs


def test_what_is_missing_is_said_in_one_line(monkeypatch, package, tmp_path):
    monkeypatch.setattr(base, "find_spec", lambda name: None if name == "trackio" else name)
    with pytest.raises(InputError, match="--report_to trackio needs trackio: pip install trackio"):
        trackers_of(RunOptions(report_to=("trackio",)))
    with pytest.raises(InputError, match="--report_to tensorboard needs --log_dir"):
        trackers_of(RunOptions(report_to=("tensorboard",)))

    def init(**_):
        raise ValueError("No API key configured")

    monkeypatch.setattr(package, "init", init)
    with pytest.raises(InputError, match="--report_to wandb: No API key configured"):
        tracked(tmp_path).fit()


@pytest.mark.slow  # five whole jobs
@pytest.mark.parametrize("job", ["pretraining", "finetuning", "linear_probe", "dvae_training", "segmentation"])
def test_every_job_reports(job, tmp_path, monkeypatch, package):
    monkeypatch.setitem(TRACKERS, "wandb", WandB)
    monkeypatch.setattr(base, "find_spec", lambda name: name)
    write_images(tmp_path)
    command, arguments = commands(tmp_path)[job]
    flags = ("--output_dir", tmp_path / "run", "--report_to", "wandb")
    assert command([str(argument) for argument in (*arguments, *flags)]) == 0
    told = [values for _, values in package.rows if "epoch" in values]
    assert told == [{k: v for k, v in entry.items() if k != "step"} for entry in log_of(tmp_path / "run")]


def wandb_records(path):
    """Yields the records of an offline run: LevelDB's log of blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, or the last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


TWICE = """
import json, sys
from beit.__main__ import main
for epochs in "2", "3":
    assert main([*sys.argv[1:], "--epochs", epochs]) == 0
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("beit")
print(json.dumps([SQLiteStorage.get_run_config("beit", run), SQLiteStorage.get_logs("beit", run)], default=str))
"""


@pytest.mark.slow  # a whole command, twice, and the packages' own processes
def test_the_packages_offline(pretraining_flags, tmp_path):  # noqa: F811
    # No network, no account: what they have kept is read from their files.
    (tmp_path / "here").mkdir()
    places = {"WANDB_DIR": str(tmp_path / "here"), "TRACKIO_DIR": str(tmp_path / "trackio")}
    flags = ("--output_dir", tmp_path / "run", "--report_to", "wandb,trackio", "--log_images", 1)
    done = subprocess.run(
        [sys.executable, "-c", TWICE, "pretrain", *pretraining_flags, *map(str, flags)],
        env={**os.environ, **places, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    entries = log_of(tmp_path / "run")

    files = sorted((tmp_path / "here/wandb").glob("offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1
    assert len(files) == 2
    records = [record for file in files for record in wandb_records(file)]
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    told = [row for row in rows if "train_loss" in row]
    assert [{key: row[key] for key in entries[0]} for row in told] == entries
    assert [row["_step"] for row in told] == [5, 10, 15]
    assert [row["_step"] for row in rows if "reconstructions" in row] == [5, 10, 15]
    configs = {
        item.key: json.loads(item.value_json) for record in records for item in record.run.config.update if item.key
    }
    assert configs["batch_size"] == 8
    assert configs["environment"]["torch"] == torch.__version__

    config, logs = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    assert config["batch_size"] == 8
    assert config["environment"]["torch"] == torch.__version__
    told = [row for row in logs if "train_loss" in row]
    assert [{key: row[key] for key in entries[0]} for row in told] == entries
    assert [row["step"] for row in logs if "reconstructions" in row] == [5, 10, 15]
    assert [row["step"] for row in logs if "loss/loss" in row] == list(range(15))
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 3
