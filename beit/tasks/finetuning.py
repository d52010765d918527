"""Fine-tuning for image classification (arXiv 2106.08254, section 2.6), and evaluation of the result."""

import dataclasses
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from beit.checkpoints.heads import match_classes
from beit.checkpoints.load import load_pretrained, load_weights
from beit.checkpoints.read import preparation_of, read_weights
from beit.data.classification import ClassificationEvalTransform, ClassificationTransform, labelled_dataset
from beit.data.loaders import EpochLoader
from beit.data.preprocessing import COLOURS
from beit.data.transforms import normalize, size_pair
from beit.errors import InputError, counted, listed
from beit.modeling import VisionTransformer
from beit.tasks.base import (
    Evaluation,
    Metrics,
    Result,
    Task,
    checkpoint_to_evaluate,
    evaluated,
    find_labelled,
    fingerprints,
    image_statistics,
    named_model,
    opened,
    run,
    warn_of_preparation,
)
from beit.tasks.settings import FinetuningConfig
from beit.training import distributed
from beit.training.accuracy import count_correct, rates, zero_counts
from beit.training.checkpoint import BEST_EMA
from beit.training.compilation import uncompiled
from beit.training.loop import to_device
from beit.training.optim import parameter_groups
from beit.training.precision import Precision
from beit.training.state import Average, Batch, StepFunction

logger = logging.getLogger(__name__)


def main(config: FinetuningConfig) -> Result:
    """Fine-tunes a classifier, or evaluates one, as the settings say."""
    task = Finetuning(config)
    return evaluated(evaluate_checkpoint(task.config)) if task.config.eval else run(task)


class Finetuning(Task[FinetuningConfig]):
    """A pre-trained backbone below a new linear head; the lower a layer, the lower its learning rate."""

    best_metric = "acc1"
    evaluate_average = True

    def __init__(self, config: FinetuningConfig) -> None:
        super().__init__(config)
        self.batch_multiple = 2 if self.config.mixes else 1

    def check(self) -> None:
        shares = self.config.cutmix_minmax
        if shares is not None and not (len(shares) == 2 and shares[0] <= shares[1]):
            raise InputError("--cutmix_minmax takes two shares of a side, the smallest first")
        if self.config.robust_test and not self.config.eval:
            raise InputError(f"--robust_test {self.config.robust_test}: is a way to evaluate; give --eval too")
        if self.config.mixes and self.config.batch_size % 2:
            raise InputError(f"--batch_size {self.config.batch_size}: must be even, as mixup and cutmix pair images")

    def prepare(self) -> None:
        config = self.config
        self.train, self.val, self.class_names = find_labelled(
            config,
            config.nb_classes,
            trains=not config.eval,
            evaluates=config.eval or not config.disable_eval_during_finetuning,
            download=config.download_data,
        )
        if config.mixes and len(self.class_names) < 2:
            raise InputError(f"mixup and cutmix need two classes or more; {config.data_path} has one")
        if config.robust_test:
            check_variant(config.robust_test, self.class_names)
        self.mean, self.std = image_statistics(config)
        self.eval_transform = ClassificationEvalTransform(
            config.input_size, crop_pct=config.crop_pct, in_chans=config.in_chans
        )

    def build_model(self) -> VisionTransformer:
        config = self.config
        model = build_model(config, len(self.class_names))
        if config.init_from:
            key, prefix = config.model_key, config.model_prefix
            load_pretrained(model, config.init_from, model_key=key, prefix=prefix, classes=self.class_names)
        return model

    def build_loader(self) -> EpochLoader:
        config = self.config
        transform = ClassificationTransform(
            size_pair(config.input_size),
            mean=self.mean,
            std=self.std,
            interpolation=config.train_interpolation,
            auto_augment=config.aa,
            color_jitter=config.color_jitter,
            erasing=config.reprob,
            erasing_mode=config.remode,
            erasing_count=config.recount,
        )
        assert self.train is not None
        return self.loader_of(labelled_dataset(self.train, transform, config.seed))

    def build_objective(self) -> StepFunction:
        config = self.config
        mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            cutmix_minmax=config.cutmix_minmax,
            prob=config.mixup_prob,
            switch_prob=config.mixup_switch_prob,
            mode=config.mixup_mode,
            label_smoothing=config.smoothing,
            num_classes=len(self.class_names),
        )
        return Classification(self.mean, self.std, config.smoothing, mixup if config.mixes else None)

    def parameter_groups(self) -> list[dict[str, Any]]:
        config, model = self.config, self.model
        assert isinstance(model, VisionTransformer)
        no_decay = model.no_weight_decay()
        if config.disable_weight_decay_on_rel_pos_bias:
            no_decay |= {name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")}
        return parameter_groups(
            model,
            config.weight_decay,
            no_decay=no_decay,
            layer_id=model.layer_id if config.layer_decay < 1 else None,
            num_layers=model.get_num_layers(),
            layer_decay=config.layer_decay,
        )

    def build_average(self) -> Average | None:
        device = torch.device("cpu") if self.config.model_ema_force_cpu else None
        return Average(self.model, self.config.model_ema_decay, device=device) if self.config.model_ema else None

    def build_evaluation(self) -> Evaluation | None:
        if self.val is None:
            return None
        dataset = labelled_dataset(self.val, self.eval_transform, self.config.seed, strict=True)
        loader = self.loader_of(dataset, training=False)
        return lambda model, _epoch: evaluate(model, loader, self.precision, mean=self.mean, std=self.std)

    def extras(self) -> Mapping[str, object]:
        return {
            "labels": list(self.class_names),
            "crop_pct": self.eval_transform.crop_pct,
            "interpolation": self.eval_transform.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
            **fingerprints(self.train, self.val),
        }

    def summary(self) -> Iterator[str]:
        yield from super().summary()
        decay, steps = self.config.model_ema_decay, self.loop_settings().total_steps
        if self.config.model_ema and (left := decay**steps) > 0.1:
            text = "--model_ema_decay %g: the average ends as %.0f %% weights of the start; for %d steps try %.4g"
            logger.warning(text, decay, 100 * left, steps, max(0.0, 1 - 10 / steps))
        classes = counted(len(self.class_names), "class")
        yield f"{classes}; lr {self.config.lr:g}, layer decay {self.config.layer_decay:g}"


def evaluate_checkpoint(config: FinetuningConfig) -> Metrics:
    """Evaluates a checkpoint, for ``--eval``; :class:`InputError` if it is missing or does not know the classes.

    Images are cropped as the checkpoint records, unless ``--crop_pct`` is given. With fewer classes in the data than
    it has learnt, only these compete, matched by name.
    """
    task = Finetuning(dataclasses.replace(config, eval=True))
    with opened(task, writes=False) as session:
        config = task.config
        model = build_model(config, len(task.class_names)).to(session.device)
        source = checkpoint_to_evaluate(config, config.init_from)
        averaged = config.model_ema and Path(source).name != BEST_EMA  # there the model is the average
        results: Metrics = {}
        for model_key in (*(("model_ema",) if averaged else ()), config.model_key):
            if model_key == "model_ema":
                logger.info("the moving average of the weights:")
            metadata = load_whole(model, source, model_key, task)
            task.eval_transform = recorded_transform(config, metadata, source)
            evaluation = task.build_evaluation()
            assert evaluation is not None
            results = evaluation(model, 0)
        return results


def check_variant(name: str, class_names: Sequence[str]) -> None:
    """Raises :class:`InputError` unless the classes are those of ImageNet-R or -A, WordNet ids as timm lists them."""
    theirs = resources.files("timm.data").joinpath(f"_info/{name}_synsets.txt").read_text(encoding="utf-8").split()
    if odd := sorted({*theirs} ^ {*class_names}):
        raise InputError(
            f"--robust_test {name}: needs its {len(theirs)} classes, each a folder named by its WordNet id; {len(odd)} "
            f"are missing or others: {listed(odd)}"
        )


def recorded_transform(
    config: FinetuningConfig, metadata: Mapping[str, Any], source: str
) -> ClassificationEvalTransform:
    """Returns how images are evaluated: as a checkpoint for this input size records, unless ``--crop_pct`` differs."""
    size = size_pair(config.input_size)
    if metadata.get("image_size", size) != size:
        return ClassificationEvalTransform(config.input_size, crop_pct=config.crop_pct, in_chans=config.in_chans)
    known = {key: value for key, value in preparation_of(dict(metadata), size).items() if key not in ("mean", "std")}
    if config.crop_pct is not None:
        if not math.isclose(config.crop_pct, metadata.get("crop_pct", config.crop_pct)):
            logger.warning("--crop_pct %g, where %s records %g", config.crop_pct, source, metadata["crop_pct"])
        known |= {"crop_pct": config.crop_pct, "crop_mode": "center"}
    return ClassificationEvalTransform(size, **known, in_chans=config.in_chans)


def load_whole(model: VisionTransformer, source: str, model_key: str, task: Finetuning) -> Mapping[str, Any]:
    """Loads a checkpoint that must fill the model, with a head that knows the data's classes; returns its metadata.

    Raises :class:`InputError` if it does not.
    """
    weights, metadata = read_weights(source, model_key, task.config.model_prefix)
    weights, metadata, unknown = match_classes(weights, metadata, model.state_dict(), task.class_names)
    if unknown:
        raise InputError(f"{source} has not learnt {len(unknown)} of the data's classes: {listed(unknown)}")
    report = load_weights(model, weights, metadata)
    if report.unexpected or report.missing:
        raise InputError(
            f"{source} does not fill this model of {model.num_classes} classes ({report.summary()}): check the data, "
            "--model and its options"
        )
    logger.info("%s", report.summary())
    warn_of_preparation(source, metadata, mean=task.mean)
    return metadata


def build_model(config: FinetuningConfig, num_classes: int) -> VisionTransformer:
    """Creates the classifier at ``--input_size``; :class:`InputError` for a bad name or an option that does not fit."""
    model = named_model(
        config,
        img_size=config.input_size,
        num_classes=num_classes,
        drop_rate=config.drop,
        attn_drop_rate=config.attn_drop_rate,
        drop_path_rate=config.drop_path,
        init_scale=config.init_scale,
        use_mean_pooling=config.use_mean_pooling,
        use_rel_pos_bias=config.rel_pos_bias,
    )
    assert isinstance(model, VisionTransformer)
    published = re.search(r"_(\d+)$", config.model)
    if published and size_pair(int(published[1])) != model.img_size:
        logger.info("--model %s, at %d x %d pixels as --input_size says", config.model, *model.img_size)
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model


class Classification:
    """The objective: cross-entropy with smoothed or mixed labels.

    timm's mixup and cutmix, which also smooth, draw from NumPy's global generator, seeded per step.
    """

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], smoothing: float = 0.0, mixup: Mixup | None = None
    ) -> None:
        self._mean, self._std = mean, std
        self.mixup = mixup
        self.loss: nn.Module = nn.CrossEntropyLoss()
        if mixup is not None:
            self.loss = SoftTargetCrossEntropy()
        elif smoothing > 0:
            self.loss = LabelSmoothingCrossEntropy(smoothing)

    def __call__(self, model: nn.Module, batch: Batch, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch and, without mixing, the share of images classified correctly, ``class_acc``."""
        images, labels = model_input(batch, self._mean, self._std), batch["label"]
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
            return self.loss(model(images).float(), targets), {}
        logits = model(images).float()
        return self.loss(logits, labels), {"class_acc": (logits.detach().argmax(dim=-1) == labels).float().mean()}


def model_input(batch: Batch, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Returns the images of a batch normalised; those of 8-bit colours with erased parts already are."""
    images = batch["image"]
    return images if images.is_floating_point() and len(mean) == COLOURS else normalize(images, mean, std)


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: EpochLoader, precision: Precision, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Metrics:
    """Returns mean ``loss``, ``acc1`` and ``acc5`` (percent); each image counts once, unreadable ones are skipped."""
    model.eval()
    device = next(model.parameters()).device  # a moving average may be kept on the host
    counts = zero_counts(device)
    for host_batch in loader.epoch(0):
        batch = to_device(host_batch, device)
        with precision.autocast(), uncompiled():
            logits = model(model_input(batch, mean, std))
        counts += count_correct(logits, batch["label"])
    counts = distributed.sum_over_ranks(counts.to(precision.device))
    results = dict(rates(counts))
    logger.info("%s", counted(int(counts[3]), "image"))
    logger.info("* Acc@1 %.3f Acc@5 %.3f loss %.3f", results["acc1"], results["acc5"], results["loss"])
    return results
