"""BEiT pre-training: predict the visual tokens of masked patches (arXiv 2106.08254, section 2), or something else."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.checkpoints.load import load_weights, read_weights
from beit.config import to_plain
from beit.data.datasets import ImageDataset
from beit.data.loaders import EpochLoader
from beit.data.transforms import (
    MaskedImageModelingEvalTransform,
    MaskedImageModelingTransform,
    normalize,
    size_pair,
)
from beit.errors import InputError
from beit.masking import MaskGenerator
from beit.modeling import VisionTransformerForMaskedImageModeling
from beit.registry import MASK_STRATEGIES, TARGETS, resolve
from beit.targets import VISUAL_TOKENS, PredictionTarget, TokenTarget
from beit.tasks.image_log import ImageLog, spread_samples
from beit.tasks.options import (
    EVALUATION_WORKERS,
    check_positive,
    check_sharding,
    check_training,
    effective_batch,
    epoch_loader,
    find_together,
    loop_settings,
    normalization,
    optimizer_for,
    schedules,
    session_of,
    share_out,
    trainer_class,
)
from beit.tasks.pretraining_config import PretrainingConfig, announce_flags_without_effect
from beit.tasks.targets_ahead import COMPUTED, TargetsAhead
from beit.tokenizers.base import VisualTokenizer, load_tokenizer
from beit.training import distributed
from beit.training.compilation import compile_for_training, uncompiled
from beit.training.loop import Batch, Loader, Trainer
from beit.training.optim import parameter_groups
from beit.training.precision import AMP_DTYPES, Precision, resolve_amp_dtype
from beit.training.session import Session
from beit.zoo import create_model, list_models

logger = logging.getLogger(__name__)

PUBLISHED_LR, PUBLISHED_BATCH = 1.5e-3, 2048
TargetFactory = Callable[[PretrainingConfig, torch.device], PredictionTarget]


def main(config: PretrainingConfig, make_target: TargetFactory | None = None) -> None:
    """Pre-trains a model as the flags say.

    Args:
        config: The flags.
        make_target: Makes the prediction target, in place of ``--target``.
    """
    check_training(config)
    check_sharding(config)
    check_positive(config, "num_mask_patches", "eval_freq")
    with session_of(config) as session:
        config = share_out(config, session.world_size)
        # The target says what each patch shows; the model learns to say it of patches it does not see.
        target = (make_target or build_target)(config, session.device)
        model = build_model(config, target.output_size).to(session.device)
        if config.compile:
            compile_for_training(model, recomputes=config.grad_checkpointing)
        target.check(model.patch_embed.grid_size, size_pair(config.second_input_size))
        masks = build_mask_generator(config, model.patch_embed.grid_size)

        loader: Loader = build_loader(config, target, masks, session)
        objective = MaskedPrediction(target, *normalization(config))
        optimizer = build_optimizer(config, model, session.device)
        settings = loop_settings(config, evaluate_epochs=config.eval_freq)
        precision = Precision(resolve_amp_dtype(config.amp_dtype, session.device), session.device)
        lr, weight_decay = schedules(config, loader.batches_per_epoch // config.update_freq)
        prepare = partial(
            with_patch_index,
            predict=config.predict,
            room=config.batch_size * config.num_mask_patches if config.compile else 0,
        )
        if config.tokenizer_stream:
            loader = TargetsAhead(loader, target, prepare, precision)
        if config.init_from:
            initialize_from(model, config.init_from, target.name)
        trainer = trainer_class(config, layers=lambda model: model.blocks)(
            model,
            objective,
            loader,
            optimizer,
            precision,
            settings,
            lr,
            weight_decay,
            prepare=None if config.tokenizer_stream else prepare,
            folder=session.folder,
            log_dir=config.log_dir,
            config=to_plain(config),
            extras={"target": target.name},
            evaluate=build_evaluation(config, objective, masks, session, precision),
            on_epoch_end=build_image_log(config, objective, masks, model, precision),
            accepts=partial(check_target, target=target.name),
        )
        session.resume(trainer, path=config.resume, auto=config.auto_resume, start_epoch=config.start_epoch)
        announce_flags_without_effect(config, own_target=make_target is not None)
        log_summary(config, trainer, target, session)
        trainer.fit()


def build_target(config: PretrainingConfig, device: torch.device) -> PredictionTarget:
    """Creates what ``--target`` says.

    Raises:
        InputError: The target cannot be had, such as a tokenizer that is not there.
    """
    with torch.device("meta"):  # takes no memory and draws no random number
        patch_size = build_model(config, 1).patch_embed.patch_size
    mean, std = normalization(config)
    target: PredictionTarget = resolve(TARGETS, config.target, "target").build(
        tokenizer=partial(build_tokenizer, config, device),
        patch_size=patch_size,
        mean=mean,
        std=std,
        pixel_norm=config.pixel_norm,
    )
    return target


def build_tokenizer(config: PretrainingConfig, device: torch.device) -> VisualTokenizer:
    """Loads the frozen tokenizer.

    Raises:
        InputError: No path was given, or what is there is no tokenizer.
    """
    if not config.discrete_vae_weight_path:
        raise InputError(
            "--discrete_vae_weight_path is missing: give the tokenizer's folder. `beit download tokenizer DIR` fetches "
            "OpenAI's, run_dvae_training.py trains one on your images (--discrete_vae_type customized); --target "
            "pixels needs none"
        )
    dtype = tokenizer_dtype(config, device)
    return load_tokenizer(
        config.discrete_vae_weight_path, config.discrete_vae_type, device, dtype, config.tokenizer_compile
    )


def tokenizer_dtype(config: PretrainingConfig, device: torch.device) -> torch.dtype:
    """Returns the number format of the tokenizer's encoder.

    ``auto`` goes with that of the run: float32 where the run is, else float16 on a GPU, as the published encoder was
    made to run there, and bfloat16 elsewhere.
    """
    if config.tokenizer_dtype != "auto":
        return AMP_DTYPES[config.tokenizer_dtype]
    if resolve_amp_dtype(config.amp_dtype, device) == torch.float32:
        return torch.float32
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def build_model(config: PretrainingConfig, output_size: int) -> VisionTransformerForMaskedImageModeling:
    """Creates the model with as many outputs a patch as the target needs, such as one for each token.

    Raises:
        InputError: The name is unknown or not a pre-training model, or an option does not fit.
    """
    arguments = {
        "img_size": config.input_size,
        "vocab_size": output_size,
        "drop_path_rate": config.drop_path,
        "init_values": config.layer_scale_init_value,
        "use_shared_rel_pos_bias": config.rel_pos_bias,
        "use_abs_pos_emb": config.abs_pos_emb,
    }
    if config.model in set(list_models()) - set(list_models("*_8k_vocab")):
        raise InputError(f"--model {config.model} is a classifier; pre-training needs {config.model}_8k_vocab")
    try:
        model = create_model(config.model, **{**arguments, **(config.model_kwargs or {})})
    except TypeError as error:
        raise InputError(f"--model {config.model} cannot be built: {error}") from error
    assert isinstance(model, VisionTransformerForMaskedImageModeling)
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model


def build_mask_generator(config: PretrainingConfig, grid_size: tuple[int, int]) -> MaskGenerator:
    """Creates the generator of the patches to mask, for a grid of patches ``(h, w)``."""
    masks: MaskGenerator = resolve(MASK_STRATEGIES, config.mask_strategy, "mask strategy")(
        grid_size,
        num_mask_patches=config.num_mask_patches,
        min_num_patches=config.min_mask_patches_per_block,
        max_num_patches=config.max_mask_patches_per_block,
    )
    return masks


def build_loader(
    config: PretrainingConfig, target: PredictionTarget, masks: MaskGenerator, session: Session
) -> EpochLoader:
    """Creates the loader of augmented images, in as many views as the target needs, with their masks."""
    transform = MaskedImageModelingTransform(
        config.input_size,
        config.second_input_size if target.second_view else None,
        interpolation=config.train_interpolation,
        second_interpolation=config.second_interpolation,
        color_jitter=config.color_jitter,
        mask_generator=masks,
    )
    index = find_together(config.data_path)
    return epoch_loader(ImageDataset(index, transform, config.seed, fast_decode=config.fast_decode), config, session)


def with_patch_index(batch: Batch, predict: str = "masked", room: int = 0) -> dict[str, Tensor]:
    """Adds the flat positions of the patches to predict, found on the host, where that makes no GPU wait.

    Args:
        batch: Holds ``mask``, bool ``(B, h, w)``.
        predict: ``masked`` or ``all``.
        room: Most masked patches that a batch can have. With it the model is given as many places in every batch, the
            first patch again and again in those that are over: a compiled model wants the same shapes each time.

    Returns:
        The batch with ``patch_index``, int64 ``(M,)``, positions in the ``B * h * w`` patches; of masked ones with
        ``room`` also ``padded_index``, int64 ``(room,)``.
    """
    mask = batch["mask"].flatten()
    if predict != "masked":
        return {**batch, "patch_index": torch.arange(len(mask))}
    index = mask.nonzero().flatten()
    padded = {"padded_index": F.pad(index, (0, max(0, room - len(index))))} if room else {}
    return {**batch, "patch_index": index, **padded}


class MaskedPrediction:
    """The objective: of a masked image, what the target says of the chosen patches; the loss is their mean.

    Args:
        target: What is predicted.
        mean: Mean of the model's input, per channel.
        std: Standard deviation of the model's input, per channel.
    """

    def __init__(self, target: PredictionTarget, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.target = target
        self._mean, self._std = mean, std

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns outputs ``(M, output_size)`` and targets ``(M, …)`` of the chosen patches of a batch."""
        index = batch["patch_index"]
        targets = batch[COMPUTED] if COMPUTED in batch else self.target.compute(batch, index)
        images = normalize(batch["image"], self._mean, self._std)
        outputs = model(images, batch["mask"], masked_index=batch.get("padded_index", index))
        return outputs[: len(index)], targets  # what was predicted to fill the room counts for nothing

    def outputs_of_all(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the outputs of all patches, ``(B, N, output_size)``; the masked ones are masked all the same."""
        with uncompiled():
            return model(normalize(batch["image"], self._mean, self._std), batch["mask"], return_all_tokens=True)

    def __call__(self, model: nn.Module, batch: Batch, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch and the target's metrics."""
        outputs, targets = self.predict(model, batch)
        with torch.no_grad():
            metrics = self.target.metrics(outputs.detach(), targets)
        return self.target.loss(outputs, targets), metrics


def check_target(checkpoint: Mapping[str, Any], source: str, target: str) -> None:
    """Makes sure that a checkpoint has learned to predict what this run predicts.

    Raises:
        InputError: It has not.
    """
    theirs = checkpoint.get("target", VISUAL_TOKENS)
    if theirs != target:
        raise InputError(
            f"{source} learned to predict {theirs}, this run predicts {target}: go on with the same --target and "
            "--pixel_norm, or start from its weights with --init_from in another --output_dir"
        )


def build_optimizer(config: PretrainingConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Creates the optimizer, with weight decay on what the official grouping gives it to."""
    groups = parameter_groups(model, config.weight_decay, no_decay=model.no_weight_decay())  # type: ignore[operator]
    return optimizer_for(config, groups, device)


def initialize_from(model: VisionTransformerForMaskedImageModeling, source: str, target: str = VISUAL_TOKENS) -> None:
    """Gives a model the weights of a checkpoint; a head for another vocabulary or target starts anew.

    Args:
        model: The model.
        source: A file, folder, released name, address or hub id.
        target: Name of what the model predicts.

    Raises:
        InputError: The checkpoint cannot be read or is of another model.
    """
    weights, metadata = read_weights(source, "model|module")
    theirs = metadata.get("target", VISUAL_TOKENS)
    report = load_weights(model, weights, metadata, drop_head=theirs != target)
    (logger.warning if report.unexpected else logger.info)("%s", report.summary())
    if theirs != target:
        logger.info("%s learned to predict %s, this run predicts %s: the head starts anew", source, theirs, target)
    elif "lm_head.weight" in report.missing:
        logger.info("%s has another vocabulary or none: the prediction head starts anew", source)


def evaluation_transform(
    config: PretrainingConfig, target: PredictionTarget, masks: MaskGenerator
) -> MaskedImageModelingEvalTransform:
    """Creates the views of images that are not trained on."""
    return MaskedImageModelingEvalTransform(
        config.input_size,
        config.second_input_size if target.second_view else None,
        interpolation=config.train_interpolation,
        second_interpolation=config.second_interpolation,
        mask_generator=masks,
    )


def build_evaluation(
    config: PretrainingConfig,
    objective: MaskedPrediction,
    masks: MaskGenerator,
    session: Session,
    precision: Precision,
) -> Callable[[nn.Module, int], dict[str, float]] | None:
    """Returns the evaluation on held-out images, or None if there are none."""
    if not config.eval_data_path:
        return None
    transform = evaluation_transform(config, objective.target, masks)
    dataset = ImageDataset(find_together(config.eval_data_path), transform, config.seed)
    few = min(config.num_workers, EVALUATION_WORKERS)
    loader = epoch_loader(dataset, config, session, num_workers=few, shuffle=False, drop_last=False)
    return lambda model, _epoch: evaluate(model, objective, loader, precision)


@torch.no_grad()
def evaluate(
    model: nn.Module, objective: MaskedPrediction, loader: EpochLoader, precision: Precision
) -> dict[str, float]:
    """Scores the prediction of masked patches over a data set, each image once with a fixed mask.

    Only masked patches count, whichever were trained on, so that all runs with one target can be compared.

    Returns:
        ``loss``, the mean over all masked patches, and the target's scores over them.
    """
    model.eval()
    target, device = objective.target, precision.device
    totals = {"loss": torch.zeros((), device=device), "patches": torch.zeros((), dtype=torch.int64, device=device)}
    for host_batch in loader.epoch(0):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in with_patch_index(host_batch).items()}
        with precision.autocast(), uncompiled():
            outputs, targets = objective.predict(model, batch)
        sums = {"loss": target.loss(outputs, targets, "sum"), **target.tally(outputs, targets)}
        totals["patches"] += len(outputs)
        totals = {**totals, **{name: totals[name] + value if name in totals else value for name, value in sums.items()}}
    # A process may have had no images, the main one always has; so it tells the others what there is to add up.
    zeros = distributed.on_main(lambda: {name: torch.zeros_like(value, device="cpu") for name, value in totals.items()})
    totals = {
        name: distributed.sum_over_ranks(totals[name] if name in totals else zero.to(device))
        for name, zero in zeros.items()
    }
    loss, patches = totals.pop("loss").item(), int(totals.pop("patches").item())
    return {"loss": loss / patches, **target.scores(totals, patches)}


def build_image_log(
    config: PretrainingConfig, objective: MaskedPrediction, masks: MaskGenerator, model: nn.Module, precision: Precision
) -> ImageLog | None:
    """Returns what writes reconstructions to TensorBoard after each epoch, on the main process, or None for none.

    Raises:
        InputError: The number of images is negative, or the pictures cannot be made.
    """
    if config.log_images < 0:
        raise InputError(f"--log_images {config.log_images}: must be 0 or more")
    if not config.log_images:
        return None
    if not (config.log_dir and config.output_dir):
        logger.warning("--log_images has no effect without --log_dir and --output_dir")
        return None
    transform = evaluation_transform(config, objective.target, masks)
    dataset = ImageDataset(find_together(config.eval_data_path or config.data_path), transform, config.seed)

    def build() -> ImageLog:
        samples = spread_samples(dataset, config.log_images)
        log = ImageLog(model, objective.outputs_of_all, objective.target, samples, precision)
        log.picture()  # what cannot be drawn, such as tokens without a decoder, is found now and not after an epoch
        return log

    return _on_main_only(build)


def _on_main_only(build: Callable[[], ImageLog]) -> ImageLog | None:
    """Builds something on the main process; what goes wrong there ends all processes."""
    built: list[ImageLog] = []
    distributed.on_main(lambda: built.append(build()))
    return built[0] if built else None


def log_summary(config: PretrainingConfig, trainer: Trainer, target: PredictionTarget, session: Session) -> None:
    """Says what is about to run, and warns where the learning rate does not fit the batch."""
    batch = effective_batch(config)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    logger.info("model %s: %s parameters, %s", config.model, f"{parameters:,}", trainer.precision.dtype)
    if isinstance(target, TokenTarget):
        logger.info("tokenizer %s: %d tokens", config.discrete_vae_weight_path, target.output_size)
    else:
        logger.info("predicting %s: %d numbers a patch", target.name, target.output_size)
    logger.info(
        "batch %d = %d images x %d processes x %d batches an update; %d updates an epoch, %d epochs; lr %g",
        batch,
        config.batch_size,
        session.world_size,
        config.update_freq,
        trainer.steps_per_epoch,
        config.epochs,
        config.lr,
    )
    ratio = (config.lr / batch) / (PUBLISHED_LR / PUBLISHED_BATCH)
    if not 0.5 <= ratio <= 2:
        logger.warning(
            "lr/batch is %.3g times the published one (%g for a batch of %d); in proportion this batch would take "
            "--lr %.2g. The lr stays as given",
            ratio,
            PUBLISHED_LR,
            PUBLISHED_BATCH,
            PUBLISHED_LR * batch / PUBLISHED_BATCH,
        )
