"""Fine-tuning for image classification (arXiv 2106.08254, section 2.5), and evaluation of what came of it."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from beit.checkpoints.load import load_pretrained, load_weights, read_weights, resolve
from beit.config import to_plain
from beit.data.classification import (
    ClassificationEvalTransform,
    ClassificationTransform,
    LabelledImages,
    check_classes,
    find_images,
    labelled_dataset,
)
from beit.data.loaders import EpochLoader
from beit.data.transforms import normalize, size_pair
from beit.errors import InputError
from beit.modeling import VisionTransformer
from beit.tasks.finetuning_config import FinetuningConfig, check_settings, mixes
from beit.tasks.options import (
    effective_batch,
    epoch_loader,
    loop_settings,
    normalization,
    optimizer_for,
    schedules,
    session_of,
    share_out,
    trainer_class,
)
from beit.training import distributed
from beit.training.checkpoint import BEST_EMA, newest_checkpoint
from beit.training.compilation import compile_for_training, uncompiled
from beit.training.loop import Batch, Trainer
from beit.training.optim import parameter_groups
from beit.training.precision import Precision, resolve_amp_dtype
from beit.training.session import Session
from beit.zoo import create_model, list_models

__all__ = ["FinetuningConfig", "main"]

logger = logging.getLogger(__name__)

Metrics = dict[str, float]
TOP_K = 5


def main(config: FinetuningConfig) -> None:
    """Fine-tunes a classifier, or evaluates one, as the flags say."""
    check_settings(config)
    if config.eval:
        evaluate_checkpoint(config)
        return
    with session_of(config) as session:
        config = share_out(config, session.world_size, step=2 if mixes(config) else 1)
        train, val, class_names = find_data(config)
        # The pre-trained backbone below a new linear head; the lower a layer, the less it is to change.
        model = build_model(config, len(class_names))
        if config.finetune:
            load_pretrained(model, config.finetune, model_key=config.model_key, prefix=config.model_prefix)
        model.to(session.device)
        if config.compile:
            compile_for_training(model, recomputes=config.grad_checkpointing)
        optimizer = build_optimizer(config, model, session.device)

        loader = build_loader(config, train, session)
        precision = Precision(resolve_amp_dtype(config.amp_dtype, session.device), session.device)
        settings = loop_settings(config, save=config.save_ckpt, evaluate_average=True, best_metric="acc1")
        lr, weight_decay = schedules(config, loader.batches_per_epoch // config.update_freq)
        trainer = trainer_class(config, layers=lambda model: model.blocks)(
            model,
            build_objective(config, len(class_names)),
            loader,
            optimizer,
            precision,
            settings,
            lr,
            weight_decay,
            folder=session.folder,
            log_dir=config.log_dir,
            config=to_plain(config),
            extras=description(config, class_names),
            ema=build_ema(config, model),
            evaluate=build_evaluation(config, val, session, precision) if val else None,
        )
        path = str(resolve(config.resume)) if config.resume else ""
        session.resume(trainer, path=path, auto=config.auto_resume, start_epoch=config.start_epoch)
        log_summary(config, trainer, len(class_names))
        trainer.fit()


def evaluate_checkpoint(config: FinetuningConfig) -> Metrics:
    """Evaluates a checkpoint on the validation images: what ``--eval`` does.

    Returns:
        ``acc1``, ``acc5`` (percent) and ``loss``, as training reported them.

    Raises:
        InputError: There is no checkpoint, or it is not for these classes or this model.
    """
    with session_of(config, writes=False) as session:
        val = find_images(config.data_set, config.data_path, config.eval_data_path, train=False)
        class_names = check_classes([val], config.nb_classes)
        model = build_model(config, len(class_names)).to(session.device)
        precision = Precision(resolve_amp_dtype(config.amp_dtype, session.device), session.device)
        evaluation = build_evaluation(config, val, session, precision)
        source = checkpoint_to_evaluate(config)
        if config.model_ema and Path(source).name != BEST_EMA:  # there the model is the average
            load_whole(model, source, "model_ema", config, class_names)
            logger.info("the moving average of the weights:")
            evaluation(model, 0)
        load_whole(model, source, config.model_key, config, class_names)
        return evaluation(model, 0)


def checkpoint_to_evaluate(config: FinetuningConfig) -> str:
    """Returns the checkpoint that ``--eval`` is about.

    Raises:
        InputError: There is none.
    """
    found = config.resume
    if not found and config.auto_resume and config.output_dir:
        found = distributed.on_main(lambda: str(newest_checkpoint(Path(config.output_dir)) or ""))
    if not (found or config.finetune):
        raise InputError(
            "--eval has nothing to evaluate: give the checkpoint as --resume, or its folder as --output_dir"
        )
    return found or config.finetune


def load_whole(
    model: VisionTransformer, source: str, model_key: str, config: FinetuningConfig, class_names: Sequence[str]
) -> None:
    """Loads a checkpoint that must fill the whole model, its head as well, and be of these classes.

    Raises:
        InputError: It does not, or is of others.
    """
    weights, metadata = read_weights(source, model_key, config.model_prefix)
    report = load_weights(model, weights, metadata)
    logger.info("%s", report.summary())
    labels = [str(label) for label in metadata.get("labels") or ()]
    for number, (label, name) in enumerate(zip(labels, class_names, strict=False)):
        if len(labels) == len(class_names) and label != name:
            raise InputError(f"{source}: class {number} of the checkpoint is {label!r}, that of the data {name!r}")
    recorded, given = metadata.get("mean"), normalization(config)[0]
    if recorded is not None and not torch.allclose(torch.tensor(recorded), torch.tensor(given)):
        logger.warning(
            "%s was trained on images normalised with mean %s and is given mean %s: check "
            "--imagenet_default_mean_and_std",
            source,
            list(recorded),
            list(given),
        )
    if report.unexpected:
        raise InputError(
            f"{source} has {len(report.unexpected)} tensors without a place in this model, such as "
            f"{report.unexpected[0]}; check --model and its options"
        )
    if report.missing:
        reasons = {report.dropped[name] for name in report.missing if name in report.dropped}
        named = f"{', '.join(report.missing[:3])}{' …' if len(report.missing) > 3 else ''}"
        raise InputError(
            f"{source} does not fill this model of {model.num_classes} classes, it lacks {named}"
            f"{''.join(f' ({reason})' for reason in reasons)}; check the data, --model and its options"
        )


def find_data(config: FinetuningConfig) -> tuple[LabelledImages, LabelledImages | None, tuple[str, ...]]:
    """Finds the training images, the validation images (or None) and the names of their classes.

    Raises:
        InputError: Images are missing, or their classes are not as they should be.
    """

    def find(train: bool) -> LabelledImages:
        return find_images(
            config.data_set, config.data_path, config.eval_data_path, train=train, download=config.download_data
        )

    if config.download_data:
        distributed.on_main(lambda: find(train=True) and None)  # one process fetches for all
    train = find(train=True)
    val = None if config.disable_eval_during_finetuning else find(train=False)
    class_names = check_classes([train, val] if val else [train], config.nb_classes)
    if mixes(config) and len(class_names) < 2:
        raise InputError(f"mixup and cutmix need two classes or more; {train.root} has {len(class_names)}")
    return train, val, class_names


def model_arguments(config: FinetuningConfig, num_classes: int) -> dict[str, Any]:
    """Returns the keywords of the model's constructor."""
    arguments = {
        "img_size": config.input_size,
        "num_classes": num_classes,
        "drop_rate": config.drop,
        "attn_drop_rate": config.attn_drop_rate,
        "drop_path_rate": config.drop_path,
        "init_values": config.layer_scale_init_value,
        "init_scale": config.init_scale,
        "use_mean_pooling": config.use_mean_pooling,
        "use_rel_pos_bias": config.rel_pos_bias,
        "use_abs_pos_emb": config.abs_pos_emb,
    }
    return {**arguments, **(config.model_kwargs or {})}


def build_model(config: FinetuningConfig, num_classes: int) -> VisionTransformer:
    """Creates the classifier, at the size of the images.

    Raises:
        InputError: The name is unknown or not a classifier, or an option does not fit.
    """
    if config.model in list_models("*_8k_vocab"):
        raise InputError(
            f"--model {config.model} is a pre-training model; fine-tuning needs {config.model[: -len('_8k_vocab')]}"
        )
    try:
        model = create_model(config.model, **model_arguments(config, num_classes))
    except TypeError as error:
        raise InputError(f"--model {config.model} cannot be built: {error}") from error
    assert isinstance(model, VisionTransformer)
    published = re.search(r"_(\d+)$", config.model)
    if published and size_pair(int(published[1])) != model.img_size:
        logger.info("--model %s, at %d x %d pixels as --input_size says", config.model, *model.img_size)
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model


def build_optimizer(config: FinetuningConfig, model: VisionTransformer, device: torch.device) -> torch.optim.Optimizer:
    """Creates the optimizer, with a learning rate of its own for each layer."""
    no_decay = model.no_weight_decay()
    if config.disable_weight_decay_on_rel_pos_bias:
        no_decay |= {name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")}
    groups = parameter_groups(
        model,
        config.weight_decay,
        no_decay=no_decay,
        layer_id=model.layer_id if config.layer_decay < 1 else None,
        num_layers=model.get_num_layers(),
        layer_decay=config.layer_decay,
    )
    return optimizer_for(config, groups, device)


def build_ema(config: FinetuningConfig, model: VisionTransformer) -> ModelEmaV3 | None:
    """Creates the moving average of the weights, if there is to be one."""
    if not config.model_ema:
        return None
    device = torch.device("cpu") if config.model_ema_force_cpu else None
    return ModelEmaV3(model, decay=config.model_ema_decay, device=device)


def build_loader(config: FinetuningConfig, train: LabelledImages, session: Session) -> EpochLoader:
    """Creates the loader of augmented training images."""
    mean, std = normalization(config)
    transform = ClassificationTransform(
        size_pair(config.input_size),
        mean=mean,
        std=std,
        interpolation=config.train_interpolation,
        auto_augment=config.aa,
        color_jitter=config.color_jitter,
        erasing=config.reprob,
        erasing_mode=config.remode,
        erasing_count=config.recount,
    )
    return epoch_loader(labelled_dataset(train, transform, config.seed), config, session)


class Classification:
    """The objective: cross-entropy with smoothed or mixed labels.

    Args:
        mean: Mean of the model's input, per channel.
        std: Standard deviation of the model's input, per channel.
        smoothing: Share of the target that is spread over all classes.
        mixup: timm's mixup and cutmix, which smooths by itself; None for none. It draws from NumPy's global generator,
            which the loop seeds for every step.
    """

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], *, smoothing: float = 0.0, mixup: Mixup | None = None
    ) -> None:
        self._mean, self._std = mean, std
        self.mixup = mixup
        self.loss: nn.Module = nn.CrossEntropyLoss()
        if mixup is not None:
            self.loss = SoftTargetCrossEntropy()
        elif smoothing > 0:
            self.loss = LabelSmoothingCrossEntropy(smoothing)

    def __call__(self, model: nn.Module, batch: Batch, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch and, of images that are not mixed, the share classified right: ``class_acc``."""
        images, labels = model_input(batch, self._mean, self._std), batch["label"]
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
            return self.loss(model(images).float(), targets), {}
        logits = model(images).float()
        return self.loss(logits, labels), {"class_acc": (logits.detach().argmax(dim=-1) == labels).float().mean()}


def build_objective(config: FinetuningConfig, num_classes: int) -> Classification:
    """Creates the loss, with mixup and cutmix where they are asked for."""
    mixup = Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        cutmix_minmax=config.cutmix_minmax,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )
    return Classification(*normalization(config), smoothing=config.smoothing, mixup=mixup if mixes(config) else None)


def model_input(batch: Batch, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Returns the images of a batch as the model reads them; those with erased parts come normalised already."""
    images = batch["image"]
    return images if images.is_floating_point() else normalize(images, mean, std)


def build_eval_transform(config: FinetuningConfig) -> ClassificationEvalTransform:
    """Creates the transform of validation images."""
    return ClassificationEvalTransform(size_pair(config.input_size), crop_pct=config.crop_pct)


def build_evaluation(
    config: FinetuningConfig, val: LabelledImages, session: Session, precision: Precision
) -> Callable[[nn.Module, int], Metrics]:
    """Returns the evaluation on the validation images."""
    dataset = labelled_dataset(val, build_eval_transform(config), config.seed, strict=True)
    loader = epoch_loader(dataset, config, session, shuffle=False, drop_last=False)
    mean, std = normalization(config)
    return lambda model, _epoch: evaluate(model, loader, precision, mean=mean, std=std)


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: EpochLoader, precision: Precision, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Metrics:
    """Classifies a data set, each image once over all processes; those that cannot be read are left out.

    Returns:
        ``loss``, the mean cross-entropy, and ``acc1`` and ``acc5``: the percentage of images whose class is the first,
        or among the first five answers (among all of fewer than five).
    """
    model.eval()
    device = next(model.parameters()).device  # a moving average may stay on the host
    totals = torch.zeros(4, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    for host_batch in loader.epoch(0):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in host_batch.items()}
        with precision.autocast(), uncompiled():
            logits = model(model_input(batch, mean, std)).float()
        readable = batch["label"] >= 0
        logits, labels = logits[readable], batch["label"][readable]
        right = logits.topk(min(TOP_K, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        totals[0] += F.cross_entropy(logits, labels, reduction="sum")
        totals[1] += right[:, 0].sum()
        totals[2] += right.sum()
        totals[3] += len(labels)
    loss, first, among_first, images = distributed.sum_over_ranks(totals.to(precision.device)).tolist()
    results = {"loss": loss / images, "acc1": 100 * first / images, "acc5": 100 * among_first / images}
    logger.info("%d images", images)
    logger.info("* Acc@1 %.3f Acc@5 %.3f loss %.3f", results["acc1"], results["acc5"], results["loss"])
    return results


def description(config: FinetuningConfig, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Returns what a checkpoint records for whoever uses its model without these flags.

    Returns:
        ``labels``, the names of the classes by id, and how an image is made ready: ``crop_pct``, ``interpolation``,
        ``mean`` and ``std``. (The size of the images is in the settings.)
    """
    transform = build_eval_transform(config)
    mean, std = normalization(config)
    return {
        "labels": list(class_names),
        "crop_pct": transform.crop_pct,
        "interpolation": transform.interpolation,
        "mean": list(mean),
        "std": list(std),
    }


def log_summary(config: FinetuningConfig, trainer: Trainer, num_classes: int) -> None:
    """Says what is about to run."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    logger.info(
        "model %s: %s parameters, %d classes, %s", config.model, f"{parameters:,}", num_classes, trainer.precision.dtype
    )
    logger.info(
        "batch %d = %d images x %d processes x %d batches an update; %d updates an epoch, %d epochs; "
        "lr %g, layer decay %g",
        effective_batch(config),
        config.batch_size,
        distributed.world_size(),
        config.update_freq,
        trainer.steps_per_epoch,
        config.epochs,
        config.lr,
        config.layer_decay,
    )
