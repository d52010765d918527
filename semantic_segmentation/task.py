"""Training of a segmentor on a pre-trained backbone (arXiv 2106.08254, section 3.2), counted in iterations."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.checkpoints.load import load_pretrained, read_weights
from beit.config import to_plain
from beit.data.loaders import EpochLoader, RoundLoader
from beit.data.transforms import normalize, size_pair
from beit.tasks.options import optimizer_for, session_of
from beit.training import distributed
from beit.training.loop import Batch, LoopSettings, Trainer
from beit.training.optim import parameter_groups
from beit.training.precision import Precision, resolve_amp_dtype
from beit.training.schedules import WarmupPoly
from beit.training.session import Session
from semantic_segmentation.batch_norm import synchronise_batch_norm
from semantic_segmentation.config import TrainConfig, check_settings, intervals
from semantic_segmentation.data import ImagePairs, SegmentationClasses, SegmentationDataset, find_classes, find_pairs
from semantic_segmentation.heads import resize
from semantic_segmentation.inference import Statistics
from semantic_segmentation.metrics import IGNORED, scores
from semantic_segmentation.modeling import Segmentor, load_segmentor
from semantic_segmentation.testing import build_model, build_test, check_data
from semantic_segmentation.transforms import TrainTransform

logger = logging.getLogger(f"beit.{__name__}")

STATISTICS = Statistics()  # of every training, whatever the backbone learnt with


def main(config: TrainConfig) -> None:
    """Trains a segmentor as the settings say."""
    check_settings(config)
    with session_of(config) as session:
        data = find_data(config)
        # The pre-trained backbone below new heads; the lower a layer, the less it is to change.
        segmentor = build_model(config, len(data.classes))
        start_from_checkpoint(segmentor, config)
        segmentor.to(session.device)
        if session.world_size > 1:
            synchronise_batch_norm(segmentor)

        loader = build_loader(config, data, session)
        precision = Precision(resolve_amp_dtype(config.amp_dtype, session.device), session.device)
        trainer = Trainer(
            segmentor,
            PixelClassification(auxiliary_weight=config.auxiliary_weight, average=config.loss_average),
            loader,
            build_optimizer(config, segmentor, session.device),
            precision,
            loop_settings(config),
            learning_rate(config),
            folder=session.folder,
            log_dir=config.log_dir,
            config=to_plain(config),
            extras=description(segmentor, data.classes),
            evaluate=build_evaluation(config, data, session, precision),
        )
        session.resume(trainer, path=config.resume_from, auto=config.auto_resume, start_epoch=0)
        log_summary(config, trainer, data)
        trainer.fit()


@dataclass(frozen=True)
class Data:
    """What is trained and evaluated on.

    Args:
        train: Images and label maps to train on.
        val: Those to evaluate on; None for no evaluation.
        classes: What the labels mean.
    """

    train: ImagePairs
    val: ImagePairs | None
    classes: SegmentationClasses


def find_data(config: TrainConfig) -> Data:
    """Finds images, label maps and classes.

    Raises:
        InputError: Some are missing, do not pair, or say nothing.
    """
    root = Path(config.data_root)
    train = find_pairs(root / config.train_images, root / config.train_annotations)
    val = None if config.no_validate else find_pairs(root / config.val_images, root / config.val_annotations)
    classes = find_classes(root, config.classes, config.reduce_zero_label)
    check_data(config, [train] if val is None else [train, val], classes)
    return Data(train, val, classes)


def start_from_checkpoint(segmentor: Segmentor, config: TrainConfig) -> None:
    """Loads a whole segmentor (``--load-from``), or a pre-trained backbone (``pretrained``), if there is to be one."""
    if config.load_from:
        load_segmentor(segmentor, *read_weights(config.load_from), config.load_from)
    elif config.pretrained:
        load_pretrained(segmentor.backbone, config.pretrained)
    else:
        logger.warning("neither pretrained nor --load-from is given: the backbone starts from scratch")


def build_loader(config: TrainConfig, data: Data, session: Session) -> RoundLoader:
    """Creates the loader of training crops; a round of it is what lies between two looks at the validation images."""
    transform = TrainTransform(
        image_scale=(config.image_scale[0], config.image_scale[1]),
        ratio_range=(config.ratio_range[0], config.ratio_range[1]),
        crop_size=size_pair(config.crop_size),
        cat_max_ratio=config.cat_max_ratio,
        flip=config.flip,
        photometric=config.photometric_distortion,
    )
    dataset = SegmentationDataset(
        data.train, transform, config.seed, num_classes=len(data.classes), reduce_zero_label=config.reduce_zero_label
    )
    loader = EpochLoader(
        dataset,
        config.samples_per_gpu,
        seed=config.seed,
        rank=session.rank,
        world_size=session.world_size,
        num_workers=config.num_workers,
        pin_memory=config.pin_mem and session.device.type == "cuda",
    )
    return RoundLoader(loader, round_length(config))


def round_length(config: TrainConfig) -> int:
    """Returns the iterations of a round: evaluations and checkpoints fall on the ends of rounds."""
    return math.gcd(*intervals(config))


def loop_settings(config: TrainConfig) -> LoopSettings:
    """Returns how long and how often, in rounds."""
    evaluation, checkpoint = intervals(config)
    length = round_length(config)
    return LoopSettings(
        epochs=config.max_iters // length,
        update_freq=config.update_freq,
        clip_grad=config.clip_grad,
        log_every=config.log_every,
        save_epochs=checkpoint // length,
        save_steps=config.save_ckpt_steps,
        evaluate_epochs=evaluation // length,
        best_metric="mIoU",
        count_steps=True,
        seed=config.seed,
    )


def learning_rate(config: TrainConfig) -> Callable[[int], float]:
    """Returns the learning rate of the heads at an optimizer step: that of the last of the iterations it is made of."""
    schedule = WarmupPoly(
        config.lr, config.min_lr, config.max_iters, config.warmup_iters, config.warmup_ratio, config.power
    )
    return lambda step: schedule((step + 1) * config.update_freq - 1)


def build_optimizer(config: TrainConfig, segmentor: Segmentor, device: torch.device) -> torch.optim.Optimizer:
    """Creates the optimizer, with a learning rate of its own for each layer.

    As in the official code, class token and position embedding decay here, although they do not elsewhere: it compares
    their names without the prefix that they have in a segmentor.
    """
    groups = parameter_groups(
        segmentor,
        config.weight_decay,
        layer_id=segmentor.layer_id,
        num_layers=segmentor.get_num_layers(),
        layer_decay=config.layer_decay,
    )
    return optimizer_for(config, groups, device)


class PixelClassification:
    """The objective: cross-entropy at every pixel, of the head and, with a weight, of the auxiliary head.

    Args:
        auxiliary_weight: Weight of the auxiliary head's loss.
        average: ``"all"``: over all pixels, those without a label count as 0, as the published recipes were tuned;
            ``"valid"``: over the pixels that have a label.
    """

    def __init__(self, *, auxiliary_weight: float = 0.4, average: str = "all") -> None:
        self.auxiliary_weight = auxiliary_weight
        self.average = average

    def __call__(self, model: nn.Module, batch: Batch, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch, and ``decode_loss``, ``aux_loss`` and ``pixel_acc``."""
        labels = batch["label"].long()  # (B, H, W)
        logits, auxiliary = model(model_input(batch))
        logits = resize(logits.float(), labels.shape[1:])  # (B, K, H, W)
        loss = pixel_loss(logits, labels, self.average)
        metrics = {"decode_loss": loss.detach(), "pixel_acc": pixel_accuracy(logits.detach(), labels)}
        if auxiliary is not None:
            auxiliary_loss = pixel_loss(resize(auxiliary.float(), labels.shape[1:]), labels, self.average)
            metrics["aux_loss"] = auxiliary_loss.detach()
            loss = loss + self.auxiliary_weight * auxiliary_loss
        return loss, metrics


def model_input(batch: Batch) -> Tensor:
    """Returns the images of a batch as the model reads them, with 0 for what is padding.

    Args:
        batch: ``image``, uint8 ``(B, 3, H, W)``, and ``size``, ``(B, 2)``: the height and width that is no padding.
    """
    images = normalize(batch["image"], *STATISTICS)
    height, width = batch["size"][:, :, None].unbind(1)  # (B, 1) each
    rows = torch.arange(images.shape[2], device=images.device) < height  # (B, H)
    columns = torch.arange(images.shape[3], device=images.device) < width  # (B, W)
    return images * (rows[:, None, :, None] & columns[:, None, None, :])


def pixel_loss(logits: Tensor, labels: Tensor, average: str) -> Tensor:
    """Returns the mean cross-entropy of logits ``(B, K, H, W)`` at labels ``(B, H, W)``, of which 255 is none.

    Args:
        logits: At the size of the labels.
        labels: Class of each pixel.
        average: What the sum is divided by: the number of ``"all"`` pixels, or of ``"valid"`` ones.
    """
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    count = labels.numel() if average == "all" else (labels != IGNORED).sum().clamp(min=1)
    return total / count


def pixel_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the share of the labelled pixels whose class is the likeliest."""
    right = (logits.argmax(dim=1) == labels).sum()
    return right / (labels != IGNORED).sum().clamp(min=1)


def build_evaluation(
    config: TrainConfig, data: Data, session: Session, precision: Precision
) -> Callable[[nn.Module, int], dict[str, float]] | None:
    """Returns the evaluation on the validation images: mIoU, mAcc and aAcc, as fractions."""
    if data.val is None:
        return None
    run = build_test(config, data.val, data.classes, session, precision, STATISTICS)

    def evaluation(segmentor: nn.Module, _round: int) -> dict[str, float]:
        assert isinstance(segmentor, Segmentor)
        results = scores(run(segmentor))
        logger.info("%s", results.summary())
        return {"mIoU": results.mIoU, "mAcc": results.mAcc, "aAcc": results.aAcc}

    return evaluation


def description(segmentor: Segmentor, classes: SegmentationClasses) -> dict[str, Any]:
    """Returns what a checkpoint records for whoever uses its model without these settings."""
    return {
        "labels": list(classes.names),
        "palette": [list(colour) for colour in classes.colours],
        "image_size": list(segmentor.img_size),
        "num_heads": segmentor.backbone.num_heads,
        "out_indices": list(segmentor.backbone.out_indices),
        "mean": list(STATISTICS.mean),
        "std": list(STATISTICS.std),
    }


def log_summary(config: TrainConfig, trainer: Trainer, data: Data) -> None:
    """Says what is about to run, and where it differs from what the recipe was tuned for."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    logger.info(
        "%s parameters, %d classes, %d training and %s validation images, %s",
        f"{parameters:,}",
        len(data.classes),
        len(data.train),
        "no" if data.val is None else len(data.val),
        trainer.precision.dtype,
    )
    batch = trainer.images_per_step
    logger.info(
        "batch %d = %d images x %d processes x %d batches an update; %d iterations; lr %g, layer decay %g",
        batch,
        config.samples_per_gpu,
        distributed.world_size(),
        config.update_freq,
        config.max_iters,
        config.lr,
        config.layer_decay,
    )
    evaluation, checkpoint = intervals(config)
    if 10 * (length := round_length(config)) < min(evaluation, checkpoint):
        logger.warning(
            "eval_interval %d and checkpoint_interval %d have only %d iterations in common, and each round of so few "
            "ends with a line in the log and a wait: make one a multiple of the other",
            evaluation,
            checkpoint,
            length,
        )
    if batch != config.recipe_batch:
        logger.warning(
            "the recipe's lr was tuned for a batch of %d and this run has %d: change samples_per_gpu, update_freq or "
            "the number of processes, or scale lr yourself",
            config.recipe_batch,
            batch,
        )
