"""The run folder: locking, what is kept, what a run continues from."""

import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch
from torch import nn

from beit.errors import InputError
from beit.storage import position_of, save_checkpoint
from beit.training.checkpoint import BEST, LAST, RunFolder, load_exactly, newest_checkpoint, numbered_file


def hold(folder, with_child=False):
    """Starts a process that locks the folder and, if asked to, forks a child that outlives it as workers may."""

    def work():
        os.setsid()
        run_folder = RunFolder(folder)
        if with_child and not os.fork():
            time.sleep(60)
        ready.set()
        time.sleep(60)
        run_folder.close()

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=work)
    process.start()
    assert ready.wait(60)
    return process


def test_two_runs_cannot_share_a_folder(tmp_path):
    process = hold(tmp_path)
    try:
        with pytest.raises(InputError, match=f"in use by process {process.pid}"):
            RunFolder(tmp_path)
    finally:
        process.kill()
        process.join()


def test_a_killed_run_leaves_no_lock_even_while_its_workers_live(tmp_path):
    # Breaks with flock(), which forked children keep alive.
    process = hold(tmp_path, with_child=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        RunFolder(tmp_path).close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to --output_dir"):
        RunFolder(tmp_path / "file" / "run")


def test_every_epoch_is_kept_by_default_and_the_newest_when_limited(tmp_path):
    folder = RunFolder(tmp_path / "all")
    for epoch in (0, 9, 10):  # 9 before 10: by number, not by name
        folder.save(numbered_file(epoch), {"epoch": epoch})
    assert sorted(p.name for p in folder.path.glob("*.pth")) == [
        "checkpoint-0.pth",
        "checkpoint-10.pth",
        "checkpoint-9.pth",
    ]
    limited = RunFolder(tmp_path / "limited", keep=2)
    for epoch in (8, 9, 10):
        limited.save(numbered_file(epoch), {"epoch": epoch})
    assert sorted(p.name for p in limited.path.glob("*.pth")) == ["checkpoint-10.pth", "checkpoint-9.pth"]


def test_newest_is_the_one_that_got_furthest(tmp_path):
    folder = RunFolder(tmp_path)
    assert newest_checkpoint(folder.path) is None
    folder.save(LAST, {"optimizer": {}, "progress": {"epoch": 2, "step": 5}})
    folder.save(numbered_file(1), {"optimizer": {}, "progress": {"epoch": 2, "step": 0}})
    assert newest_checkpoint(folder.path).name == LAST
    time.sleep(0.01)
    folder.save(numbered_file(2), {"optimizer": {}, "progress": {"epoch": 3, "step": 0}})
    assert newest_checkpoint(folder.path).name == "checkpoint-2.pth"


def test_a_damaged_checkpoint_is_passed_over_and_two_are_not_silently_overwritten(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    folder.save(numbered_file(0), {"optimizer": {}, "epoch": 0})
    (tmp_path / LAST).write_bytes(b"PK\x03\x04 cut off")
    assert newest_checkpoint(folder.path).name == "checkpoint-0.pth"
    assert "checkpoint-last.pth" in caplog.text
    (tmp_path / "checkpoint-0.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read"):
        newest_checkpoint(folder.path)


def test_every_older_checkpoint_is_tried_and_the_best_one_too(tmp_path):
    # Breaks if only the newest few are looked at, or a short run that has only its best file starts again.
    folder = RunFolder(tmp_path)
    folder.save(BEST, {"optimizer": {}, "progress": {"epoch": 1, "step": 0}})
    folder.save(numbered_file(0), {"optimizer": {}, "progress": {"epoch": 1, "step": 0}})
    for name in (LAST, *map(numbered_file, range(1, 5))):
        folder.save(name, {"progress": {}})
    assert newest_checkpoint(tmp_path).name == "checkpoint-0.pth"
    (tmp_path / "checkpoint-0.pth").unlink()
    assert newest_checkpoint(tmp_path).name == BEST
    folder.save(BEST, {"model": {}})  # no training state: nothing to go on from
    with pytest.raises(InputError, match="can be read"):
        newest_checkpoint(tmp_path)


def test_a_folder_that_was_deleted_is_made_again_with_its_records(tmp_path, caplog):
    folder = RunFolder(tmp_path / "run")
    folder.record("config.yaml", b"lr: 1\n")
    shutil.rmtree(tmp_path / "run")
    folder.save(numbered_file(0), {"epoch": 0})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.yaml", "checkpoint-0.pth"}
    assert "was deleted or moved away" in caplog.text
    (tmp_path / "run").rename(tmp_path / "moved")
    folder.ensure()
    assert (tmp_path / "run" / "config.yaml").read_bytes() == b"lr: 1\n"
    folder.record("config.yaml", b"lr: 2\n")
    (older,) = (tmp_path / "run").glob("config-until-*.yaml")
    assert older.read_bytes() == b"lr: 1\n"


def test_position_of_ours_and_of_official_files():
    assert position_of({"epoch": 0, "progress": {"epoch": 1, "step": 7}}) == (1, 7)
    assert position_of({"epoch": 19}) == (20, 0)


def test_weights_of_another_model_are_refused_with_what_differs(tmp_path):
    save_checkpoint(tmp_path / "a.pth", nn.Linear(3, 2).state_dict())
    weights = torch.load(tmp_path / "a.pth", weights_only=True)
    load_exactly(nn.Linear(3, 2), weights, "a.pth")
    with pytest.raises(InputError) as caught:
        load_exactly(nn.Linear(4, 2, bias=False), weights, "a.pth")
    assert "a.pth is a checkpoint of another model: 2 of 2 tensors differ" in str(caught.value)
    assert "weight (2, 3) in the file, (2, 4) in the model" in str(caught.value)
    assert "bias (2,) in the file, absent in the model" in str(caught.value)


def piece_folder(root, name):
    (root / name).mkdir()
    (root / name / ".metadata").touch()


def test_a_checkpoint_without_its_folder_is_passed_over(tmp_path, caplog):
    # Breaks if only the .pth is looked at: the run would prefer a file that cannot be resumed, for ever.
    folder = RunFolder(tmp_path)
    piece_folder(tmp_path, "checkpoint-0")
    folder.save("checkpoint-0.pth", {"epoch": 0, "pieces": "checkpoint-0"})
    folder.save(LAST, {"progress": {"epoch": 1, "step": 3}, "pieces": "checkpoint-last-7"})
    assert newest_checkpoint(folder.path).name == "checkpoint-0.pth"
    assert "checkpoint-last-7, which is missing" in caplog.text
    (tmp_path / "checkpoint-last-7").mkdir()
    assert newest_checkpoint(folder.path).name == "checkpoint-0.pth"
    assert "checkpoint-last-7, which lacks .metadata" in caplog.text


def test_only_what_keep_removes_and_old_rolling_folders_go(tmp_path):
    # Breaks if folders stay behind their .pth, or if one goes whose .pth the user has moved away.
    folder = RunFolder(tmp_path, keep=1)
    for name in ("checkpoint-0", "checkpoint-1-2", "checkpoint-5", "checkpoint-last-4", "checkpoint-last-4-2"):
        piece_folder(tmp_path, name)
    folder.save("checkpoint-0.pth", {"epoch": 0, "pieces": "checkpoint-0"})
    folder.save("checkpoint-1.pth", {"epoch": 1, "pieces": "checkpoint-1-2"})
    folder.save(LAST, {"epoch": 1, "pieces": "checkpoint-last-4-2"})
    left = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert left == ["checkpoint-1-2", "checkpoint-5", "checkpoint-last-4-2"]
    folder.save("checkpoint-2.pth", {"epoch": 2})  # a run that goes on without --shard
    folder.save(LAST, {"epoch": 2})
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-5"]
