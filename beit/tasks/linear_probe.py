"""The linear probe: linear classifiers on every block of a frozen backbone, trained together; the best is reported."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.checkpoints.load import load_weights
from beit.checkpoints.read import architecture_of, read_weights
from beit.data.classification import ClassificationEvalTransform, ClassificationTransform, labelled_dataset
from beit.data.loaders import EpochLoader
from beit.errors import InputError, counted
from beit.features import Feature, FrozenFeatures
from beit.modeling import Backbone
from beit.storage import weights_fingerprint
from beit.tasks.base import (
    Evaluation,
    Metrics,
    Result,
    Schedule,
    Task,
    find_labelled,
    fingerprints,
    image_statistics,
    named_model,
    run,
    warn_of_preparation,
)
from beit.tasks.settings import AUTO, OFFICIAL_NUM_LABELS, LinearProbeConfig
from beit.training import distributed
from beit.training.accuracy import count_correct, rates, zero_counts
from beit.training.loop import to_device
from beit.training.optim import create_optimizer
from beit.training.precision import Precision, resolve_amp_dtype
from beit.training.schedules import WarmupCosine
from beit.training.state import Batch, LoopSettings, StepFunction

logger = logging.getLogger(__name__)

BASE_BATCH = 256  # images per step that --base_lr is for
HEAD_STD = 0.01


def main(config: LinearProbeConfig) -> Result:
    """Probes a backbone as the settings say."""
    return run(LinearProbe(config))


class LinearProbe(Task[LinearProbeConfig]):
    """Linear heads on a frozen backbone. Gradients are not clipped: their common norm would couple the heads."""

    best_metric = "acc1"

    def build_precision(self) -> Precision:
        return Precision(torch.float32, self.device)

    def prepare(self) -> None:
        config = self.config
        wanted = 0 if config.nb_classes == OFFICIAL_NUM_LABELS else config.nb_classes
        train, val, self.class_names = find_labelled(config, wanted)
        assert train is not None
        assert val is not None
        self.train, self.val = train, val
        if config.nb_classes == OFFICIAL_NUM_LABELS != len(self.class_names):
            logger.info("%d classes, as in the data", len(self.class_names))
        self.mean, self.std = image_statistics(config)
        self.backbone = build_backbone(config).to(self.device)
        self.eval_transform = ClassificationEvalTransform(
            self.backbone.img_size, crop_pct=config.crop_pct, in_chans=config.in_chans
        )
        dtype = resolve_amp_dtype(config.amp_dtype if config.amp_forward else "fp32", self.device)
        self.features = FrozenFeatures(
            self.backbone,
            layers=config.layers,
            pools=config.pool or (("cls_mean",) if config.avgpool_patchtokens else ("cls",)),
            mean=self.mean,
            std=self.std,
            precision=Precision(dtype, self.device),
        )

    def build_model(self) -> "LinearHeads":
        return LinearHeads(self.features.features, len(self.class_names))

    def build_loader(self) -> EpochLoader:
        transform = ClassificationTransform(
            self.backbone.img_size,
            mean=self.mean,
            std=self.std,
            interpolation=self.config.train_interpolation,
            auto_augment="none",
            color_jitter=0.0,
            erasing=0.0,
        )
        return self.loader_of(labelled_dataset(self.train, transform, self.config.seed))

    def build_objective(self) -> StepFunction:
        return SideBySide(self.features)

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Creates the optimizer; all of a head has weight decay, its bias as well, as official."""
        config, decay = self.config, self.config.weight_decay
        if decay is None:
            decay = 0.0 if config.opt.lower() == "sgd" else 1e-4
        group = {"params": list(self.model.parameters()), "lr_scale": 1.0, "weight_decay": decay, "decays": True}
        return create_optimizer(config.opt, [group], lr=self.peak_lr())

    def peak_lr(self) -> float:
        if self.config.lr is not None:
            return self.config.lr
        return self.config.base_lr * self.images_per_step() / BASE_BATCH

    def schedules(self, settings: LoopSettings) -> tuple[Schedule, None]:
        return WarmupCosine(self.peak_lr(), self.config.min_lr, settings.total_steps), None

    def build_evaluation(self) -> Evaluation:
        dataset = labelled_dataset(self.val, self.eval_transform, self.config.seed, strict=True)
        loader = self.loader_of(dataset, training=False)
        return lambda model, _epoch: evaluate(model, self.features, loader)

    def extras(self) -> Mapping[str, object]:
        return {
            "labels": list(self.class_names),
            "backbone": weights_fingerprint(self.backbone),
            "mean": list(self.mean),
            "std": list(self.std),
            "crop_pct": self.eval_transform.crop_pct,
            **fingerprints(self.train, self.val),
        }

    def summary(self) -> Iterator[str]:
        config, features = self.config, self.features.features
        pools = ", ".join(dict.fromkeys(feature.pool for feature in features))
        yield f"{len(features)} heads of {len(self.class_names)} classes on {pools}"
        backbone = config.checkpoint or f"{config.model} (untrained)"
        yield f"backbone {backbone}, frozen, {self.features.precision.dtype}"
        yield f"lr {self.peak_lr():g}"
        yield from super().summary()


def build_backbone(config: LinearProbeConfig) -> Backbone:
    """Creates the backbone with its weights; :class:`InputError` for a bad name, option or checkpoint."""
    source, auto = config.checkpoint, config.model == AUTO
    if auto and not source:
        raise InputError("--model auto takes the architecture of a checkpoint: give --checkpoint as well")
    weights, metadata = read_weights(source, config.model_key, config.model_prefix) if source else ({}, {})
    if auto:
        backbone = architecture_of(weights, metadata).build()
        if (channels := backbone.patch_embed.proj.in_channels) != config.in_chans:
            raise InputError(f"{source} is for images of {counted(channels, 'channel')}: give --in_chans {channels}")
    else:
        arguments: dict[str, Any] = {} if config.input_size is None else {"img_size": config.input_size}
        arguments |= {"num_classes": 0, "patch_size": config.patch_size, "use_rel_pos_bias": config.rel_pos_bias}
        backbone = named_model(config, **arguments)
    if not source:
        logger.warning("no --checkpoint: the backbone is untrained")
        return backbone
    try:
        load_weights(backbone, weights, metadata, drop_head=True).log()
    except InputError as error:
        raise InputError(str(error) if auto else f"{error}; --model {AUTO} builds the checkpoint's own") from error
    if auto and config.input_size is not None:
        backbone.set_input_size(config.input_size)
    own = vars(ClassificationEvalTransform(backbone.img_size, crop_pct=config.crop_pct))
    if metadata.get("image_size", own["size"]) != own["size"]:  # for which another crop is usual
        metadata = {**metadata, "crop_pct": None}
    own = {name: own[name] for name in ("crop_pct", "crop_mode", "interpolation")}
    own["mean"], own["std"] = image_statistics(config)
    warn_of_preparation(source, metadata, **own)
    return backbone


class LinearHeads(nn.Module):
    """Independent linear classifiers of ``num_classes`` outputs, one per feature, trained side by side."""

    def __init__(self, features: tuple[Feature, ...], num_classes: int) -> None:
        super().__init__()
        heads = {feature.name: nn.Linear(feature.size, num_classes) for feature in features}
        for head in heads.values():
            nn.init.normal_(head.weight, std=HEAD_STD)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleDict(heads)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns logits ``(B, num_classes)`` for each feature ``(B, size)``, by name."""
        return {name: head(features[name]) for name, head in self.heads.items()}


class SideBySide:
    """The objective: the sum of the heads' cross-entropies on the given features; each head has its own term."""

    def __init__(self, features: FrozenFeatures) -> None:
        self.features = features

    def __call__(self, model: nn.Module, batch: Batch, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch, and the accuracy averaged over the heads (``class_acc``)."""
        logits = model(self.features(batch["image"]))
        loss = torch.stack([F.cross_entropy(output, batch["label"]) for output in logits.values()]).sum()
        right = torch.stack([(output.detach().argmax(dim=-1) == batch["label"]) for output in logits.values()])
        return loss, {"class_acc": right.float().mean()}


@torch.no_grad()
def evaluate(heads: nn.Module, features: FrozenFeatures, loader: EpochLoader) -> Metrics:
    """Scores every head, each image once over all processes; unreadable images are skipped.

    Returns ``acc1``, ``acc5`` (percent) and ``loss`` of the head with the highest ``acc1``, its ``best_layer``, and
    ``<name>_acc1`` and ``<name>_acc5`` of every head.
    """
    heads.eval()
    names = [feature.name for feature in features.features]
    counts = zero_counts(features.device, len(names))
    for host_batch in loader.epoch(0):
        batch = to_device(host_batch, features.device)
        logits = heads(features(batch["image"]))
        counts += torch.stack([count_correct(logits[name], batch["label"]) for name in names])
    results = dict(zip(names, map(rates, distributed.sum_over_ranks(counts)), strict=True))
    for name, found in results.items():
        logger.info("%s: Acc@1 %.3f Acc@5 %.3f loss %.3f", name, found["acc1"], found["acc5"], found["loss"])
    best = max(features.features, key=lambda feature: results[feature.name]["acc1"])  # the first of equals
    score, line = results[best.name], "* Acc@1 %.3f Acc@5 %.3f loss %.3f (%s, the best)"
    logger.info(line, score["acc1"], score["acc5"], score["loss"], best.name)
    each = {f"{name}_{key}": found[key] for name, found in results.items() for key in ("acc1", "acc5")}
    return {**score, "best_layer": best.layer, **each}
