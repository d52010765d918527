"""What several jobs make of the same flags."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from beit.tasks.options import NOT_WITH_FSDP, check_sharding, optimizer_for, session_of, share_out, trainer_class

from beit.errors import InputError
from beit.tasks.settings import FinetuningConfig, LinearProbeConfig, PretrainingConfig
from beit.training.fsdp import FullyShardedTrainer
from beit.training.loop import Trainer
from beit.training.optim import WORK_IN_PARTS
from beit.training.zero import DeepSpeedTrainer
from semantic_segmentation.config import TrainConfig

WRONG = {"enable_deepspeed": True, "compile": True, "log_images": 2, "model_ema_force_cpu": True}


@pytest.mark.parametrize(
    ("world_size", "images", "batches"),
    [
        (16, 128, 1),  # 2048 / 16 = 128
        (1, 128, 16),
        (8, 128, 2),
        (24, 96, 1),  # 2304 / 24 = 96, which is less than 128
        (32, 72, 1),  # 2304 / 32
        (12, 96, 2),  # 2304 / 12 = 192 = 2 x 96
    ],
)
def test_the_total_batch_is_kept_on_any_number_of_processes(world_size, images, batches):
    config = PretrainingConfig(batch_size=128, update_freq=7, total_batch_size=images * batches * world_size)
    shared = share_out(config, world_size)
    assert (shared.batch_size, shared.update_freq) == (images, batches)


def test_without_a_total_batch_the_flags_stay_as_given():
    config = PretrainingConfig(batch_size=100, update_freq=7)
    assert share_out(config, 3) == config


def test_images_that_are_mixed_come_in_pairs():
    # 36 / 4 processes = 9 images each, which are 3 x 3 alone but no pairs; of 10 each, 5 x 2 are.
    config = PretrainingConfig(batch_size=4, total_batch_size=40)
    assert (share_out(config, 4).batch_size, share_out(config, 4, step=2).batch_size) == (2, 2)
    assert share_out(replace(config, total_batch_size=36), 4).batch_size == 3
    with pytest.raises(InputError, match=r"36: .* 4 processes \(in pairs, for mixup\); 32 or 40 can"):
        share_out(replace(config, total_batch_size=36), 4, step=2)


def test_a_total_batch_that_cannot_be_shared_out_names_the_next_that_can():
    with pytest.raises(InputError, match=r"--total_batch_size 2048: .* 24 processes; 2040 or 2064 can"):
        share_out(PretrainingConfig(total_batch_size=2048), 24)
    with pytest.raises(InputError, match=r"--total_batch_size 2: .* 4 processes; 4 can"):
        share_out(PretrainingConfig(total_batch_size=2), 4)


def test_few_images_at_once_are_said(caplog):
    share_out(PretrainingConfig(batch_size=128, total_batch_size=2 * 127), 1)  # 254 = 2 x 127
    assert not caplog.text
    share_out(PretrainingConfig(batch_size=64, total_batch_size=2 * 127), 1)
    assert "254 over 1 processes: 2 images at once" in caplog.text


def fields(config):
    return {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("config", [PretrainingConfig, FinetuningConfig])
def test_the_flags_choose_the_trainer(config):
    for flags, expected in (
        ({}, Trainer),
        ({"enable_deepspeed": True, "zero_stage": 1}, DeepSpeedTrainer),
        ({"shard": "fsdp"}, FullyShardedTrainer),
    ):
        chosen = trainer_class(config(**flags), layers=list)
        assert getattr(chosen, "func", chosen) is expected


@pytest.mark.parametrize("config", [PretrainingConfig, FinetuningConfig])
def test_what_cannot_be_split_is_refused_in_one_line(config):
    assert WRONG.keys() == NOT_WITH_FSDP.keys() <= fields(PretrainingConfig) | fields(FinetuningConfig)
    for name in WRONG.keys() & fields(config):
        check_sharding(config(**{name: WRONG[name]}))
        with pytest.raises(InputError, match=f"^--{name} does not go with --shard fsdp: "):
            check_sharding(config(shard="fsdp", **{name: WRONG[name]}))
    with pytest.raises(InputError, match=r"^--opt adafactor .*choose one of adamw"):
        check_sharding(config(shard="fsdp", opt="adafactor"))
    with pytest.raises(InputError, match=r"^--zero_stage 3"):
        check_sharding(config(zero_stage=3))


@pytest.mark.parametrize("name", [*WORK_IN_PARTS, "fusedadamw"])
def test_optimizers_for_parts_use_fused_kernels_only_where_those_take_parts(name):
    config = PretrainingConfig(shard="fsdp", opt=name)
    check_sharding(config)
    optimizer = optimizer_for(config, [{"params": [torch.nn.Parameter(torch.ones(2))]}], torch.device("cpu"))
    assert bool(optimizer.defaults.get("fused")) == (name in ("adamw", "adam", "fusedadamw"))


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_processes_wait_for_a_time_that_is_one(minutes):
    # Breaks when a time-out that cannot be reaches the process group, in a job of whichever package.
    for config_class in (PretrainingConfig, LinearProbeConfig, TrainConfig):
        config = replace(config_class(), dist_timeout=float(minutes))
        with pytest.raises(InputError, match=f"--dist_timeout {float(minutes)}"):
            session_of(config)
