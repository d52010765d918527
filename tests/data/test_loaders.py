import logging
import multiprocessing
import os
import pickle
import signal
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit.data import loaders
from beit.data.datasets import ImageDataset, index_images
from beit.data.loaders import EpochLoader, _Batches, _start_worker
from beit.data.transforms import (
    MaskedImageModelingEvalTransform,
    MaskedImageModelingTransform,
    RandomCropTransform,
    normalize,
)
from beit.errors import InputError
from beit.masking import BlockwiseMaskGenerator
from tests.shell import run

IMAGES = 41


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i:02d}.jpg")
    return folder


@pytest.fixture
def dataset(folder, tmp_path):
    masks = BlockwiseMaskGenerator(4, 6, 2)
    return ImageDataset(
        index_images(folder, tmp_path / "cache"), MaskedImageModelingTransform(8, 8, mask_generator=masks), 1
    )


class Numbers:
    """A data set whose samples say which they are; ``action`` is called with the index first."""

    def __init__(self, size, action=None):
        self.size, self.action = size, action

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        if self.action is not None:
            self.action(key[1])
        return {"key": torch.tensor(key)}

    def name(self, index):
        return f"number {index}"


def keys(batches):
    return [tuple(key) for batch in batches for key in batch["key"].tolist()]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(ours, theirs, strict=True)
    )


# What is seen depends on the seed alone


def test_the_number_of_workers_changes_nothing(dataset):
    runs = []
    for workers in (0, 1, 2):
        loader = EpochLoader(dataset, 4, seed=5, num_workers=workers)
        runs.append([list(loader.epoch(epoch)) for epoch in (0, 1)])
        loader.close()
    assert len(runs[0][0]) == loader.batches_per_epoch == IMAGES // 4
    assert set(runs[0][0][0]) == {"image", "token_image", "mask"}
    for other in runs[1:]:
        assert all(same(ours, theirs) for ours, theirs in zip(other, runs[0], strict=True))
    assert not same(*runs[0])


def test_the_number_of_ranks_changes_nothing(dataset):
    one = list(EpochLoader(dataset, 8, seed=5).epoch(3))
    parts = [list(EpochLoader(dataset, 4, seed=5, rank=rank, world_size=2).epoch(3)) for rank in (0, 1)]
    two = [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in zip(*parts, strict=True)]
    assert same(one, two)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_at_any_batch(dataset, workers):
    loader = EpochLoader(dataset, 4, seed=5, num_workers=workers)
    whole = list(loader.epoch(2))
    for first in range(len(whole) + 1):
        assert same(list(loader.epoch(2, first)), whole[first:])
    with pytest.raises(ValueError, match="not in an epoch"):
        loader.epoch(2, len(whole) + 1)
    loader.close()


def test_the_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        return keys(EpochLoader(Numbers(50), 5, seed=seed).epoch(epoch))

    assert order(1, 2) == order(1, 2)
    indices = {tuple(index for _, index in order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(indices) == 6
    assert all(sorted(i) == list(range(50)) for i in indices)
    assert {epoch for epoch, _ in order(1, 2)} == {2}


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_the_samples_channel_by_channel(dataset, workers):
    # Fails when views leave a transform in another layout: stacking them would take longer than resizing.
    loader = EpochLoader(dataset, 4, num_workers=workers, shuffle=False)
    batch = next(loader.epoch(0))
    loader.close()
    samples = [dataset[0, i] for i in range(4)]
    assert set(batch) == {"image", "token_image", "mask"}
    for name, stacked in batch.items():
        assert stacked.is_contiguous()
        assert torch.equal(stacked, torch.stack([sample[name] for sample in samples]))
    for transform in (MaskedImageModelingTransform(8, 6, mask_generator=dataset.transform.mask_generator),
                      MaskedImageModelingEvalTransform(8, 6, mask_generator=dataset.transform.mask_generator),
                      RandomCropTransform(8)):  # fmt: skip
        image = torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8).permute(2, 0, 1)
        for view in transform(image, np.random.default_rng(1)).values():
            assert view.stride(-1) == 1


def test_what_is_computed_from_images_does_not_tell_how_they_lie_in_memory():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    other = normalize(images.contiguous(memory_format=torch.channels_last), (0.5,) * 3, (0.5,) * 3)
    assert other.is_contiguous()
    assert torch.equal(other, normalize(images, (0.5,) * 3, (0.5,) * 3))


def test_a_data_set_that_makes_several_samples_at_once_is_asked_for_them():
    class Several(Numbers):
        def __getitems__(self, keys):
            asked.append(list(keys))
            return [self[key] for key in keys]

    asked = []
    batches = list(EpochLoader(Several(6), 3, shuffle=False).epoch(2))
    assert asked == [[(2, 0), (2, 1), (2, 2)], [(2, 3), (2, 4), (2, 5)]]
    assert [batch["key"][:, 1].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5]]


def test_loading_draws_nothing_from_the_global_generator(dataset):
    # If it did, dropout after a resume in the middle of an epoch would differ from dropout without a stop.
    before = torch.get_rng_state()
    for workers in (0, 1):
        loader = EpochLoader(dataset, 4, num_workers=workers)
        next(loader.epoch(0))
        loader.close()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [1, 7, 12, 13])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_evaluation_sees_every_image_once(size, ranks):
    loaders = [
        EpochLoader(Numbers(size), 3, rank=rank, world_size=ranks, shuffle=False, drop_last=False)
        for rank in range(ranks)
    ]
    batches = [list(loader.epoch(0)) for loader in loaders]
    assert [len(b) for b in batches] == [loader.batches_per_epoch for loader in loaders]
    assert sorted(keys(batch for rank in batches for batch in rank)) == [(0, i) for i in range(size)]


def test_without_shuffling_the_order_is_the_data_sets():
    assert keys(EpochLoader(Numbers(7), 3, shuffle=False, drop_last=False).epoch(4)) == [(4, i) for i in range(7)]


@pytest.mark.parametrize(
    ("size", "batch", "ranks", "advice"),
    [
        (7, 8, 1, "batch size 8 on 1 process exceeds .* lower --batch_size"),
        (7, 4, 2, "lower --batch_size to at most 3"),
        (3, 1, 4, "fewer processes"),
    ],
)
def test_more_than_the_data_set_is_refused(size, batch, ranks, advice):
    with pytest.raises(InputError, match=advice):
        EpochLoader(Numbers(size), batch, world_size=ranks)


# Unreadable files


def broken(folder, tmp_path, names):
    """A copy of the images in which some are damaged."""
    for path in folder.iterdir():
        content = b"damaged" if path.name in names else path.read_bytes()
        (tmp_path / path.name).write_bytes(content)
    masks = BlockwiseMaskGenerator(4, 6, 2)
    transform = MaskedImageModelingTransform(8, 8, mask_generator=masks)
    return ImageDataset(index_images(tmp_path, tmp_path / ".cache"), transform, 1)


def test_unreadable_files_are_named_once_and_replaced_alike(folder, tmp_path, caplog):
    dataset = broken(folder, tmp_path, {"03.jpg", "17.jpg"})
    runs = []
    for workers in (0, 2):
        caplog.clear()
        loader = EpochLoader(dataset, 4, num_workers=workers)
        with caplog.at_level(logging.WARNING):
            runs.append([batch for epoch in range(4) for batch in loader.epoch(epoch)])
        loader.close()
        assert sorted(loader.unreadable) == [3, 17]
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 2
        assert any("17.jpg (not an image" in message for message in messages)
    assert set(runs[0][0]) == {"image", "token_image", "mask"}  # no bookkeeping in the batches
    assert same(*runs)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_files_end_the_run(folder, tmp_path, workers):
    dataset = broken(folder, tmp_path, {f"{i:02d}.jpg" for i in range(0, 24, 2)})
    loader = EpochLoader(dataset, 4, num_workers=workers)
    assert loader.max_unreadable == 10  # 1 % of 41 would be none
    with pytest.raises(InputError, match=r"of 41 images cannot be read, more than the 10.*\.jpg") as caught:
        [list(loader.epoch(epoch)) for epoch in range(3)]
    assert "\n" not in str(caught.value)
    loader.close()
    patient = EpochLoader(dataset, 4, max_unreadable=12)
    assert len(list(patient.epoch(0))) == 10
    assert EpochLoader(Numbers(5000), 4).max_unreadable == 50


# Workers


def fail_at_9(index):
    if index == 9:
        raise KeyError("nine")


def mistake_at_9(index):
    if index == 9:
        raise InputError("nothing can be read")


def die_at_9(index):
    if index == 9:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_in_a_worker_arrives(workers):
    loader = EpochLoader(Numbers(20, fail_at_9), 2, num_workers=workers, shuffle=False)
    with pytest.raises(KeyError, match="nine"):
        list(loader.epoch(0))
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_mistake_in_a_worker_stays_one_line(workers):
    # PyTorch wraps what a worker raises in a traceback as text.
    loader = EpochLoader(Numbers(20, mistake_at_9), 2, num_workers=workers, shuffle=False)
    with pytest.raises(InputError, match=r"^nothing can be read$"):
        list(loader.epoch(0))
    loader.close()


@pytest.mark.slow
def test_a_killed_worker_is_one_clear_error_and_the_loader_lives_on():
    loader = EpochLoader(Numbers(20, die_at_9), 2, num_workers=2, shuffle=False)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"a data loading process died \(SIGKILL\).*memory.*--num_workers") as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 20
    assert keys(loader.epoch(0, 5)) == [(0, i) for i in range(10, 20)]
    loader.close()


@pytest.mark.slow
def test_a_killed_worker_does_not_interrupt_what_the_main_process_does():
    # PyTorch's handler of SIGCHLD raises at any line of the main program, such as in the middle of a save.
    loader = EpochLoader(Numbers(20), 2, num_workers=2)
    epoch = loader.epoch(0)
    next(epoch)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(0.3)
    sum(range(1000))
    with pytest.raises(InputError, match="SIGKILL"):
        list(epoch)


def test_an_epoch_that_is_left_leaves_nothing_behind():
    loader = EpochLoader(Numbers(40), 2, num_workers=2, shuffle=False)
    left = loader.epoch(0)
    next(left)  # by now the workers have prepared further batches of epoch 0
    assert keys(loader.epoch(1)) == [(1, i) for i in range(40)]
    with pytest.raises(RuntimeError, match="has ended"):
        next(left)
    unborn = loader.epoch(2)
    loader.epoch(3)
    with pytest.raises(RuntimeError, match="has ended"):
        next(unborn)
    loader.close()


def test_workers_persist_and_end_with_the_loader():
    loader = EpochLoader(Numbers(40), 2, num_workers=2)
    list(loader.epoch(0))
    workers = {process.pid for process in multiprocessing.active_children()}
    list(loader.epoch(1))
    assert {process.pid for process in multiprocessing.active_children()} == workers
    assert len(workers) == 2
    del loader  # without waiting for the garbage collector
    assert not workers & {process.pid for process in multiprocessing.active_children()}


def test_a_signal_to_all_processes_does_not_take_the_workers():
    # A scheduler sends SIGTERM to every process; the main one still wants to end its epoch and save.
    loader = EpochLoader(Numbers(40), 2, num_workers=2, shuffle=False)
    epoch = loader.epoch(0)
    batches = [next(epoch)]
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
    batches += epoch
    assert keys(batches) == [(0, i) for i in range(40)]
    loader.close()


@pytest.mark.slow
def test_a_signal_to_workers_that_have_just_started_waits_until_they_are_ready(monkeypatch):
    # Breaks if signals are not held back while workers start: they would end the ones that have no handler yet.
    ready = _start_worker

    def slow_start(worker):
        time.sleep(0.5)
        ready(worker)

    monkeypatch.setattr("beit.data.loaders._start_worker", slow_start)
    loader = EpochLoader(Numbers(12), 2, num_workers=2, shuffle=False)
    killer = threading.Timer(0.2, lambda: [os.kill(p.pid, signal.SIGINT) for p in multiprocessing.active_children()])
    killer.start()
    assert keys(loader.epoch(0)) == [(0, i) for i in range(12)]
    killer.join()
    loader.close()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}


def threads_of_worker(index):
    assert torch.get_num_threads() == 1


def test_workers_use_one_thread():
    loader = EpochLoader(Numbers(4, threads_of_worker), 2, num_workers=1)
    assert len(list(loader.epoch(0))) == 2
    loader.close()


def test_what_workers_get_can_be_sent_to_a_fresh_process(dataset):
    # As spawn and forkserver do; a lambda or an open file in the data set would fail.
    fetched, _ = pickle.loads(pickle.dumps(_Batches(dataset))).__getitems__([(0, 1), (0, 2)])
    assert torch.equal(fetched["image"][0], dataset[0, 1]["image"])


@pytest.mark.slow
def test_spawned_workers(dataset):
    expected = list(EpochLoader(dataset, 20).epoch(0))
    loader = EpochLoader(dataset, 20, num_workers=1, multiprocessing_context="spawn")
    assert same(list(loader.epoch(0)), expected)
    loader.close()


def run_script(body):
    script = f"""
        import multiprocessing, os, signal, torch, warnings
        warnings.simplefilter("ignore")  # torch's, that two workers are many for one core
        from beit.data.loaders import EpochLoader
        class Numbers:
            __len__ = lambda self: 40
            __getitem__ = lambda self, key: {{"key": torch.tensor(key)}}
        loader = EpochLoader(Numbers(), 2, num_workers=2)
        epoch = loader.epoch(0)
        next(epoch)
        print(*[process.pid for process in multiprocessing.active_children()], flush=True)
        {body}
    """
    return run("-c", textwrap.dedent(script), check=False, timeout=60)


@pytest.mark.slow
def test_a_program_that_ends_in_the_middle_of_an_epoch_ends():
    # Workers that ignored every SIGTERM made it wait for them for ever.
    result = run_script("")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert not any(alive(int(pid)) for pid in result.stdout.split())


@pytest.mark.slow
def test_workers_of_a_killed_program_end():
    result = run_script("os.kill(os.getpid(), signal.SIGKILL)")
    pids = [int(pid) for pid in result.stdout.split()]
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def alive(pid):
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_workers_that_hang_are_told_and_do_not_outlive_a_wish_to_stop(caplog, monkeypatch):
    # Breaks if the loader waits without a look at the clock: no signal could end such a run.
    class Wish(Exception):
        pass

    def hang(index):
        while index == 12:
            time.sleep(60)

    def stop():
        if "no data for 2 s" in caplog.text:
            raise Wish

    monkeypatch.setattr(loaders, "LOOK_EVERY", 1)
    monkeypatch.setattr(loaders, "TELL_EVERY", 1)
    loader = EpochLoader(Numbers(40, hang), 4, num_workers=1, shuffle=False, while_waiting=stop)
    batches = loader.epoch(0)
    assert len([next(batches) for _ in range(3)]) == 3
    (worker,) = loader._workers
    with pytest.raises(Wish):
        next(batches)
    loader.close()
    assert worker.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_workers_that_are_stopped_between_two_epochs_are_told(caplog, monkeypatch):
    # Breaks if the loader waits for what workers answer at the start of an epoch without a look at the clock.
    class Wish(Exception):
        pass

    def stop():
        if "no data for 1 s" in caplog.text:
            raise Wish

    monkeypatch.setattr(loaders, "LOOK_EVERY", 0.5)
    monkeypatch.setattr(loaders, "TELL_EVERY", 0.6)
    loader = EpochLoader(Numbers(8), 4, num_workers=1, while_waiting=stop)
    assert len(keys(loader.epoch(0))) == 8
    (worker,) = loader._workers
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(Wish):
        next(loader.epoch(1))
    loader.close()
    assert worker.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_an_epoch_begins_when_workers_are_done_with_the_one_before(monkeypatch):
    # Breaks if the reset of workers that stay times out: a batch that nobody waits for may take long.
    monkeypatch.setattr(loaders, "LOOK_EVERY", 1)
    loader = EpochLoader(Numbers(12, lambda index: index == 9 and time.sleep(2)), 4, num_workers=1, shuffle=False)
    next(loader.epoch(0))
    assert len(keys(loader.epoch(1))) == 12
    loader.close()


@pytest.mark.slow
def test_no_shared_memory_is_one_line():
    def fail(_index):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    loader = EpochLoader(Numbers(8, fail), 4, num_workers=1)
    with pytest.raises(InputError, match="--shm-size"):
        list(loader.epoch(0))
