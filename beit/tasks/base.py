"""How a training run goes. A job is a :class:`Task`, which holds what differs; :func:`run` is the same for all."""

import dataclasses
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from beit.checkpoints.formats.dialect import LAYER_NORM_EPS
from beit.checkpoints.formats.relatives import PLAIN_VIT
from beit.checkpoints.read import read_weights
from beit.checkpoints.released import resolve
from beit.config import dump_yaml, read_settings, to_plain
from beit.data.classification import check_classes, find_images
from beit.data.datasets import Images, index_images
from beit.data.loaders import EpochDataset, EpochLoader, close_loaders
from beit.data.preprocessing import COLOURS, normalization
from beit.errors import InputError, counted
from beit.modeling import Backbone, Block, VisionTransformerForMaskedImageModeling
from beit.registry import TRACKERS, locate
from beit.tasks.settings import (
    BatchOptions,
    ChannelOptions,
    CosineOptions,
    EpochOptions,
    LabelledDataOptions,
    LoadingOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    ShardingOptions,
    TrainedModelOptions,
    check_job,
)
from beit.training import distributed
from beit.training.checkpoint import newest_checkpoint, numbered_file
from beit.training.compilation import compile_for_training
from beit.training.loop import Trainer
from beit.training.optim import create_optimizer, parameter_groups
from beit.training.precision import Precision, resolve_amp_dtype
from beit.training.schedules import WarmupCosine, duration_in_steps, split_batch, warn_of_rate
from beit.training.session import Session, open_session
from beit.training.state import Average, Batch, LoopSettings, Period, StepFunction
from beit.training.trackers import Tracker, Trackers
from beit.zoo import MODELS, create_model

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=RunOptions)
BatchT = TypeVar("BatchT", bound=BatchOptions)

PREPARED_BY = {
    **dict.fromkeys(("mean", "std"), "--imagenet_default_mean_and_std, --mean and --std"),
    "crop_pct": "--crop_pct",
}
READING = {"model_key": "model|module", "model_prefix": ""}  # settings of how weights are read, where a job has them
EVALUATION_WORKERS = 2  # at most, beside those of the training loader
Metrics = dict[str, float]
Evaluation = Callable[[nn.Module, int], Metrics]
Schedule = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run has come to: the lines of its log, and where it wrote.

    ``checkpoint`` is the last one. Both paths are None where nothing was written; an evaluation's log is one line.
    """

    log: list[dict[str, Any]] = dataclasses.field(repr=False)
    output_dir: Path | None = None
    checkpoint: Path | None = None


class Task(ABC, Generic[ConfigT]):
    """A training job. :func:`run` calls the methods in the order below; a subclass overrides what differs."""

    batch_multiple: int = 1  # what the images of a batch must be a multiple of
    best_metric: ClassVar[str | None] = None  # of the evaluation, higher is better: its best checkpoint is kept
    evaluate_average: ClassVar[bool] = False  # the moving average of the weights too
    prepare_batch: Callable[[Batch], Batch] | None = None  # applied on the host, before a batch goes to the device
    session: Session
    precision: Precision
    model: nn.Module  # on the device
    loader: EpochLoader

    def __init__(self, config: ConfigT) -> None:
        self.config = read_settings(config)  # after start with --total_batch_size resolved

    def check(self) -> None:
        """Raises :class:`InputError` for settings that do not work together; each alone is checked already."""

    def start(self, session: Session) -> None:
        """Takes the session up, before anything is built."""
        self.session, self.device = session, session.device
        self.config = adopt_positions(self.config)
        if isinstance(self.config, BatchOptions):
            self.config = resolve_batch(self.config, session.world_size, self.batch_multiple)
        self.precision = self.build_precision()
        self.prepare()

    def build_precision(self) -> Precision:
        """Returns the number format of forward and backward."""
        return Precision(resolve_amp_dtype(self.config.amp_dtype, self.device), self.device)

    def prepare(self) -> None:
        """Finds the data and builds what the model depends on, such as a frozen tokenizer."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Returns the model that is trained, with the weights that it starts from."""

    @abstractmethod
    def build_loader(self) -> EpochLoader:
        """Returns the loader of training batches; see :meth:`loader_of`."""

    @abstractmethod
    def build_objective(self) -> StepFunction:
        """Returns ``(model, batch, step) -> (loss, metrics)``: scalars on the device, means over the batch."""

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer over :meth:`parameter_groups`."""
        config = self.config
        assert isinstance(config, OptimizerOptions)
        return create_optimizer(
            config.opt,
            self.parameter_groups(),
            lr=self.peak_lr(),
            eps=config.opt_eps,
            betas=config.opt_betas,
            momentum=config.momentum,
            fused=self.device.type in ("cuda", "cpu"),
            in_parts=isinstance(config, ShardingOptions) and config.shard != "none",
        )

    def images_per_step(self) -> int:
        """Returns the images per optimizer step, over all processes."""
        assert isinstance(self.config, BatchOptions)
        return self.config.batch_size * self.config.update_freq * self.session.world_size

    def peak_lr(self) -> float:
        """Returns the learning rate after the warm-up."""
        assert isinstance(self.config, OptimizerOptions)
        return self.config.lr

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the parameters in groups with their weight decay and learning-rate scale."""
        assert isinstance(self.config, OptimizerOptions)
        return parameter_groups(self.model, self.config.weight_decay)

    def loop_settings(self) -> LoopSettings:
        """Returns how long and how often, in optimizer steps; by default from epochs."""
        assert isinstance(self.config, EpochOptions)
        return self.settings_for(self.config.epochs, Period("epoch", self.steps_per_epoch()))

    def settings_for(self, periods: int, period: Period) -> LoopSettings:
        """Returns the loop's settings for a number of periods, in which the other durations are given as well."""
        config: Any = self.config
        return LoopSettings(
            total_steps=periods * period.steps,
            period=period,
            update_freq=config.update_freq,
            clip_grad=getattr(config, "clip_grad", None),
            log_every=config.log_every,
            save_every=config.save_ckpt_freq * period.steps,
            save_last_every=config.save_ckpt_steps,
            evaluate_every=config.eval_freq * period.steps,
            evaluate_average=self.evaluate_average,
            best_metric=self.best_metric,
            save=getattr(config, "save_ckpt", True),
            seed=config.seed,
        )

    def schedules(self, settings: LoopSettings) -> tuple[Schedule, Schedule | None]:
        """Returns the schedules of learning rate and weight decay, in optimizer steps."""
        config = self.config
        assert isinstance(config, CosineOptions)
        total, warmup = settings.total_steps, config.warmup_steps
        warmup = duration_in_steps(epochs=config.warmup_epochs, steps=warmup, steps_per_epoch=settings.period.steps)
        end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
        return WarmupCosine(self.peak_lr(), config.min_lr, total, warmup), WarmupCosine(config.weight_decay, end, total)

    def build_average(self) -> Average | None:
        """Returns the moving average of the weights, if there is one."""
        return None

    def build_evaluation(self) -> Evaluation | None:
        """Returns ``(model, period) -> metrics``, or None for no evaluation."""
        return None

    def build_epoch_end(self) -> Callable[[int, Trackers], None] | None:
        """Returns what the main process calls after each epoch is saved, ``(epoch, scalars)``, or None for nothing."""
        return None

    def extras(self) -> Mapping[str, object]:
        """Returns what checkpoints record besides the training state; see :data:`beit.training.meaning.FACTS`."""
        return {}

    def sharded_layers(self, model: nn.Module) -> Iterable[nn.Module]:
        """Returns the layers that ``--shard fsdp`` gathers one by one."""
        return [module for module in model.modules() if isinstance(module, Block)]

    def summary(self) -> Iterator[str]:
        """Yields lines about what is about to run; the batch and the schedule are logged after them."""
        yield f"{sum(p.numel() for p in self.model.parameters()):,} parameters, {self.precision.dtype}"

    def finish(self) -> None:
        """Called at the end of a run that has trained to its last step."""

    def steps_per_epoch(self) -> int:
        """Returns the optimizer steps per epoch; :class:`InputError` if the data have too few batches for one."""
        assert isinstance(self.config, BatchOptions)
        batches, update_freq = self.loader.batches_per_epoch, self.config.update_freq
        if batches < update_freq:
            raise InputError(
                f"the data set has {batches} batches, less than one optimizer step of --update_freq {update_freq}: "
                f"lower {'--total_batch_size' if self.config.total_batch_size else '--batch_size or --update_freq'}"
            )
        return batches // update_freq

    def loader_of(self, dataset: EpochDataset, *, training: bool = True, **options: Any) -> EpochLoader:
        """Returns a loader of this process's share of a data set, shuffled for training, in full for evaluation.

        The options are arguments of :class:`EpochLoader` that differ.
        """
        config = self.config
        assert isinstance(config, BatchOptions)
        assert isinstance(config, LoadingOptions)
        arguments: dict[str, Any] = {
            "batch_size": config.batch_size,
            "seed": config.seed,
            "rank": self.session.rank,
            "world_size": self.session.world_size,
            "num_workers": config.num_workers,
            "pin_memory": config.pin_mem and self.device.type == "cuda",
            "shuffle": training,
            "drop_last": training,
            "max_unreadable": config.max_unreadable,
        }
        return EpochLoader(dataset, **{**arguments, **options})

    def few_workers(self) -> int:
        """Returns the number of workers for a loader beside that of training."""
        assert isinstance(self.config, LoadingOptions)
        return min(self.config.num_workers, EVALUATION_WORKERS)


def run(task: Task[Any]) -> Result:
    """Runs a task to the last checkpoint; :class:`InputError` for a setting, file or checkpoint that cannot be used."""
    report_to = trackers_of(task.config)
    with opened(task) as session:
        task.model = task.build_model().to(session.device)
        if getattr(task.config, "compile", False):
            compile_for_training(task.model, recomputes=task.config.grad_checkpointing)
        task.loader = task.build_loader()
        settings = task.loop_settings()
        lr, weight_decay = task.schedules(settings)
        warn_of_rate(lr)
        trainer = trainer_class(task)(
            model=task.model,
            step=task.build_objective(),
            loader=task.loader,
            optimizer=task.build_optimizer(),
            precision=task.precision,
            settings=settings,
            lr=lr,
            weight_decay=weight_decay,
            prepare=task.prepare_batch,
            folder=session.folder,
            log_dir=task.config.log_dir,
            report_to=report_to,
            config=to_plain(task.config),
            extras={**recorded_eps(task.model), **task.extras()},
            ema=task.build_average(),
            evaluate=task.build_evaluation(),
            on_epoch_end=task.build_epoch_end(),
        )
        task.loader.while_waiting = trainer.stop_wish.obey
        start_epoch = task.config.start_epoch if isinstance(task.config, EpochOptions) else 0
        path = task.config.resume
        if path:
            found = newest_checkpoint(Path(path)) if os.path.isdir(path) else resolve(path)
            if found is None:
                raise InputError(f"--resume {path}: the folder holds no checkpoint of a run")
            path = str(found)
        session.resume(trainer, path=path, auto=task.config.auto_resume, start_epoch=start_epoch)
        for line in (*task.summary(), plan(task.config, trainer)):
            logger.info("%s", line)
        log = trainer.fit()
        task.finish()
        if not task.config.output_dir:
            return Result(log)
        folder = Path(task.config.output_dir)
        last = folder / numbered_file(trainer.checkpoint_number(settings.total_steps))
        return Result(log, folder, last if last.exists() else None)


def evaluated(metrics: Metrics) -> Result:
    """Returns the result of an evaluation."""
    return Result([{f"test_{name}": value for name, value in metrics.items()}])


def trackers_of(config: RunOptions) -> list[type[Tracker]]:
    """Returns the trackers of ``--report_to``; :class:`InputError` if one lacks its package, or a folder."""
    kinds: dict[str, type[Tracker]] = {name: locate(TRACKERS[name]) for name in config.report_to}
    for name, kind in kinds.items():
        if find_spec(kind.package) is None:
            raise InputError(f"--report_to {name} needs {kind.package}: pip install {kind.package}")
    if "tensorboard" in kinds and not config.log_dir:
        raise InputError("--report_to tensorboard needs --log_dir, the folder for its files")
    return list(kinds.values())


def recorded_eps(model: nn.Module) -> dict[str, float]:
    """Returns the eps of a model's layer norms for its checkpoints, if it came with weights that had another."""
    found = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} - {LAYER_NORM_EPS}
    return {"layer_norm_eps": found.pop()} if found else {}


@contextmanager
def opened(task: Task[Any], *, writes: bool = True) -> Iterator[Session]:
    """Checks a task's settings (:class:`InputError`) and opens its session; without ``writes``, no run folder."""
    task.check()
    check_job(task.config)
    with session_of(task.config, writes=writes) as session:
        task.start(session)
        try:
            yield session
        finally:
            close_loaders()


def session_of(config: RunOptions, *, writes: bool = True) -> AbstractContextManager[Session]:
    """Opens the session that a job's settings ask for; ``writes`` is whether it writes into its run folder."""
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


def trainer_class(task: Task[Any]) -> Callable[..., Trainer]:
    """Returns what trains: the plain loop, or one that shards the training state over the processes."""
    if isinstance(task.config, ShardingOptions) and task.config.enable_deepspeed:
        from beit.training.zero import DeepSpeedTrainer

        return partial(DeepSpeedTrainer, zero_stage=task.config.zero_stage)
    if isinstance(task.config, ShardingOptions) and task.config.shard != "none":
        from beit.training.fsdp import FullyShardedTrainer  # what it imports takes a second

        return partial(FullyShardedTrainer, layers=task.sharded_layers)
    return Trainer


def resolve_batch(config: BatchT, world_size: int, multiple: int = 1) -> BatchT:
    """Returns the settings with ``--total_batch_size``, if given, split by :func:`split_batch`."""
    if not config.total_batch_size:
        return config
    images, batches = split_batch(config.total_batch_size, world_size, config.batch_size, multiple)
    return dataclasses.replace(config, batch_size=images, update_freq=batches)


def adopt_positions(config: ConfigT) -> ConfigT:
    """Returns the settings with the kind of positions and LayerScale of the plain ViT that is started from, if any."""
    source = getattr(config, "init_from", "") or getattr(config, "checkpoint", "")
    if not source:
        return config
    weights, metadata = read_weights(source, *(getattr(config, name, default) for name, default in READING.items()))
    if metadata["dialect"] != PLAIN_VIT:
        return config
    scale = 0.1 if "blocks.0.gamma_1" in weights else 0.0
    form: dict[str, Any] = {"abs_pos_emb": True, "rel_pos_bias": False, "layer_scale_init_value": scale}
    logger.info(
        "%s is %s, so the model is built as with --abs_pos_emb --disable_rel_pos_bias --layer_scale_init_value %g",
        *(source, PLAIN_VIT, scale),
    )
    if isinstance(config, TrainedModelOptions) and isinstance(config, ChannelOptions):
        warn_of_preparation(source, metadata, mean=image_statistics(config)[0])
    return dataclasses.replace(config, **form)


def plan(config: BatchOptions, trainer: Trainer) -> str:
    """Returns a line about the batch and the length of the run."""
    total, period = trainer.settings.total_steps, trainer.settings.period
    batches = f"{config.update_freq} batch{'es' * (config.update_freq > 1)}"
    batch = f"{counted(config.batch_size, 'image')} x {counted(distributed.world_size(), 'process')} x {batches}"
    epochs = f"{counted(total // period.steps, 'epoch')} of {counted(period.steps, 'step')}, "
    length = epochs * (period.name == "epoch") + counted(total, "step")
    return f"batch {trainer.images_per_step} = {batch} per step; {length} in all"


def image_statistics(config: ChannelOptions) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of the input per channel; :class:`InputError` for another number of them."""
    default = normalization(config.imagenet_default_mean_and_std)
    if config.in_chans != COLOURS:
        if config.imagenet_default_mean_and_std and not (config.mean and config.std):
            raise InputError("--imagenet_default_mean_and_std: is for images of 3 channels; give --mean and --std")
        default = (0.5,) * config.in_chans, (0.5,) * config.in_chans
    found = []
    for name, given, usual in (("mean", config.mean, default[0]), ("std", config.std, default[1])):
        values = usual if given is None else given * config.in_chans if len(given) == 1 else given
        if len(values) != config.in_chans:
            raise InputError(f"--{name}: {counted(len(values), 'number')} for {counted(config.in_chans, 'channel')}")
        found.append(values)
    return found[0], found[1]


def find_together(path: str) -> Images:
    """Lists images once for all processes; :class:`InputError` if there are none or they differ between them."""
    listed: list[Images] = []
    distributed.on_main(lambda: listed.append(index_images(path)))
    index = listed[0] if listed else index_images(path)
    if not distributed.all_equal(index.fingerprint()):
        raise InputError(f"{path} does not hold the same images on all machines: {len(index)} on this one")
    return index


def find_labelled(
    config: LabelledDataOptions, nb_classes: int, *, trains: bool = True, evaluates: bool = True, download: bool = False
) -> tuple[Images | None, Images | None, tuple[str, ...]]:
    """Returns training images, validation images (each None if not wanted) and class names.

    Raises :class:`InputError` if images are missing, or have not ``nb_classes`` classes (0 takes what is there).
    With ``download``, a missing CIFAR archive is fetched.
    """

    def find(train: bool) -> Images:
        name, where = "train" if train else "val", config.data_path
        if config.data_set == "IMNET" and os.path.isdir(where) and not os.path.exists(os.path.join(where, name)):
            raise InputError(
                f"--data_path {where}: has no folder {name}; give the folder that holds train and val, or with "
                "--data_set image_folder one folder of classes as --data_path and another as --eval_data_path"
            )
        return find_images(config.data_set, config.data_path, config.eval_data_path, train=train, download=download)

    if download:
        distributed.on_main(lambda: find(train=True) and None)  # one process fetches for all
    found = [find(train) if wanted else None for train, wanted in ((True, trains), (False, evaluates))]
    class_names = check_classes([images for images in found if images is not None], nb_classes)
    return found[0], found[1], class_names


def fingerprints(train: Images | None, val: Images | None) -> dict[str, str]:
    """Returns what identifies the images that a run trains and is evaluated on."""
    return {key: images.fingerprint() for key, images in (("data", train), ("eval_data", val)) if images is not None}


def checkpoint_to_evaluate(config: RunOptions, otherwise: str = "") -> str:
    """Returns the checkpoint to evaluate with ``--eval``; :class:`InputError` if there is none."""
    found = config.resume
    if not found and config.auto_resume and config.output_dir:
        found = distributed.on_main(lambda: str(newest_checkpoint(Path(config.output_dir)) or ""))
    if not (found or otherwise):
        raise InputError("--eval needs a checkpoint: give it as --resume, or its folder as --output_dir")
    return found or otherwise


def warn_of_preparation(source: str, metadata: Mapping[str, Any], **own: Any) -> None:
    """Warns where a checkpoint records that its images were prepared otherwise than this run's: ``mean``, ``std``, …"""
    for name, here in own.items():
        there = metadata.get(name)
        if there is not None and not (there == here if isinstance(here, str) else _close(there, here)):
            text = "%s was trained on images with %s %s, and gets %s: check %s"
            logger.warning(text, source, name, there, here, PREPARED_BY.get(name, "whether its features suffer"))


def _close(there: Any, here: Any) -> bool:
    return np.shape(there) == np.shape(here) and np.allclose(there, here)


def named_model(config: ModelOptions, *, masked: bool = False, **arguments: object) -> Backbone:
    """Builds ``--model`` from ``arguments`` of its constructor and ``--model_kwargs``, which win.

    ``masked`` is whether it must be a pre-training model rather than a classifier. Raises :class:`InputError` for an
    unknown name, one of the other kind, or an argument that does not fit.
    """
    name, builds = config.model, locate(MODELS[config.model].builds) if config.model in MODELS else None
    if isinstance(builds, type) and issubclass(builds, VisionTransformerForMaskedImageModeling) != masked:
        kind = "classifier" if masked else "pre-training model"
        other = f"{name}_8k_vocab" if masked else name.partition("_8k_vocab")[0]
        raise InputError(f"--model {name} is a {kind}; this job needs {other}")
    shared = {"init_values": config.layer_scale_init_value, "use_abs_pos_emb": config.abs_pos_emb}
    if (channels := getattr(config, "in_chans", COLOURS)) != COLOURS:  # a model from elsewhere may not have the keyword
        shared["in_chans"] = channels
    try:
        return create_model(name, **{**shared, **arguments, **(config.model_kwargs or {})})
    except (TypeError, ValueError) as error:
        raise InputError(f"--model {name} cannot be built: {error}") from error
