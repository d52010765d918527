"""BEiT pre-training: predict the visual tokens of masked patches (arXiv 2106.08254, section 2)."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.config import Size, option, to_plain
from beit.data.datasets import ImageDataset
from beit.data.loaders import EpochLoader
from beit.data.transforms import (
    MaskedImageModelingEvalTransform,
    MaskedImageModelingTransform,
    normalize,
    size_pair,
    to_unit_range,
)
from beit.errors import InputError
from beit.masking import BlockwiseMaskGenerator
from beit.modeling import VisionTransformerForMaskedImageModeling
from beit.pretrained import load_pretrained
from beit.tasks.options import (
    EVALUATION_WORKERS,
    OptimizerOptions,
    RunOptions,
    check_positive,
    check_training,
    effective_batch,
    epoch_loader,
    find_together,
    loop_settings,
    normalization,
    optimizer_for,
    schedules,
    session_of,
)
from beit.tokenizer import VisualTokenizer, load_tokenizer
from beit.training import distributed
from beit.training.loop import Batch, Trainer
from beit.training.optim import parameter_groups
from beit.training.precision import Precision, resolve_amp_dtype
from beit.training.session import Session
from beit.zoo import create_model, list_models

logger = logging.getLogger(__name__)

PUBLISHED_LR, PUBLISHED_BATCH = 1.5e-3, 2048


@dataclass(frozen=True)
class PretrainingConfig(RunOptions, OptimizerOptions):
    """The flags of ``run_beit_pretraining.py``; every official one, with its official default."""

    model: str = option("beit_base_patch16_224_8k_vocab", "model name; `beit models` lists them")
    model_kwargs: dict[str, Any] | None = option(
        None, "more of the model's constructor, such as patch_size=8 embed_dim=128"
    )
    init_from: str = option(
        "", "checkpoint whose weights the model starts with: file, released name, address or hub id"
    )
    rel_pos_bias: bool = option(True, "relative position bias, shared by all blocks", off="--disable_rel_pos_bias")
    abs_pos_emb: bool = option(False, "learned absolute position embeddings")
    layer_scale_init_value: float = option(0.1, "initial LayerScale: 0.1 for base, 1e-5 for large, 0 for none")
    drop_path: float = option(0.1, "stochastic depth rate of the last block; grows linearly with depth")
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass, to save memory")

    discrete_vae_weight_path: str | None = option(None, "folder of the tokenizer")
    discrete_vae_type: str = option("dall-e", "kind of tokenizer: dall-e or customized")
    second_input_size: Size = option(112, "size of the tokenizer's view, in pixels (HEIGHTxWIDTH or one number)")
    second_interpolation: str = option("lanczos", "interpolation of the tokenizer's view")

    num_mask_patches: int = option(75, "most patches masked in an image")
    max_mask_patches_per_block: int | None = option(None, "largest masked block, in patches; no limit by default")
    min_mask_patches_per_block: int = option(16, "smallest masked block, in patches")

    data_path: str = option("/datasets01/imagenet_full_size/061417/", "folder of images, or a text file of paths")
    eval_data_path: str | None = option(None, "held-out images to score masked-token prediction on, after epochs")
    eval_freq: int = option(1, "epochs between two evaluations")
    input_size: Size = option(224, "size of the model's view, in pixels (HEIGHTxWIDTH or one number)")
    train_interpolation: str = option("bicubic", "interpolation of the model's view")
    color_jitter: float = option(0.4, "strength of brightness, contrast and saturation jitter")
    imagenet_default_mean_and_std: bool = option(False, "normalise with ImageNet's mean and std instead of 0.5")
    max_unreadable: int | None = option(
        None, "unreadable images that end the run; 1 % of them, at least 10, by default"
    )

    batch_size: int = option(64, "images per process and batch")
    epochs: int = option(300, "passes over the data")
    opt_betas: tuple[float, ...] | None = option((0.9, 0.999), "decay rates of Adam")


def main(config: PretrainingConfig) -> None:
    """Pre-trains a model as the flags say."""
    check_training(config)
    check_positive(config, "num_mask_patches", "eval_freq")
    with session_of(config) as session:
        # A frozen tokenizer says what each patch shows; the model learns to say it of patches it does not see.
        tokenizer = build_tokenizer(config, session.device)
        model = build_model(config, tokenizer.vocab_size).to(session.device)
        tokenizer.check_grid(size_pair(config.second_input_size), model.patch_embed.grid_size)
        masks = build_mask_generator(config, model.patch_embed.grid_size)

        loader = build_loader(config, masks, session)
        objective = MaskedTokenPrediction(tokenizer, *normalization(config))
        optimizer = build_optimizer(config, model, session.device)
        settings = loop_settings(config, evaluate_epochs=config.eval_freq)
        precision = Precision(resolve_amp_dtype(config.amp_dtype, session.device), session.device)
        lr, weight_decay = schedules(config, loader.batches_per_epoch // config.update_freq)
        trainer = Trainer(
            model,
            objective,
            loader,
            optimizer,
            precision,
            settings,
            lr,
            weight_decay,
            prepare=with_masked_index,
            folder=session.folder,
            log_dir=config.log_dir,
            config=to_plain(config),
            evaluate=build_evaluation(config, objective, masks, session, precision),
        )
        if config.init_from:
            initialize_from(model, config.init_from)
        session.resume(trainer, path=config.resume, auto=config.auto_resume, start_epoch=config.start_epoch)
        log_summary(config, trainer, tokenizer, session)
        trainer.fit()


def build_tokenizer(config: PretrainingConfig, device: torch.device) -> VisualTokenizer:
    """Loads the frozen tokenizer.

    Raises:
        InputError: No path was given, or what is there is no tokenizer.
    """
    if not config.discrete_vae_weight_path:
        raise InputError(
            "--discrete_vae_weight_path is missing: give the tokenizer's folder. `beit download tokenizer DIR` fetches "
            "OpenAI's, run_dvae_training.py trains one on your images (--discrete_vae_type customized)"
        )
    return load_tokenizer(config.discrete_vae_weight_path, config.discrete_vae_type, device)


def build_model(config: PretrainingConfig, vocab_size: int) -> VisionTransformerForMaskedImageModeling:
    """Creates the model with as many outputs as the tokenizer has tokens.

    Raises:
        InputError: The name is unknown or not a pre-training model, or an option does not fit.
    """
    arguments = {
        "img_size": config.input_size,
        "vocab_size": vocab_size,
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


def build_mask_generator(config: PretrainingConfig, grid_size: tuple[int, int]) -> BlockwiseMaskGenerator:
    """Creates the generator of the patches to mask, for a grid of patches ``(h, w)``."""
    return BlockwiseMaskGenerator(
        grid_size,
        num_mask_patches=config.num_mask_patches,
        min_num_patches=config.min_mask_patches_per_block,
        max_num_patches=config.max_mask_patches_per_block,
    )


def build_loader(config: PretrainingConfig, masks: BlockwiseMaskGenerator, session: Session) -> EpochLoader:
    """Creates the loader of augmented two-view images with their masks."""
    transform = MaskedImageModelingTransform(
        config.input_size,
        config.second_input_size,
        interpolation=config.train_interpolation,
        second_interpolation=config.second_interpolation,
        color_jitter=config.color_jitter,
        mask_generator=masks,
    )
    return epoch_loader(ImageDataset(find_together(config.data_path), transform, config.seed), config, session)


def with_masked_index(batch: Batch) -> dict[str, Tensor]:
    """Adds the flat positions of the masked patches, found on the host, where that makes no GPU wait.

    Args:
        batch: Holds ``mask``, bool ``(B, h, w)``.

    Returns:
        The batch with ``masked_index``, int64 ``(M,)``, positions in the ``B * h * w`` patches.
    """
    return {**batch, "masked_index": batch["mask"].flatten().nonzero().flatten()}


class MaskedTokenPrediction:
    """The objective: cross-entropy of the predicted tokens at the masked patches, averaged over them.

    Args:
        tokenizer: Frozen; gives the tokens.
        mean: Mean of the model's input, per channel.
        std: Standard deviation of the model's input, per channel.
    """

    def __init__(self, tokenizer: VisualTokenizer, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.tokenizer = tokenizer
        self._mean, self._std = mean, std

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns logits ``(M, vocab)`` and tokens ``(M,)`` of the masked patches of a batch."""
        index = batch["masked_index"]
        tokens = self.tokenizer.encode(to_unit_range(batch["token_image"]), index)
        images = normalize(batch["image"], self._mean, self._std)
        return model(images, batch["mask"], masked_index=index), tokens

    def __call__(self, model: nn.Module, batch: Batch, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch and the share of tokens predicted right, ``mlm_acc``."""
        logits, tokens = self.predict(model, batch)
        loss = F.cross_entropy(logits.float(), tokens)
        return loss, {"mlm_acc": (logits.detach().argmax(dim=-1) == tokens).float().mean()}


def build_optimizer(config: PretrainingConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Creates the optimizer, with weight decay on what the official grouping gives it to."""
    groups = parameter_groups(model, config.weight_decay, no_decay=model.no_weight_decay())  # type: ignore[operator]
    return optimizer_for(config, groups, device)


def initialize_from(model: VisionTransformerForMaskedImageModeling, source: str) -> None:
    """Gives a model the weights of a checkpoint; a head for another vocabulary starts anew.

    Args:
        model: The model.
        source: A file, folder, released name, address or hub id.

    Raises:
        InputError: The checkpoint cannot be read or is of another model.
    """
    if "lm_head.weight" in load_pretrained(model, source).missing:
        logger.info("%s has another vocabulary or none: the prediction head starts anew", source)


def build_evaluation(
    config: PretrainingConfig,
    objective: MaskedTokenPrediction,
    masks: BlockwiseMaskGenerator,
    session: Session,
    precision: Precision,
) -> Callable[[nn.Module, int], dict[str, float]] | None:
    """Returns the evaluation on held-out images, or None if there are none."""
    if not config.eval_data_path:
        return None
    transform = MaskedImageModelingEvalTransform(
        config.input_size,
        config.second_input_size,
        interpolation=config.train_interpolation,
        second_interpolation=config.second_interpolation,
        mask_generator=masks,
    )
    dataset = ImageDataset(find_together(config.eval_data_path), transform, config.seed)
    few = min(config.num_workers, EVALUATION_WORKERS)
    loader = epoch_loader(dataset, config, session, num_workers=few, shuffle=False, drop_last=False)
    return lambda model, _epoch: evaluate(model, objective, loader, precision)


@torch.no_grad()
def evaluate(
    model: nn.Module, objective: MaskedTokenPrediction, loader: EpochLoader, precision: Precision
) -> dict[str, float]:
    """Scores masked-token prediction over a data set, each image once with a fixed mask.

    Returns:
        ``loss`` and ``mlm_acc``, means over all masked patches, and ``most_frequent_acc``: what always answering the
        data set's most frequent token would score, the bar to clear.
    """
    model.eval()
    device = precision.device
    summed_loss = torch.zeros((), device=device)
    counts = torch.zeros(objective.tokenizer.vocab_size + 1, dtype=torch.int64, device=device)  # tokens; right answers
    for host_batch in loader.epoch(0):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in with_masked_index(host_batch).items()}
        with precision.autocast():
            logits, tokens = objective.predict(model, batch)
        summed_loss += F.cross_entropy(logits.float(), tokens, reduction="sum")
        counts[-1] += (logits.argmax(dim=-1) == tokens).sum()
        counts[:-1] += torch.bincount(tokens, minlength=len(counts) - 1)
    loss = distributed.sum_over_ranks(summed_loss).item()
    *frequencies, right = distributed.sum_over_ranks(counts).tolist()
    patches = sum(frequencies)
    return {"loss": loss / patches, "mlm_acc": right / patches, "most_frequent_acc": max(frequencies) / patches}


def log_summary(config: PretrainingConfig, trainer: Trainer, tokenizer: VisualTokenizer, session: Session) -> None:
    """Says what is about to run, and warns where the learning rate does not fit the batch."""
    batch = effective_batch(config)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    logger.info("model %s: %s parameters, %s", config.model, f"{parameters:,}", trainer.precision.dtype)
    logger.info("tokenizer %s: %d tokens", config.discrete_vae_weight_path, tokenizer.vocab_size)
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
