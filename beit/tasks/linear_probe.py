"""The linear probe: how well do linear classifiers read the features of a frozen backbone, block by block?

One head for each block is trained, all side by side in one pass over augmented images; the best block is reported.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.checkpoints.load import architecture_of, load_weights, read_weights
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
from beit.errors import InputError
from beit.modeling import Backbone
from beit.tasks.features import Feature, FrozenFeatures
from beit.tasks.linear_probe_config import AUTO, OFFICIAL_NUM_LABELS, LinearProbeConfig, check_settings
from beit.tasks.options import normalization, session_of
from beit.training import distributed
from beit.training.loop import Batch, LoopSettings, Trainer
from beit.training.optim import create_optimizer
from beit.training.precision import Precision, resolve_amp_dtype
from beit.training.schedules import WarmupCosine
from beit.training.session import Session
from beit.zoo import build, create_model, list_models

logger = logging.getLogger(__name__)

BASE_BATCH = 256  # images, of which --base_lr is the learning rate
WEIGHT_DECAY = {"sgd": 0.0, "adamw": 1e-4}
HEAD_STD = 0.01
TOP_K = 5


def main(config: LinearProbeConfig) -> None:
    """Probes a backbone as the flags say."""
    check_settings(config)
    with session_of(config) as session:
        train, val, class_names = find_data(config)
        # The backbone stays as it is; what is learnt is to read it.
        backbone = build_backbone(config).to(session.device)
        features = freeze(config, backbone, session)
        heads = LinearHeads(features.features, len(class_names)).to(session.device)

        loader = build_loader(config, train, backbone.img_size, session)
        lr = peak_lr(config, session.world_size)
        steps = config.epochs * (loader.batches_per_epoch // config.update_freq)
        trainer = ProbeTrainer(
            heads,
            SideBySide(features),
            loader,
            build_optimizer(config, heads, lr),
            Precision(torch.float32, session.device),  # of the heads
            loop_settings(config),
            WarmupCosine(lr, config.min_lr, steps),
            folder=session.folder,
            log_dir=config.log_dir,
            config=to_plain(config),
            extras={"labels": list(class_names), "backbone": fingerprint(backbone)},
            evaluate=build_evaluation(config, val, features, session),
        )
        session.resume(trainer, path=config.resume, auto=config.auto_resume, start_epoch=config.start_epoch)
        log_summary(config, trainer, features, len(class_names), lr)
        trainer.fit()


def find_data(config: LinearProbeConfig) -> tuple[LabelledImages, LabelledImages, tuple[str, ...]]:
    """Finds the training images, the validation images and the names of their classes.

    Raises:
        InputError: Images are missing, or their classes are not as they should be.
    """
    train = find_images(config.data_set, config.data_path, config.eval_data_path, train=True)
    val = find_images(config.data_set, config.data_path, config.eval_data_path, train=False)
    class_names = check_classes([train, val])
    if config.num_labels not in (0, OFFICIAL_NUM_LABELS, len(class_names)):
        raise InputError(
            f"--num_labels {config.num_labels}, but {train.root} has {len(class_names)} classes: give --num_labels "
            f"{len(class_names)}, or 0 to take what is there"
        )
    if config.num_labels == OFFICIAL_NUM_LABELS != len(class_names):
        logger.info("%d classes, as in the data", len(class_names))
    return train, val, class_names


# ------------------------------------------------------------------------------------------------------ the backbone
def build_backbone(config: LinearProbeConfig) -> Backbone:
    """Creates the backbone with its pre-trained or fine-tuned weights.

    Raises:
        InputError: The name is unknown, an option does not fit, or the checkpoint is of another model.
    """
    if not config.pretrained_weights:
        if config.model == AUTO:
            raise InputError("--model auto reads the model off a checkpoint: give --pretrained_weights as well")
        logger.warning("no --pretrained_weights: the backbone is untrained")
        return _named_backbone(config)
    weights, metadata = read_weights(config.pretrained_weights, config.checkpoint_key)
    if config.model == AUTO:
        backbone = build(architecture_of(weights, metadata), metadata.get("layer_norm_eps"))
    else:
        backbone = _named_backbone(config)
    report = load_weights(backbone, weights, metadata, drop_head=True)
    (logger.warning if report.unexpected else logger.info)("%s", report.summary())
    if config.model == AUTO and config.input_size is not None:
        backbone.set_input_size(config.input_size)
    recorded = metadata.get("mean")
    if recorded is not None and tuple(recorded) != normalization(config)[0]:
        logger.warning(
            "%s records that its images had mean %s, here they have %s: check --imagenet_default_mean_and_std",
            config.pretrained_weights,
            tuple(recorded),
            normalization(config)[0],
        )
    return backbone


def _named_backbone(config: LinearProbeConfig) -> Backbone:
    arguments: dict[str, Any] = {
        "num_classes": 0,
        "patch_size": config.patch_size,
        "init_values": config.layer_scale_init_value,
        "use_rel_pos_bias": config.rel_pos_bias,
        "use_abs_pos_emb": config.abs_pos_emb,
    }
    if config.input_size is not None:
        arguments["img_size"] = config.input_size
    if config.model in list_models("*_8k_vocab"):
        raise InputError(
            f"--model {config.model} is a pre-training model; its checkpoints are probed with --model "
            f"{config.model[: -len('_8k_vocab')]}, or auto"
        )
    try:
        return create_model(config.model, **{**arguments, **(config.model_kwargs or {})})
    except TypeError as error:
        raise InputError(f"--model {config.model} cannot be built: {error}") from error


def freeze(config: LinearProbeConfig, backbone: Backbone, session: Session) -> FrozenFeatures:
    """Returns what computes the features that the flags ask for."""
    dtype = resolve_amp_dtype(config.amp_dtype if config.amp_forward else "fp32", session.device)
    mean, std = normalization(config)
    return FrozenFeatures(
        backbone,
        layers=config.layers,
        pools=config.pool or (("cls_mean",) if config.avgpool_patchtokens else ("cls",)),
        mean=mean,
        std=std,
        precision=Precision(dtype, session.device),
    )


def fingerprint(backbone: Backbone) -> str:
    """Returns a hash of a backbone's weights."""
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------- the heads
class LinearHeads(nn.Module):
    """A linear classifier for each feature; they learn side by side and know nothing of each other.

    Args:
        features: What they read.
        num_classes: Their outputs.
    """

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
    """The objective: the sum of the heads' cross-entropies, in which each head has its own term.

    Args:
        features: Computes what the heads read.
    """

    def __init__(self, features: FrozenFeatures) -> None:
        self.features = features

    def __call__(self, model: nn.Module, batch: Batch, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch, and over the heads the mean share classified right (``class_acc``)."""
        logits = model(self.features(batch["image"]))
        loss = torch.stack([F.cross_entropy(output, batch["label"]) for output in logits.values()]).sum()
        right = torch.stack([(output.detach().argmax(dim=-1) == batch["label"]) for output in logits.values()])
        return loss, {"class_acc": right.float().mean()}


class ProbeTrainer(Trainer):
    """The training loop; it goes on with heads only on the backbone that they have been reading."""

    def resume(self, checkpoint: Mapping[str, Any], source: str) -> None:
        """Takes heads, optimizer and position over from a checkpoint.

        Raises:
            InputError: It is of another model, or of another backbone.
        """
        if checkpoint.get("backbone", self.extras["backbone"]) != self.extras["backbone"]:
            raise InputError(
                f"{source} probes another backbone than --pretrained_weights: give another --output_dir, or start over "
                "with --no_auto_resume"
            )
        super().resume(checkpoint, source)


def peak_lr(config: LinearProbeConfig, world_size: int) -> float:
    """Returns ``--lr``, or else ``--base_lr`` in proportion to the images of an optimizer step."""
    if config.lr is not None:
        return config.lr
    return config.base_lr * config.batch_size_per_gpu * config.update_freq * world_size / BASE_BATCH


def build_optimizer(config: LinearProbeConfig, heads: LinearHeads, lr: float) -> torch.optim.Optimizer:
    """Creates the optimizer; all of a head decays, its bias as well, as official."""
    decay = config.weight_decay
    if decay is None:
        decay = WEIGHT_DECAY.get(config.optimizer.lower(), WEIGHT_DECAY["adamw"])
    group = {"params": list(heads.parameters()), "lr_scale": 1.0, "weight_decay": decay, "decays": True}
    return create_optimizer(config.optimizer, [group], lr=lr)


def loop_settings(config: LinearProbeConfig) -> LoopSettings:
    """Returns how long and how often. Gradients are not clipped: their common norm would tie the heads together."""
    return LoopSettings(
        epochs=config.epochs,
        update_freq=config.update_freq,
        log_every=config.log_every,
        save_epochs=config.save_ckpt_freq,
        save_steps=config.save_ckpt_steps,
        evaluate_epochs=config.val_freq,
        best_metric="acc1",
        seed=config.seed,
    )


# ---------------------------------------------------------------------------------------------- images and evaluation
def build_loader(
    config: LinearProbeConfig, train: LabelledImages, img_size: tuple[int, int], session: Session
) -> EpochLoader:
    """Creates the loader of training images: random crops, flipped half of the time."""
    mean, std = normalization(config)
    transform = ClassificationTransform(
        img_size,
        mean=mean,
        std=std,
        interpolation=config.train_interpolation,
        auto_augment="none",
        color_jitter=0.0,
        erasing=0.0,
    )
    return _loader(config, train, transform, session)


def _loader(
    config: LinearProbeConfig,
    images: LabelledImages,
    transform: ClassificationTransform | ClassificationEvalTransform,
    session: Session,
    strict: bool = False,
    **options: Any,
) -> EpochLoader:
    return EpochLoader(
        labelled_dataset(images, transform, config.seed, strict),
        config.batch_size_per_gpu,
        seed=config.seed,
        rank=session.rank,
        world_size=session.world_size,
        num_workers=config.num_workers,
        pin_memory=config.pin_mem and session.device.type == "cuda",
        max_unreadable=config.max_unreadable,
        **options,
    )


def build_evaluation(
    config: LinearProbeConfig, val: LabelledImages, features: FrozenFeatures, session: Session
) -> Callable[[nn.Module, int], dict[str, float]]:
    """Returns the evaluation on the validation images."""
    transform = ClassificationEvalTransform(features.model.img_size, crop_pct=config.crop_pct)
    loader = _loader(config, val, transform, session, strict=True, shuffle=False, drop_last=False)
    return lambda model, _epoch: evaluate(model, features, loader)


@torch.no_grad()
def evaluate(heads: nn.Module, features: FrozenFeatures, loader: EpochLoader) -> dict[str, float]:
    """Scores every head, each image once over all processes; those that cannot be read are left out.

    Returns:
        ``acc1``, ``acc5`` (percent) and ``loss`` of the head with the highest ``acc1``, its ``best_layer``, and
        ``<name>_acc1`` and ``<name>_acc5`` of every head.
    """
    heads.eval()
    device = features.device
    names = [feature.name for feature in features.features]
    # One row a head: summed loss, right answers, right ones among the first five, images.
    totals = torch.zeros(len(names), 4, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    for host_batch in loader.epoch(0):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in host_batch.items()}
        logits = heads(features(batch["image"]))
        totals += torch.stack([_count(logits[name], batch["label"]) for name in names])
    rows = dict(zip(names, distributed.sum_over_ranks(totals).tolist(), strict=True))
    results = {
        name: {"acc1": 100 * first / images, "acc5": 100 * among_first / images, "loss": loss / images}
        for name, (loss, first, among_first, images) in rows.items()
    }
    return _report(results, features.features)


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    right = logits.topk(min(TOP_K, logits.shape[1])).indices == labels[:, None]  # (B, 5)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss, right[:, 0].sum(), right.sum(), torch.tensor(len(labels), device=loss.device)])


def _report(results: Mapping[str, Mapping[str, float]], features: tuple[Feature, ...]) -> dict[str, float]:
    for name, found in results.items():
        logger.info("%s: Acc@1 %.3f Acc@5 %.3f loss %.3f", name, found["acc1"], found["acc5"], found["loss"])
    best = max(features, key=lambda feature: results[feature.name]["acc1"])  # the first of equals
    score = results[best.name]
    logger.info(
        "* Acc@1 %.3f Acc@5 %.3f loss %.3f (%s, the best)", score["acc1"], score["acc5"], score["loss"], best.name
    )
    each = {f"{name}_{key}": found[key] for name, found in results.items() for key in ("acc1", "acc5")}
    return {**score, "best_layer": best.layer, **each}


def log_summary(
    config: LinearProbeConfig, trainer: Trainer, features: FrozenFeatures, num_classes: int, lr: float
) -> None:
    """Says what is about to run."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    logger.info(
        "%d heads of %d classes on %s, %s parameters; backbone %s, frozen, %s",
        len(features.features),
        num_classes,
        ", ".join(dict.fromkeys(feature.pool for feature in features.features)),
        f"{parameters:,}",
        config.pretrained_weights or f"{config.model} (untrained)",
        features.precision.dtype,
    )
    logger.info(
        "batch %d = %d images x %d processes x %d batches an update; %d updates an epoch, %d epochs; lr %g",
        trainer.images_per_step,
        config.batch_size_per_gpu,
        distributed.world_size(),
        config.update_freq,
        trainer.steps_per_epoch,
        config.epochs,
        lr,
    )
