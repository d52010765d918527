"""What all jobs share: batches, trainers, optimizers, and checks of their settings."""

import dataclasses
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beit.config import dump_yaml, read_command_line
from beit.errors import InputError
from beit.storage import save_checkpoint
from beit.tasks.base import adopt_positions, resolve_batch, run, trainer_class
from beit.tasks.dvae_training import DvaeTraining
from beit.tasks.finetuning import Finetuning
from beit.tasks.linear_probe import LinearProbe
from beit.tasks.pretraining import Pretraining
from beit.tasks.settings import (
    NOT_WITH_FSDP,
    SHARDABLE_OPTIMIZERS,
    DvaeConfig,
    FinetuningConfig,
    LinearProbeConfig,
    PretrainingConfig,
    check_sharding,
)
from beit.training.fsdp import FullyShardedTrainer
from beit.training.loop import Trainer
from beit.training.zero import DeepSpeedTrainer
from semantic_segmentation.config import TrainConfig
from semantic_segmentation.task import Segmentation

JOBS = {
    Pretraining: PretrainingConfig,
    Finetuning: FinetuningConfig,
    LinearProbe: LinearProbeConfig,
    DvaeTraining: DvaeConfig,
    Segmentation: TrainConfig,
}
SHARDED_JOBS = [Pretraining, Finetuning]
WRONG = {"enable_deepspeed": True, "compile": True, "log_images": 2, "model_ema_force_cpu": True}


@pytest.mark.parametrize("task", [task for task in JOBS if task is not DvaeTraining])
def test_every_job_takes_over_the_form_of_a_vit(task, tmp_path):
    vit = {"cls_token": (1, 1, 8), "pos_embed": (1, 5, 8), "blocks.0.attn.qkv.bias": (24,), "blocks.0.ls1.gamma": (8,)}
    save_checkpoint(tmp_path / "vit.pth", {"model": {name: torch.ones(shape) for name, shape in vit.items()}})
    start = {"checkpoint" if task is LinearProbe else "init_from": str(tmp_path / "vit.pth")}
    config = adopt_positions(JOBS[task](**start, layer_scale_init_value=0.0))
    assert (config.abs_pos_emb, config.rel_pos_bias, config.layer_scale_init_value) == (True, False, 0.1)


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
    split = resolve_batch(config, world_size)
    assert (split.batch_size, split.update_freq) == (images, batches)


def test_without_a_total_batch_the_flags_stay_as_given():
    config = PretrainingConfig(batch_size=100, update_freq=7)
    assert resolve_batch(config, 3) == config


def test_mixed_images_come_in_pairs():
    # 36 / 4 processes = 9 images each, which are 3 x 3 alone but no pairs; of 10 each, 5 x 2 are.
    config = PretrainingConfig(batch_size=4, total_batch_size=40)
    assert (resolve_batch(config, 4).batch_size, resolve_batch(config, 4, multiple=2).batch_size) == (2, 2)
    assert resolve_batch(replace(config, total_batch_size=36), 4).batch_size == 3
    with pytest.raises(InputError, match=r"36 .* 4 processes in multiples of 2; 32 or 40 can"):
        resolve_batch(replace(config, total_batch_size=36), 4, multiple=2)
    assert [Finetuning(FinetuningConfig(**flags)).batch_multiple for flags in ({}, {"cutmix": 1.0})] == [1, 2]


def test_a_total_batch_that_cannot_be_split_names_the_next_that_can():
    with pytest.raises(InputError, match=r"--total_batch_size 2048 .* 24 processes; 2040 or 2064 can"):
        resolve_batch(PretrainingConfig(total_batch_size=2048), 24)
    with pytest.raises(InputError, match=r"--total_batch_size 2 .* 4 processes; 4 can"):
        resolve_batch(PretrainingConfig(total_batch_size=2), 4)


def test_small_batches_are_warned_of(caplog):
    resolve_batch(PretrainingConfig(batch_size=128, total_batch_size=2 * 127), 1)  # 254 = 2 x 127
    assert not caplog.text
    resolve_batch(PretrainingConfig(batch_size=64, total_batch_size=2 * 127), 1)
    assert "254 over 1 process: 2 images per batch" in caplog.text


def fields(config_class):
    return {field.name for field in dataclasses.fields(config_class)}


@pytest.mark.parametrize("job", SHARDED_JOBS)
def test_the_flags_choose_the_trainer(job):
    for flags, expected in (
        ({}, Trainer),
        ({"enable_deepspeed": True, "zero_stage": 1}, DeepSpeedTrainer),
        ({"shard": "fsdp"}, FullyShardedTrainer),
    ):
        chosen = trainer_class(job(JOBS[job](**flags)))
        assert getattr(chosen, "func", chosen) is expected


@pytest.mark.parametrize("job", SHARDED_JOBS)
def test_what_cannot_be_split_is_refused_in_one_line(job):
    config_class = JOBS[job]
    assert WRONG.keys() == NOT_WITH_FSDP.keys() <= fields(PretrainingConfig) | fields(FinetuningConfig)
    for name in WRONG.keys() & fields(config_class):
        check_sharding(config_class(**{name: WRONG[name]}), "adamw")
        config = config_class(shard="fsdp", **{name: WRONG[name]})
        with pytest.raises(InputError, match=f"^--{name} does not go with --shard fsdp: "):
            check_sharding(config, "adamw")
        with pytest.raises(InputError, match=f"^--{name} does not go with --shard fsdp: "):
            run(job(config))
    with pytest.raises(InputError, match=r"^--opt adafactor .*choose one of adamw"):
        check_sharding(config_class(shard="fsdp"), "adafactor")
    for opt in ("muon", "novograd", "lamb", "adafactor", "fusedlamb"):  # norms or products over a whole matrix
        config = config_class(enable_deepspeed=True, zero_stage=1, opt=opt)
        with pytest.raises(InputError, match=rf"^--opt {opt} .*--zero_stage 1 choose one of adamw"):
            run(job(config))
        check_sharding(replace(config, zero_stage=0), opt)
    with pytest.raises(InputError, match=r"^--zero_stage 3"):
        run(job(config_class(zero_stage=3)))


@pytest.mark.parametrize("name", [*SHARDABLE_OPTIMIZERS, "fusedadamw"])
def test_optimizers_for_parts_use_fused_kernels_only_where_those_take_parts(name):
    task = Pretraining(PretrainingConfig(shard="fsdp", opt=name))
    check_sharding(task.config, name)
    task.device = torch.device("cpu")
    task.parameter_groups = lambda: [{"params": [torch.nn.Parameter(torch.ones(2))]}]
    assert bool(task.build_optimizer().defaults.get("fused")) == (name in ("adamw", "adam", "fusedadamw"))


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    ("name", "value"),
    [("dist_timeout", 0.0), ("dist_timeout", -1.0), ("dist_timeout", float("nan")), ("dist_timeout", float("inf")),
     ("seed", -1), ("seed", 10**20), ("seed", "one"), ("amp_dtype", "bfloat16"), ("batch_size", 1.5)],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_by_every_job(job, name, value):
    # Breaks when it gets past the settings of a job, and a library ends in a traceback.
    with pytest.raises(InputError, match=rf"--{name}(: cannot use)? '?{value}"):
        run(job(replace(JOBS[job](), **{name: value})))


@pytest.mark.parametrize("job", [job for job in JOBS if job is not DvaeTraining])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 2}, "--model_kwargs num_classes: the data set it; leave it out"),
        ({"vocab_size": 2}, "--model_kwargs vocab_size: the target sets it; leave it out"),
        ({"img_size": 32}, "--model_kwargs img_size: the size of the images sets it; leave it out"),
        ({"depth": {}}, "--model_kwargs: cannot use {'depth': {}}: expected KEY=VALUE, with finite numbers"),
        ({"depth": math.inf}, "--model_kwargs: cannot use {'depth': inf}: expected KEY=VALUE, with finite numbers"),
    ],
)
def test_arguments_of_the_model_that_a_job_sets_are_refused(job, kwargs, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        run(job(JOBS[job](model_kwargs=kwargs)))


@pytest.mark.parametrize("job", [job for job in JOBS if job is not LinearProbe])
def test_decay_rates_are_two(job):
    with pytest.raises(InputError, match=r"^--opt_betas 0\.9: must be two numbers$"):
        run(job(JOBS[job](opt_betas=(0.9,), data_path="somewhere")))


@pytest.mark.parametrize("job", JOBS)
def test_settings_made_in_python_are_read_as_flags_are_and_stay_as_they_were(job, monkeypatch):
    # Breaks when a job goes on with a path that YAML cannot hold, or compares a text with a number.
    monkeypatch.setenv("HOME", "/home/someone")
    config = JOBS[job](output_dir=Path("~/run"), batch_size="2", lr=1, resume=None, log_dir="~", pin_mem="off")
    read = job(config).config
    assert (read.output_dir, read.log_dir, read.resume) == ("/home/someone/run", "/home/someone", "")
    assert (read.batch_size, read.pin_mem, repr(read.lr)) == (2, False, "1.0")
    assert config.batch_size == "2"
    assert config.output_dir == Path("~/run")
    assert "/home/someone/run" in dump_yaml(read)


def test_a_removed_flag_names_its_replacement(tmp_path):
    with pytest.raises(InputError, match="--tokenizer_compile") as caught:
        read_command_line(PretrainingConfig, ["--tokenizer_stream"], "prog", "")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="did you mean '--tokenizer_dtype'"):  # and not the one that is gone
        read_command_line(PretrainingConfig, ["--tokenizer_strem"], "prog", "")
    for value in ("true", "false"):
        (tmp_path / f"{value}.yaml").write_text(f"epochs: 3\ntokenizer_stream: {value}\n")
    with pytest.raises(InputError, match="--tokenizer_compile"):
        read_command_line(PretrainingConfig, ["--config", str(tmp_path / "true.yaml")], "prog", "")


def test_the_settings_of_an_earlier_run_folder_are_read(tmp_path):
    # Version 0.1 wrote every setting, also those that are gone.
    (tmp_path / "config.yaml").write_text("epochs: 3\ntokenizer_stream: false\n")
    config = read_command_line(PretrainingConfig, ["--config", str(tmp_path / "config.yaml")], "prog", "")
    assert config == PretrainingConfig(epochs=3)
