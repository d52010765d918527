"""Flags that several jobs share, in groups, and what the training engine makes of them."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from beit.config import dump_yaml, option
from beit.data.datasets import ImageIndex, index_images
from beit.data.loaders import EpochDataset, EpochLoader
from beit.data.transforms import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from beit.errors import InputError
from beit.training import distributed
from beit.training.loop import LoopSettings, Trainer
from beit.training.optim import WORK_IN_PARTS, create_optimizer
from beit.training.schedules import WarmupCosine, duration_in_steps
from beit.training.session import Session, open_session
from beit.training.zero import DeepSpeedTrainer

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")

EVALUATION_WORKERS = 2  # at most, beside those of the training loader
AMP_CHOICES = ("auto", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class RunOptions:
    """Where a run computes, what it writes and how it is continued."""

    output_dir: str = option("", "folder for checkpoints and log.txt; empty writes nothing")
    log_dir: str | None = option(None, "folder for TensorBoard")
    device: str = option("cuda", "cuda, cpu or mps; the CPU where there is no CUDA")
    seed: int = option(0, "seed of everything random")
    resume: str = option("", "checkpoint to continue from")
    auto_resume: bool = option(True, "continue from the newest checkpoint in --output_dir", off="--no_auto_resume")
    start_epoch: int = option(0, "epoch to start with when nothing is resumed, from 0")
    save_ckpt_freq: int = option(20, "epochs between two checkpoint-<epoch>.pth")
    save_ckpt_steps: int = option(1000, "optimizer steps between two writes of checkpoint-last.pth; 0 for none")
    keep_checkpoints: int = option(0, "newest checkpoint-<epoch>.pth to keep; 0 keeps all")
    num_workers: int = option(10, "data-loading processes per process")
    pin_mem: bool = option(True, "page-locked host memory for faster transfers to a GPU", off="--no_pin_mem")
    amp_dtype: str = option("auto", "number format of forward and backward", choices=AMP_CHOICES)
    deterministic: bool = option(False, "deterministic GPU kernels where there are any (slower)")
    log_every: int = option(10, "optimizer steps between two console lines")
    world_size: int = option(1, "number of processes", no_effect="the launcher says how many processes there are")
    local_rank: int = option(-1, "GPU of this process, as old launchers pass it; LOCAL_RANK wins")
    dist_on_itp: bool = option(False, "the processes were started by Open MPI's mpirun")
    dist_url: str = option("env://", "where the processes meet")
    dist_timeout: float = option(distributed.PATIENCE, "minutes that processes wait for one that does not answer")


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and the schedules of learning rate and weight decay."""

    opt: str = option("adamw", "optimizer: any name that timm knows, or fusedadamw")
    opt_eps: float = option(1e-8, "epsilon of Adam")
    opt_betas: tuple[float, ...] | None = option(None, "decay rates of Adam; the optimizer's own by default")
    clip_grad: float | None = option(None, "largest gradient norm; no clipping by default")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(0.05, "weight decay")
    weight_decay_end: float | None = option(None, "weight decay at the end of a cosine; constant by default")
    lr: float = option(5e-4, "peak learning rate; never rescaled to the batch")
    warmup_lr: float = option(1e-6, "unused", no_effect="the warm-up starts at 0, as in the official schedule")
    min_lr: float = option(1e-5, "learning rate at the end of the cosine")
    warmup_epochs: int = option(5, "epochs of linear warm-up")
    warmup_steps: int = option(-1, "optimizer steps of linear warm-up; wins over --warmup_epochs when positive")
    update_freq: int = option(1, "batches whose gradients are added up for one optimizer step")
    total_batch_size: int = option(
        0,
        "images an optimizer step, over all processes, however many there are: --update_freq is worked out, and "
        "--batch_size is the most at once; 0 takes both as they are",
    )


@dataclass(frozen=True)
class ShardingOptions:
    """What processes share out among them besides the images."""

    shard: str = option(
        "none",
        "fsdp: each process holds its part of weights and optimizer state (and, with --update_freq 1, gradients), and "
        "writes it into a folder "
        "checkpoint-<epoch>/ that all must see; a run goes on from it with any number of processes, or without --shard",
        choices=("none", "fsdp"),
    )
    enable_deepspeed: bool = option(False, "train with DeepSpeed (the extra deepspeed)")
    zero_stage: int = option(0, "what DeepSpeed splits over processes: 0 nothing, 1 the optimizer, 2 the gradients too")


# Flags that --shard fsdp cannot go with, and why.
NOT_WITH_FSDP = {
    "enable_deepspeed": "both split the training state",
    "compile": "that makes one graph of what is gathered block by block",
    "log_images": "one process makes the pictures, and holds a part of the model",
    "model_ema_force_cpu": "the average is split as the weights are",
}


def check_sharding(config: Any) -> None:
    """Raises :class:`InputError` for what :class:`ShardingOptions` cannot do, or not together with other flags."""
    if config.zero_stage not in (0, 1, 2):
        raise InputError(f"--zero_stage {config.zero_stage}: choose 0, 1 or 2")
    if config.shard == "none":
        return
    for name, reason in NOT_WITH_FSDP.items():
        if getattr(config, name, False):
            raise InputError(f"--{name} does not go with --shard fsdp: {reason}; leave one of them out")
    if config.opt.lower().removeprefix("fused") not in WORK_IN_PARTS:
        raise InputError(
            f"--opt {config.opt} is not known to work in parts: with --shard {config.shard} choose one of "
            f"{', '.join(WORK_IN_PARTS)}"
        )


def trainer_class(config: Any, layers: Callable[[Any], Iterable[nn.Module]]) -> Callable[..., Trainer]:
    """Returns what trains: the plain loop, or one that splits the training state over the processes.

    Args:
        config: The flags.
        layers: Gives the layers of the job's model, which are gathered one by one.
    """
    if config.enable_deepspeed:
        return partial(DeepSpeedTrainer, zero_stage=config.zero_stage)
    if config.shard == "none":
        return Trainer
    from beit.training.fsdp import FullyShardedTrainer  # torch takes a second to import what it stands on

    return partial(FullyShardedTrainer, layers=layers)


def find_together(path: str) -> ImageIndex:
    """Lists the images of a folder or a file once for all processes, which then read the kept index.

    Raises:
        InputError: There are none, or the processes do not see the same ones.
    """
    distributed.on_main(lambda: len(index_images(path)))
    index = index_images(path)
    if not distributed.all_equal(len(index)):
        raise InputError(f"{path} does not hold the same images on all machines: {len(index)} on this one")
    return index


def session_of(config: Any, *, writes: bool = True) -> AbstractContextManager[Session]:
    """Opens the session that a job's flags ask for; a job that only looks leaves the run folder alone.

    Raises:
        InputError: Processes would not wait for each other.
    """
    if not (math.isfinite(config.dist_timeout) and config.dist_timeout > 0):
        raise InputError(f"--dist_timeout {config.dist_timeout}: must be a number of minutes above 0")
    return open_session(
        device=config.device,
        output_dir=config.output_dir if writes else None,
        settings=dump_yaml(config),
        seed=config.seed,
        keep_checkpoints=config.keep_checkpoints,
        deterministic=config.deterministic,
        local_rank=config.local_rank,
        dist_url=config.dist_url,
        use_open_mpi=config.dist_on_itp,
        patience=config.dist_timeout,
    )


def share_out(config: ConfigT, world_size: int, step: int = 1) -> ConfigT:
    """Returns a job's flags with ``--total_batch_size``, if it is given, shared out over the processes.

    An update has as few batches as can be.

    Args:
        config: The flags.
        world_size: Number of processes.
        step: What the images of a batch must be a multiple of: 2 where they are mixed in pairs.

    Raises:
        InputError: The images cannot be shared out evenly.
    """
    flags: Any = config
    total, unit = flags.total_batch_size, world_size * step
    if not total:
        return config
    if total % unit:
        near = [count for count in (total // unit * unit, (total // unit + 1) * unit) if count]
        raise InputError(
            f"--total_batch_size {total}: so many images cannot be shared out evenly over {world_size} processes"
            f"{' (in pairs, for mixup)' * (step > 1)}; {' or '.join(map(str, near))} can"
        )
    share = total // world_size
    images = max(size for size in range(step, min(share, flags.batch_size) + 1, step) if share % size == 0)
    if 2 * images < min(share, flags.batch_size):
        logger.warning(
            "--total_batch_size %d over %d processes: %d images at once, as %d has no larger divisor up to "
            "--batch_size %d",
            *(total, world_size, images, share, flags.batch_size),
        )
    return dataclasses.replace(flags, batch_size=images, update_freq=share // images)


def loop_settings(config: Any, **overrides: Any) -> LoopSettings:
    """Returns how long and how often, from a job's flags."""
    settings = {
        "epochs": config.epochs,
        "update_freq": config.update_freq,
        "clip_grad": config.clip_grad,
        "log_every": config.log_every,
        "save_epochs": config.save_ckpt_freq,
        "save_steps": config.save_ckpt_steps,
        "seed": config.seed,
    }
    return LoopSettings(**{**settings, **overrides})


def schedules(config: Any, steps_per_epoch: int) -> tuple[WarmupCosine, WarmupCosine]:
    """Returns the schedules of learning rate and weight decay, in optimizer steps."""
    total = config.epochs * steps_per_epoch
    warmup = duration_in_steps(epochs=config.warmup_epochs, steps=config.warmup_steps, steps_per_epoch=steps_per_epoch)
    end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
    return WarmupCosine(config.lr, config.min_lr, total, warmup), WarmupCosine(config.weight_decay, end, total)


def normalization(config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of the model's input, per channel, for images in [0, 1]."""
    if config.imagenet_default_mean_and_std:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD


def epoch_loader(dataset: EpochDataset, config: Any, session: Session, **options: Any) -> EpochLoader:
    """Returns a job's loader: its part of the data on each process, with the workers that the flags ask for.

    Args:
        dataset: The samples.
        config: The job's flags.
        session: The processes.
        **options: More of :class:`EpochLoader`, or other values than the flags'.
    """
    arguments = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "rank": session.rank,
        "world_size": session.world_size,
        "num_workers": config.num_workers,
        "pin_memory": config.pin_mem and session.device.type == "cuda",
        "max_unreadable": config.max_unreadable,
    }
    return EpochLoader(dataset, **{**arguments, **options})


def optimizer_for(config: Any, groups: Sequence[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """Returns the optimizer that a job's flags ask for, over its parameter groups."""
    return create_optimizer(
        config.opt,
        groups,
        lr=config.lr,
        eps=config.opt_eps,
        betas=config.opt_betas,
        momentum=config.momentum,
        fused=device.type in ("cuda", "cpu"),
        in_parts=getattr(config, "shard", "none") != "none",
    )


def effective_batch(config: Any) -> int:
    """Returns the images that one optimizer step sees, over all processes."""
    return config.batch_size * config.update_freq * distributed.world_size()


def check_training(config: Any) -> None:
    """Raises :class:`InputError` for the first flag of these groups whose value cannot work."""
    check_positive(config, "batch_size", "epochs", "update_freq", "log_every", "save_ckpt_freq")
    for name in ("seed", "save_ckpt_steps", "keep_checkpoints", "num_workers", "warmup_epochs", "total_batch_size"):
        if getattr(config, name) < 0:
            raise InputError(f"--{name} {getattr(config, name)}: must be 0 or more")
    for name in ("lr", "min_lr", "weight_decay", "opt_eps"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise InputError(f"--{name} {value}: must be a number of 0 or more")
    if config.clip_grad is not None and not config.clip_grad > 0:
        raise InputError(f"--clip_grad {config.clip_grad}: must be above 0; leave it out for no clipping")
    if config.opt_betas is not None and not (len(config.opt_betas) == 2 and all(0 <= b < 1 for b in config.opt_betas)):
        raise InputError(f"--opt_betas {' '.join(map(str, config.opt_betas))}: takes two numbers from 0 to below 1")
    if not 0 <= getattr(config, "drop_path", 0.0) < 1:
        raise InputError(f"--drop_path {config.drop_path}: must be at least 0 and below 1")
    if getattr(config, "max_unreadable", None) is not None and config.max_unreadable < 0:
        raise InputError(f"--max_unreadable {config.max_unreadable}: must be 0 or more")


def check_positive(config: Any, *names: str) -> None:
    """Raises :class:`InputError` for the first of the named flags that is not a positive number."""
    for name in names:
        if getattr(config, name) < 1:
            raise InputError(f"--{name} {getattr(config, name)}: must be at least 1")
