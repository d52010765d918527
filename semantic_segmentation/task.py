"""Training of a segmentor on a pre-trained backbone (arXiv 2106.08254, section 3.2), counted in optimizer steps."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.checkpoints.heads import match_classes
from beit.checkpoints.load import load_weights
from beit.checkpoints.read import read_weights
from beit.data.hub import TRAINING, has_split
from beit.data.loaders import EpochLoader
from beit.data.transforms import normalize
from beit.errors import InputError, counted
from beit.tasks.base import Evaluation, Metrics, Result, Schedule, Task, run
from beit.training.optim import parameter_groups
from beit.training.schedules import WarmupPoly
from beit.training.state import Batch, LoopSettings, Period, StepFunction
from semantic_segmentation.batch_norm import synchronise_batch_norm
from semantic_segmentation.config import TrainConfig, check, completed
from semantic_segmentation.data import SegmentationDataset, find_classes, pairs_of
from semantic_segmentation.heads import resize
from semantic_segmentation.inference import Statistics
from semantic_segmentation.metrics import IGNORED, scores
from semantic_segmentation.modeling import Segmentor, heads_in, load_segmentor
from semantic_segmentation.testing import build_model, build_test, check_data
from semantic_segmentation.transforms import TrainTransform

logger = logging.getLogger(f"beit.{__name__}")

STATISTICS = Statistics()  # of every training, whatever the backbone was trained with


def main(config: TrainConfig) -> Result:
    """Trains a segmentor as the settings say."""
    return run(Segmentation(completed(config)))


class Segmentation(Task[TrainConfig]):
    """A pre-trained backbone below new heads; the lower a layer, the lower its learning rate."""

    model: Segmentor
    best_metric = "mIoU"

    def check(self) -> None:
        check(self.config)

    def prepare(self) -> None:
        config, place, self.val = self.config, self.config.data_path, None
        self.train = pairs_of(place, config.train_images, config.train_annotations, TRAINING)
        if not config.disable_eval:
            if has_split(place):
                raise InputError(f"{place}: leave out the split, of which training and evaluation have one each")
            self.val = pairs_of(place, config.val_images, config.val_annotations)
        self.classes = find_classes(place, config.classes, config.reduce_zero_label)
        check_data(config, [self.train, *([self.val] if self.val else [])], self.classes)

    def build_model(self) -> Segmentor:
        segmentor = build_model(self.config, len(self.classes))
        start_from(segmentor, self.config.init_from, self.classes.names)
        if self.session.world_size > 1:
            synchronise_batch_norm(segmentor)
        return segmentor

    def build_loader(self) -> EpochLoader:
        config = self.config
        transform = TrainTransform(
            image_scale=config.image_scale,
            ratio_range=config.ratio_range,
            crop_size=config.crop_size,
            cat_max_ratio=config.cat_max_ratio,
            flip=config.flip,
            photometric=config.photometric_distortion,
        )
        reduce, classes = config.reduce_zero_label, len(self.classes)
        return self.loader_of(
            SegmentationDataset(self.train, transform, config.seed, num_classes=classes, reduce_zero_label=reduce)
        )

    def build_objective(self) -> StepFunction:
        return PixelClassification(auxiliary_weight=self.config.auxiliary_weight, average=self.config.loss_average)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the parameters with a learning rate of their own for each layer.

        As in the official code, class token and position embedding decay here, although they do not elsewhere: it
        compares their names without the prefix that they have in a segmentor.
        """
        return parameter_groups(
            self.model,
            self.config.weight_decay,
            layer_id=self.model.layer_id,
            num_layers=self.model.get_num_layers(),
            layer_decay=self.config.layer_decay,
        )

    def loop_settings(self) -> LoopSettings:
        return self.settings_for(self.config.max_steps, Period("step"))

    def schedules(self, settings: LoopSettings) -> tuple[Schedule, None]:
        """Returns the learning rate of the heads: that of the last of the batches of a step, as in mmsegmentation."""
        config, batches = self.config, self.config.update_freq
        total, warmup = settings.total_steps * batches, config.warmup_steps * batches
        schedule = WarmupPoly(config.lr, config.min_lr, total, warmup, config.warmup_ratio, config.power)
        return lambda step: schedule((step + 1) * batches - 1), None

    def build_evaluation(self) -> Evaluation | None:
        if self.val is None:
            return None
        test = build_test(self.config, self.val, self.classes, self.session, self.precision, STATISTICS)

        def evaluation(segmentor: nn.Module, _step: int) -> Metrics:
            assert isinstance(segmentor, Segmentor)
            results = scores(test(segmentor))
            logger.info("%s", results.summary())
            logger.info("per class, in percent:\n%s", results.table(self.classes.names))
            return results.means()

        return evaluation

    def extras(self) -> Mapping[str, object]:
        segmentor = self.model
        return {
            "labels": list(self.classes.names),
            "palette": [list(colour) for colour in self.classes.colours],
            "image_size": list(segmentor.img_size),
            "num_heads": segmentor.backbone.num_heads,
            "out_indices": list(segmentor.backbone.out_indices),
            "mean": list(STATISTICS.mean),
            "std": list(STATISTICS.std),
            "reduce_zero_label": self.config.reduce_zero_label,
            "data": self.train.fingerprint(),
            **({"eval_data": self.val.fingerprint()} if self.val else {}),
        }

    def summary(self) -> Iterator[str]:
        config, val = self.config, len(self.val or ())
        yield from super().summary()
        classes, images = counted(len(self.classes), "class"), counted(val, "validation image")
        yield f"{classes}, {len(self.train)} training and {images}"
        yield f"lr {config.lr:g}, layer decay {config.layer_decay:g}"


def start_from(segmentor: Segmentor, source: str, classes: Sequence[str]) -> None:
    """Loads a segmentor for ``classes``, or any other model as backbone; raises InputError if it does not fit."""
    if not source:
        logger.warning("no --init_from: the backbone is initialised from scratch")
        return
    weights, metadata = read_weights(source)
    if metadata.get("segmentation"):
        heads_in(weights, source)  # says so if there are none that fit
        weights, metadata, _ = match_classes(weights, metadata, segmentor.state_dict(), classes)
        load_segmentor(segmentor, weights, metadata, source)
        return
    report = load_weights(segmentor.backbone, weights, metadata)
    (logger.warning if report.unexpected else logger.info)("%s", report.summary())


class PixelClassification:
    """The objective: cross-entropy at every pixel, of the head and, with a weight, of the auxiliary head.

    The average is over ``"all"`` pixels, those without a label count as 0, as the published recipes were tuned; or over
    the ``"valid"`` ones, which have a label.
    """

    def __init__(self, *, auxiliary_weight: float = 0.4, average: str = "all") -> None:
        self.auxiliary_weight, self.average = auxiliary_weight, average

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
    """Returns the normalised images ``(B, 3, H, W)``, with 0 beyond the heights and widths in ``size``, ``(B, 2)``."""
    images = normalize(batch["image"], *STATISTICS)
    height, width = batch["size"][:, :, None].unbind(1)  # (B, 1) each
    rows = torch.arange(images.shape[2], device=images.device) < height  # (B, H)
    columns = torch.arange(images.shape[3], device=images.device) < width  # (B, W)
    return images * (rows[:, None, :, None] & columns[:, None, None, :])


def pixel_loss(logits: Tensor, labels: Tensor, average: str) -> Tensor:
    """Returns the cross-entropy of logits ``(B, K, H, W)`` at labels ``(B, H, W)``, of which 255 is none.

    The sum is divided by the number of ``"all"`` pixels, or of those with a label (``"valid"``).
    """
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    count = labels.numel() if average == "all" else (labels != IGNORED).sum().clamp(min=1)
    return total / count


def pixel_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the pixel accuracy over the labelled pixels."""
    right = (logits.argmax(dim=1) == labels).sum()
    return right / (labels != IGNORED).sum().clamp(min=1)
