"""The loop on a small network: whatever stops it, it ends with the same bits."""

import json
import math
import os
import signal
from itertools import islice

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from beit.errors import InputError
from beit.storage import load_checkpoint, save_checkpoint
from beit.training import loop
from beit.training.checkpoint import BEST, BEST_EMA, LAST, RunFolder, newest_checkpoint
from beit.training.loop import NonFiniteLossError, Stopped, Trainer
from beit.training.optim import create_optimizer, parameter_groups
from beit.training.precision import Precision, resolve_amp_dtype
from beit.training.schedules import WarmupCosine
from beit.training.state import LoopSettings, Period

CPU = torch.device("cpu")
NO_EPOCH, NO_STEPS = {"epoch": None, "step": 0}, {"epoch": 1, "step": 5, "steps_per_epoch": 0}
SAMPLES, EPOCHS = 40, 3


class Batches:
    """40 samples whose order depends on the epoch."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.batches_per_epoch = SAMPLES // batch_size
        self._data = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(0))

    def epoch(self, epoch, first_batch=0):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
        for indices in order.split(self.batch_size)[first_batch:]:
            yield {"x": self._data[indices]}


class Interrupted(Exception):
    pass


def network(dropout=0.2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))


def step(model, batch, _step):
    loss = (model(batch["x"]) - batch["x"]).square().mean()
    return loss, {"rmse": loss.detach().sqrt()}


def make_trainer(folder, *, batch_size=4, update_freq=1, model=None, step=step, **settings):
    model = model or network()
    batches = Batches(batch_size)
    epoch = batches.batches_per_epoch // update_freq
    defaults = {"period": Period("epoch", epoch), "save_every": epoch, "evaluate_every": epoch, "log_every": 3}
    return Trainer(
        model=model,
        step=step,
        loader=batches,
        optimizer=create_optimizer("adamw", parameter_groups(model, 0.05), lr=1e-2),
        precision=Precision(torch.float32, CPU),
        settings=LoopSettings(
            total_steps=EPOCHS * epoch, update_freq=update_freq, clip_grad=1.0, **{**defaults, **settings}
        ),
        lr=WarmupCosine(1e-2, 1e-4, EPOCHS * epoch, 5),
        folder=RunFolder(folder) if folder else None,
        ema=ModelEmaV3(model, decay=0.9),
    )


def continued(folder, **options):
    trainer = make_trainer(folder, **options)
    newest = newest_checkpoint(trainer.folder.path)
    if newest is not None:
        trainer.resume(load_checkpoint(newest), str(newest))
    return trainer


def final_state(folder):
    state = load_checkpoint(folder / f"checkpoint-{EPOCHS - 1}.pth")
    return [*state["model"].values(), *state["model_ema"].values(), *state["optimizer"]["state"][0].values()]


def log_lines(folder):
    timing = ("images_per_second", "data_wait")
    entries = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key not in timing} for entry in entries]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer = make_trainer(folder)
    trainer.fit()
    trainer.folder.close()
    return folder


@pytest.mark.parametrize("stop_at", [0, 1, 4, 9, 10, 11, 17, 29])
def test_stopped_at_any_step_it_ends_with_the_same_bits_and_the_same_log(tmp_path, undisturbed, stop_at):
    # Breaks if dropout's generator, the averages, the EMA or the position are lost, or an epoch is logged twice.
    done = []

    def interrupted_step(model, batch, global_step):
        if global_step == stop_at and not done:
            done.append(global_step)
            raise Interrupted
        return step(model, batch, global_step)

    trainer = make_trainer(tmp_path, step=interrupted_step, save_last_every=2)
    with pytest.raises(Interrupted):
        trainer.fit()
    trainer.folder.close()
    trainer = continued(tmp_path, save_last_every=2)
    trainer.fit()
    assert all(torch.equal(a, b) for a, b in zip(final_state(tmp_path), final_state(undisturbed), strict=True))
    assert log_lines(tmp_path) == log_lines(undisturbed)


def signalled_at(number, at=13, times=1):
    def signalled_step(model, batch, global_step):
        if global_step == at:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return step(model, batch, global_step)

    return signalled_step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_the_next_run_goes_on(tmp_path, undisturbed, number):
    trainer = make_trainer(tmp_path, step=signalled_at(number))
    with pytest.raises(Stopped, match="epoch 1, step 4; the same command resumes") as caught:
        trainer.fit()
    assert caught.value.signal == number
    trainer.folder.close()
    assert load_checkpoint(tmp_path / LAST)["progress"]["global_step"] == 14
    trainer = continued(tmp_path)
    trainer.fit()
    assert all(torch.equal(a, b) for a, b in zip(final_state(tmp_path), final_state(undisturbed), strict=True))


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    def train(**options):
        trainer = make_trainer(None, model=network(dropout=0.0).double(), **options)
        trainer.loader._data = trainer.loader._data.double()
        trainer.fit()
        return [p.detach() for p in trainer.model.parameters()]

    for ours, large in zip(train(batch_size=2, update_freq=4), train(batch_size=8), strict=True):
        torch.testing.assert_close(ours, large, rtol=1e-9, atol=1e-12)


def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_last_checkpoint(tmp_path):
    def bad_step(model, batch, global_step):
        loss, metrics = step(model, batch, global_step)
        return (loss * math.nan if global_step == 17 else loss), metrics

    trainer = make_trainer(tmp_path, step=bad_step, log_every=5, save_last_every=1000)
    with pytest.raises(NonFiniteLossError, match="nan at step 17"):
        trainer.fit()
    state = load_checkpoint(tmp_path / "checkpoint-0.pth")
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert not (tmp_path / "checkpoint-1.pth").exists()


def test_gradients_that_are_not_finite_end_the_run_before_it_is_saved(tmp_path):
    # The loss of the step is finite; what it does to the weights is not.
    def bad_step(model, batch, global_step):
        loss, metrics = step(model, batch, global_step)
        poison = (model[0].weight.sum() * 0.0).square().sqrt()  # its value is 0, its gradient 0 / 0
        return (loss + poison if global_step == 13 else loss), metrics

    trainer = make_trainer(tmp_path, step=bad_step, save_last_every=2)
    with pytest.raises(NonFiniteLossError, match="gradients are not finite at step 13"):
        trainer.fit()
    state = load_checkpoint(tmp_path / LAST)
    assert state["progress"]["global_step"] == 12
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_float16_may_skip_an_update_but_not_for_ever(monkeypatch):
    trainer = make_trainer(None)
    trainer.precision.dtype = torch.float16
    for _ in range(49):
        trainer._count_overflow(0, math.inf)
    trainer._count_overflow(1, 1.0)
    for _ in range(49):
        trainer._count_overflow(2, math.inf)
    assert trainer._skipped_steps == 98
    with pytest.raises(NonFiniteLossError, match="50 times in a row"):
        trainer._count_overflow(3, math.inf)


def test_another_optimizer_cannot_go_on_and_new_settings_count(tmp_path):
    state = make_trainer(None)._state(10)
    trainer = make_trainer(None)
    trainer.optimizer = create_optimizer("sgd", parameter_groups(trainer.model, 0.05), lr=1e-2)
    with pytest.raises(InputError, match=r"AdamW.*SGD"):
        trainer.resume(state, "a.pth")
    trainer = make_trainer(None)
    trainer.optimizer = create_optimizer("adamw", parameter_groups(trainer.model, 0.1), lr=1e-2, betas=(0.5, 0.6))
    trainer.resume(state, "a.pth")
    assert trainer.optimizer.param_groups[0]["betas"] == (0.5, 0.6)
    assert trainer.optimizer.param_groups[0]["decays"] is True


def test_a_smaller_data_set_resumes_within_its_epoch(caplog):
    state = make_trainer(None)._state(19)
    trainer = make_trainer(None, period=Period("epoch", 6))
    trainer.resume(state, "a.pth")
    assert trainer.first_step == 11  # 9 of 10 steps are 5 of 6
    assert "steps_per_epoch went from 10 to 6" in caplog.text


def test_checkpoint_holds_the_official_keys_and_opens_without_code(undisturbed):
    state = torch.load(undisturbed / "checkpoint-2.pth", weights_only=True)
    assert {"model", "optimizer", "epoch", "scaler", "args", "model_ema"} <= state.keys()
    assert state["epoch"] == 2
    assert type(state["args"]) is dict


def test_log_holds_means_over_the_epoch(undisturbed):
    entries = log_lines(undisturbed)
    assert [entry["epoch"] for entry in entries] == [0, 1, 2]
    schedule = WarmupCosine(1e-2, 1e-4, 30, 5)
    assert entries[1]["train_lr"] == pytest.approx(sum(schedule(step) for step in range(10, 20)) / 10)
    assert {"train_loss", "train_rmse", "train_grad_norm", "train_min_lr", "train_weight_decay"} <= entries[0].keys()
    assert entries[0]["n_parameters"] == sum(p.numel() for p in network().parameters())
    assert entries[2]["train_loss"] < entries[0]["train_loss"]


def test_a_run_that_starts_over_keeps_the_old_log_aside(tmp_path):
    for _ in range(2):
        trainer = make_trainer(tmp_path)
        trainer.fit()
        trainer.folder.close()
    assert [entry["epoch"] for entry in log_lines(tmp_path)] == [0, 1, 2]
    assert len(list(tmp_path.glob("log-until-*.txt"))) == 1


def test_half_a_line_left_by_a_kill_is_dropped(tmp_path, undisturbed):
    trainer = make_trainer(tmp_path)
    trainer.fit()
    trainer.folder.close()
    (tmp_path / "checkpoint-2.pth").unlink()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    (tmp_path / "log.txt").write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])
    continued(tmp_path).fit()
    assert log_lines(tmp_path) == log_lines(undisturbed)


def test_another_batch_goes_on_at_the_same_share_of_the_epoch(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    state = make_trainer(None)._state(15)
    folder.save(LAST, state)
    folder.close()
    trainer = continued(tmp_path, batch_size=10)
    assert trainer.first_step == 4 + 2  # 20 of 40 samples of the second epoch done
    assert "images_per_step went from 4 to 10" in caplog.text


def test_weights_alone_cannot_be_resumed():
    with pytest.raises(InputError, match="--init_from"):
        make_trainer(None).resume({"model": network().state_dict()}, "weights.pth")


def test_tensorboard_gets_the_official_tags(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(None)
    trainer.log_dir = str(tmp_path)
    trainer.fit()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"loss/loss", "loss/rmse", "opt/lr", "opt/grad_norm", "opt/loss_scale"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss/loss")] == list(range(30))


def test_number_format_by_device():
    assert resolve_amp_dtype("auto", CPU) is torch.float32
    assert resolve_amp_dtype("bf16", CPU) is torch.bfloat16
    with pytest.raises(InputError, match="needs a CUDA device"):
        resolve_amp_dtype("fp16", CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_host_synchronisation_between_log_lines(dtype):
    # Breaks if a step reads a value off the device: synchronising calls raise here.
    device = torch.device("cuda", 0)
    trainer = make_trainer(None, model=network().to(device))
    trainer.precision = Precision(dtype, device)
    trainer._device = device
    trainer.optimizer = create_optimizer("adamw", parameter_groups(trainer.model, 0.05), lr=1e-2, fused=True)
    from beit.training.logging import Throughput

    trainer._throughput = Throughput(4)
    batches = trainer.loader.epoch(0)
    trainer._optimizer_step(trainer.model, batches, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for global_step in range(1, 4):
            trainer._optimizer_step(trainer.model, batches, global_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def evaluated(scores):
    """An evaluation whose accuracy is the given one of each epoch; the average's is another one."""

    def evaluate(model, epoch):
        weights, of_average = scores[epoch]
        return {"acc1": weights if model.training else of_average}  # timm keeps the average in evaluation mode

    return evaluate


SCORES = [(20.0, 5.0), (30.0, 4.0), (30.0, 6.0)]


BEST_KEPT = {"best_metric": "acc1", "evaluate_average": True}


def best_files(folder):
    state = load_checkpoint(folder / BEST)
    return [*state["model"].values(), *load_checkpoint(folder / BEST_EMA)["model"].values()]


def test_the_best_epoch_is_kept_and_the_average_s_best_apart(tmp_path):
    # Breaks if a later epoch that is no better replaces it, or the two files swap weights.
    trainer = make_trainer(tmp_path, **BEST_KEPT)
    trainer.evaluate = evaluated(SCORES)
    trainer.fit()
    best, best_ema = load_checkpoint(tmp_path / BEST), load_checkpoint(tmp_path / BEST_EMA)
    second, third = load_checkpoint(tmp_path / "checkpoint-1.pth"), load_checkpoint(tmp_path / "checkpoint-2.pth")
    assert (best["epoch"], best_ema["epoch"]) == (1, 2)
    assert all(torch.equal(best["model"][name], tensor) for name, tensor in second["model"].items())
    assert all(torch.equal(best_ema["model"][name], tensor) for name, tensor in third["model_ema"].items())
    assert "optimizer" not in best_ema
    entry = log_lines(tmp_path)[2]
    assert (entry["test_acc1"], entry["test_ema_acc1"]) == (30.0, 6.0)


@pytest.mark.parametrize("kill_at", [1, 2, 3, 4, 5, 6])
def test_killed_at_any_write_the_best_files_are_the_same(tmp_path, monkeypatch, kill_at):
    def train(folder, interrupt=False):
        trainer = continued(folder, **BEST_KEPT)
        trainer.evaluate = evaluated(SCORES)
        saved = []

        def save(path, state):
            saved.append(path)
            if interrupt and len(saved) == kill_at:
                raise Interrupted
            save_checkpoint(path, state)

        monkeypatch.setattr("beit.training.checkpoint.save_checkpoint", save)
        try:
            trainer.fit()
        finally:
            trainer.folder.close()

    train(tmp_path / "undisturbed")
    with pytest.raises(Interrupted):
        train(tmp_path / "killed", interrupt=True)
    train(tmp_path / "killed")
    pairs = zip(best_files(tmp_path / "killed"), best_files(tmp_path / "undisturbed"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert log_lines(tmp_path / "killed") == log_lines(tmp_path / "undisturbed")


def test_a_run_that_saves_nothing_still_logs(tmp_path):
    trainer = make_trainer(tmp_path, save=False, save_last_every=2, **BEST_KEPT)
    trainer.evaluate = evaluated(SCORES)
    trainer.fit()
    assert len(log_lines(tmp_path)) == 3
    assert list(tmp_path.glob("*.pth")) == []


def test_an_average_switched_on_at_a_resume_begins_with_the_weights(tmp_path):
    trainer = make_trainer(None)
    trainer.fit()
    state = trainer._state(2, 10)
    del state["model_ema"]
    resumed = make_trainer(None)
    resumed.resume(state, "state")
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in resumed.ema.module.state_dict().items())


def test_a_scaled_run_goes_on_with_its_loss_scale(tmp_path):
    # Breaks if the scaler's state is left out of the checkpoint: the scale would start again at 65536.
    def scaled_trainer(folder, step=step):
        trainer = make_trainer(folder, step=step, save_last_every=2)
        trainer.precision = Precision(torch.float16, CPU)
        trainer.precision.scaler.set_growth_interval(4)
        return trainer

    def interrupted_step(model, batch, global_step):
        if global_step == 13:
            raise Interrupted
        return step(model, batch, global_step)

    whole = scaled_trainer(tmp_path / "whole")
    whole.fit()
    killed = scaled_trainer(tmp_path / "killed", interrupted_step)
    with pytest.raises(Interrupted):
        killed.fit()
    killed.folder.close()
    continued_run = scaled_trainer(tmp_path / "killed")
    newest = newest_checkpoint(continued_run.folder.path)
    continued_run.resume(load_checkpoint(newest), str(newest))
    assert continued_run.precision.loss_scale > 65536  # it has grown on the way
    continued_run.fit()
    assert whole.precision.loss_scale == continued_run.precision.loss_scale
    ours, theirs = log_lines(tmp_path / "killed"), log_lines(tmp_path / "whole")
    for entry in (*ours, *theirs):
        del entry["train_loss_scale"]  # read off the device at each look, and the looks fall on other steps
    assert ours == theirs
    ours, theirs = final_state(tmp_path / "killed"), final_state(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_signal_that_is_ignored_stays_ignored_and_the_second_ctrl_c_ends_at_once(tmp_path, undisturbed):
    # Breaks under nohup, if the run would end with its terminal.
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = make_trainer(tmp_path / "ignored", step=signalled_at(signal.SIGHUP))
        trainer.fit()
    finally:
        signal.signal(signal.SIGHUP, previous)
    ours, theirs = final_state(tmp_path / "ignored"), final_state(undisturbed)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    trainer = make_trainer(tmp_path / "twice", step=signalled_at(signal.SIGINT, times=2))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()

    def terminated_first(model, batch, global_step):
        os.kill(os.getpid(), signal.SIGTERM)
        return signalled_at(signal.SIGINT, at=0)(model, batch, global_step)

    trainer = make_trainer(tmp_path / "first", step=terminated_first)
    with pytest.raises(Stopped):  # it is the first Ctrl-C
        trainer.fit()


@pytest.mark.parametrize("settings", [{}, {"period": Period("step"), "save_every": 10, "evaluate_every": 10}])
def test_a_signal_during_an_evaluation_is_obeyed_at_once_and_nothing_is_lost(tmp_path, settings):
    # Breaks if the evaluation goes on: launchers kill after 30 seconds what they have asked to end.
    def trainer_with(evaluate, folder):
        trainer = continued(folder, save_last_every=1000, **settings)
        trainer.evaluate = evaluate
        return trainer

    def score(module, _period):
        return {"score": sum(weight.sum().item() for weight in module.parameters())}

    def signalled(module, period):
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the evaluation went on")
        seen.append(period)
        return score(module, period)

    seen = []
    trainer = trainer_with(signalled, tmp_path / "signalled")
    with pytest.raises(Stopped, match="in the evaluation"):
        trainer.fit()
    trainer.folder.close()
    assert load_checkpoint(tmp_path / "signalled" / LAST)["progress"]["global_step"] == 20
    trainer_with(score, tmp_path / "signalled").fit()
    trainer_with(score, tmp_path / "whole").fit()
    assert log_lines(tmp_path / "signalled") == log_lines(tmp_path / "whole")


def test_what_was_trained_is_saved_when_the_data_fail(tmp_path, undisturbed):
    # Breaks if a worker that was killed costs the steps since the last save.
    class FailingBatches(Batches):
        def epoch(self, epoch, first_batch=0):
            for number, batch in enumerate(super().epoch(epoch, first_batch), first_batch):
                if (epoch, number) == (1, 6):
                    raise InputError("a data loading process died (SIGKILL)")
                yield batch

    trainer = make_trainer(tmp_path)
    trainer.loader = FailingBatches(4)
    with pytest.raises(InputError, match="SIGKILL"):
        trainer.fit()
    trainer.folder.close()
    trainer = continued(tmp_path)
    assert trainer.first_step == 16
    trainer.fit()
    assert all(torch.equal(a, b) for a, b in zip(final_state(tmp_path), final_state(undisturbed), strict=True))
    assert log_lines(tmp_path) == log_lines(undisturbed)


def test_a_signal_while_that_is_saved_does_not_cut_it_off(tmp_path, monkeypatch):
    # Breaks if the wait for data counts as going on once they have failed: the signal would be obeyed inside the save.
    class FailingBatches(Batches):
        def epoch(self, epoch, first_batch=0):
            yield from islice(super().epoch(epoch, first_batch), 4)
            raise InputError("a data loading process died (SIGKILL)")

    def signalled_save(name, state):
        os.kill(os.getpid(), signal.SIGTERM)
        save(name, state)

    monkeypatch.setattr(loop, "PATIENCE_WITH_DATA", 0.0)
    trainer = make_trainer(tmp_path)
    trainer.loader = FailingBatches(4)
    save = trainer.folder.save
    monkeypatch.setattr(trainer.folder, "save", signalled_save)
    with pytest.raises(InputError, match="SIGKILL"):
        trainer.fit()
    assert load_checkpoint(tmp_path / LAST)["progress"]["global_step"] == 4


def test_scores_on_other_images_do_not_compete_with_those_of_before(tmp_path, caplog):
    # Breaks if the best stays the best of another validation set for ever.
    def trainer_on(images, score, step=step):
        trainer = make_trainer(tmp_path, best_metric="score", step=step)
        trainer.evaluate, trainer.extras = (lambda *_: {"score": score}), {"eval_data": images}
        return trainer

    first = trainer_on("old", 90.0, signalled_at(signal.SIGTERM, at=15))
    with pytest.raises(Stopped):
        first.fit()
    first.folder.close()
    second = trainer_on("new", 50.0)
    second.resume(load_checkpoint(tmp_path / LAST), LAST)
    assert "other validation images than in" in caplog.text
    second.fit()
    assert load_checkpoint(tmp_path / BEST)["best"] == {"score": 50.0}
    (kept,) = tmp_path.glob(f"previous-*/{BEST}")
    assert load_checkpoint(kept)["best"] == {"score": 90.0}
    second.folder.close()
    third = trainer_on("newest", 10.0)
    third.resume(load_checkpoint(tmp_path / f"checkpoint-{EPOCHS - 1}.pth"), LAST)  # nothing is left to train
    assert load_checkpoint(tmp_path / BEST)["best"] == {"score": 50.0}


def test_a_share_of_an_epoch_is_one_of_other_data_too(tmp_path):
    state = make_trainer(None)._state(15)  # of 10 steps each
    shorter = make_trainer(None, period=Period("epoch", 4))
    shorter.resume(state, "a.pth")
    assert shorter.first_step == 4 + 2


@pytest.mark.parametrize("part", [{"best": "high"}, {"averages": [1]}, {"progress": NO_STEPS}, {"progress": NO_EPOCH}])
def test_a_state_that_is_no_state_is_one_line(part):
    with pytest.raises(InputError, match="does not"):
        make_trainer(None).resume({**make_trainer(None)._state(15), **part}, "a.pth")


def test_settings_that_have_changed_are_named(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    trainer.config = {"lr": 9.0, "epochs": 5, "output_dir": "new", "drop_path": 0.1}
    state = make_trainer(None)._state(7)
    state["args"] = {"lr": 0.1, "epochs": 3, "output_dir": "old", "drop_path": 0.1}
    trainer.resume(state, "a.pth")
    (message,) = [text for text in caplog.messages if "settings changed" in text]
    assert message.endswith(": lr 0.1 -> 9.0, epochs 3 -> 5")


def test_after_a_resume_that_leads_to_nan_an_older_checkpoint_is_advised(tmp_path):
    def spoilt(model, batch, global_step):
        loss, metrics = step(model, batch, global_step)
        return (loss * math.nan if global_step > 12 else loss), metrics

    trainer = make_trainer(None, step=spoilt)
    trainer.resume(make_trainer(None)._state(12), "a.pth")
    with pytest.raises(NonFiniteLossError, match="choose an older one with --resume"):
        trainer.fit()


BY_STEP = {"period": Period("step"), "save_every": 10, "evaluate_every": 10}


def without_numbers(lines):
    numbers = ("epoch", "step", "test_score")
    return [{key: value for key, value in entry.items() if key not in numbers} for entry in lines]


def test_a_run_that_counts_steps_numbers_its_files_by_them(tmp_path, undisturbed):
    trainer = make_trainer(tmp_path, **BY_STEP)
    trainer.fit()
    trainer.folder.close()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}.pth" for n in (10, 20, 30)}
    lines = log_lines(tmp_path)
    assert [entry["step"] for entry in lines] == [10, 20, 30]
    assert without_numbers(lines) == without_numbers(log_lines(undisturbed))
    (tmp_path / "checkpoint-30.pth").unlink()
    trainer = continued(tmp_path, **BY_STEP)
    assert (trainer.first_step, trainer.checkpoint_number(30)) == (20, 30)
    trainer.fit()
    trainer.folder.close()
    paths = tmp_path / "checkpoint-30.pth", undisturbed / "checkpoint-2.pth"
    ours, theirs = (load_checkpoint(path) for path in paths)
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    RunFolder(tmp_path).set_aside(20)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-10.pth"]


@pytest.mark.parametrize("intervals", [(7, 30), (30, 4), (12, 9)])
def test_a_run_that_counts_steps_can_be_resumed_with_other_intervals(tmp_path, undisturbed, intervals):
    # Breaks if the position is counted in units that depend on the intervals.
    first = make_trainer(tmp_path, **BY_STEP)
    first.fit()
    first.folder.close()
    (tmp_path / "checkpoint-30.pth").unlink()
    save_every, evaluate_every = intervals
    second = continued(tmp_path, period=Period("step"), save_every=save_every, evaluate_every=evaluate_every)
    second.evaluate = lambda _model, _step: {"score": 0.0}
    assert second.first_step == 20
    second.fit()
    ends = {step for every in intervals for step in range(every, 31, every) if step > 20} | {30}
    assert [entry["step"] for entry in log_lines(tmp_path)] == [10, 20, *sorted(ends)]
    ours, theirs = (
        load_checkpoint(path)["model"] for path in (tmp_path / "checkpoint-30.pth", undisturbed / "checkpoint-2.pth")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_version_0_1_that_counted_rounds_resumes_at_its_step():
    state = make_trainer(None, **BY_STEP)._state(15)
    rounds = {"images_per_step": 4, "seed": 0, "global_step": 15}
    for progress, is_open in (
        ({"epoch": 1, "step": 5, "steps_per_epoch": 10}, False),
        ({"epoch": 2, "step": 5, "steps_per_epoch": 5}, True),
    ):
        trainer = make_trainer(None, **BY_STEP)
        trainer.resume({**state, "progress": {**rounds, **progress}}, "a.pth")
        assert (trainer.first_step, trainer._period_open) == (15, is_open)


def test_a_metric_of_nothing_is_no_best_and_no_broken_json(tmp_path):
    # Breaks if nan is looked up as a best score, or written into log.txt, which strict readers then refuse.
    trainer = make_trainer(tmp_path, best_metric="score")
    trainer.evaluate = lambda _model, epoch: {"score": math.nan if epoch < 2 else 0.5}
    trainer.fit()
    text = (tmp_path / "log.txt").read_text()
    assert [json.loads(line)["test_score"] for line in text.splitlines()] == [None, None, 0.5]
    assert "NaN" not in text
    assert load_checkpoint(tmp_path / BEST)["best"] == {"score": 0.5}


def test_what_was_trained_is_saved_before_a_long_evaluation(tmp_path, undisturbed):
    # Breaks if a kill during the evaluation, which may be longer than a scheduler waits, loses the steps before it.
    def killed(_model, step):
        if step == 19:
            raise Interrupted
        return {"score": 0.0}

    trainer = make_trainer(tmp_path, save_last_every=1000, **BY_STEP)
    trainer.evaluate = killed
    with pytest.raises(Interrupted):
        trainer.fit()
    trainer.folder.close()
    trainer = continued(tmp_path, save_last_every=1000, **BY_STEP)
    assert (trainer.first_step, trainer._period_open) == (20, True)  # the evaluation is next
    trainer.evaluate = lambda _model, _step: {"score": 0.0}
    trainer.fit()
    assert without_numbers(log_lines(tmp_path)) == without_numbers(log_lines(undisturbed))
    weights = load_checkpoint(tmp_path / "checkpoint-30.pth")["model"]
    theirs = load_checkpoint(undisturbed / "checkpoint-2.pth")["model"]
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)


def test_a_stopped_run_that_writes_nothing_does_not_promise_to_go_on():
    with pytest.raises(Stopped, match="nothing is kept of a run without --output_dir"):
        make_trainer(None, step=signalled_at(signal.SIGTERM)).fit()
