"""Pictures of pre-training: what a model makes of masked images, and the curves of training logs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from beit.commands.visualize_inputs import Shown, image_files, read_shown
from beit.config import from_plain, option
from beit.data.datasets import sample_randomness
from beit.data.preprocessing import normalization
from beit.errors import InputError
from beit.modeling import VisionTransformerForMaskedImageModeling
from beit.storage import load_checkpoint
from beit.targets import PredictionTarget
from beit.tasks.pretraining import (
    MaskedPrediction,
    PretrainingConfig,
    build_mask_generator,
    build_model,
    build_target,
    evaluation_transform,
)
from beit.training.checkpoint import load_exactly
from beit.training.distributed import select_device
from beit.visualization.curves import overlaid, read_log
from beit.visualization.figures import check_picture_name, draw_panels
from beit.visualization.plots import draw_curves
from beit.visualization.reconstructions import Reconstructions
from beit.visualization.reconstructions import reconstruct as reconstruct_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CurvesConfig:
    """The arguments of ``beit visualize curves``."""

    logs: tuple[str, ...] = option((), "log.txt files, or the run folders they are in", positional=True)
    output: str = option("curves.png", "the picture to write, .png or .svg", short="-o")
    metrics: tuple[str, ...] = option((), "metrics to draw, such as loss mlm_acc; all but bookkeeping by default")


def curves(config: CurvesConfig) -> None:
    """Draws the numbers of one or several runs over epochs, or over optimizer steps where the runs log those.

    Raises:
        InputError: A log is missing or none, or holds nothing to draw.
    """
    check_picture_name(config.output)
    runs = {_run_name(path, config.logs): read_log(path) for path in config.logs}
    draw_curves(config.output, overlaid(runs, config.metrics))
    logger.info("%s written", config.output)


def _run_name(path: str, paths: Sequence[str]) -> str:
    """Names a run after its folder, or after the whole path where two folders have the same name."""
    folders = [_folder(other).name for other in paths]
    name = _folder(path).name
    return name if folders.count(name) == 1 else str(path)


def _folder(path: str) -> Path:
    resolved = Path(path).resolve()
    return resolved if resolved.is_dir() else resolved.parent


@dataclass(frozen=True)
class ReconstructConfig:
    """The arguments of ``beit visualize reconstruct``."""

    checkpoint: str = option("", "checkpoint of a pre-training run")
    tokenizer: str = option("", "folder of its tokenizer, if it predicts tokens; the run's own by default")
    images: tuple[str, ...] = option((), "image files, folders of images, or shards-{000..127}.tar")
    output: str = option("reconstructions.png", "the picture to write, .png or .svg", short="-o")
    limit: int = option(8, "most images to draw")
    seed: int = option(0, "seed of the masks")
    device: str = option("cpu", "cuda, cpu or mps")


def reconstruct(config: ReconstructConfig) -> None:
    """Draws image, masked image and predictions: of tokens also what the tokenizer itself makes of the image."""
    if not config.checkpoint or not config.images:
        raise InputError("--checkpoint and --images are needed: a pre-training checkpoint, and what to show it")
    check_picture_name(config.output)
    paths = image_files(config.images, config.limit)
    device = select_device(config.device, 0)
    pretraining, model, target = load_pretrained(config.checkpoint, config.tokenizer, device)
    result = reconstruct_files(paths, pretraining, model, target, config.seed)
    draw_panels(config.output, result.panels(), result.captions())
    logger.info("%s written", config.output)


def load_pretrained(
    checkpoint_path: str | Path, tokenizer_path: str, device: torch.device
) -> tuple[PretrainingConfig, VisionTransformerForMaskedImageModeling, PredictionTarget]:
    """Rebuilds a pre-trained model from its checkpoint, with the target it was trained on.

    Args:
        checkpoint_path: A pre-training checkpoint; it holds the settings of its run.
        tokenizer_path: The tokenizer's folder; empty for the one that the run used.
        device: Where both go.

    Raises:
        InputError: The file is no pre-training checkpoint, its target is not one of ``--target``, or the tokenizer
            cannot be loaded.
    """
    checkpoint = load_checkpoint(Path(checkpoint_path))
    settings = checkpoint.get("args") if isinstance(checkpoint, Mapping) else None
    if settings is None or "model" not in checkpoint or "lm_head.weight" not in checkpoint["model"]:
        raise InputError(
            f"{checkpoint_path} is no checkpoint of pre-training with its settings under 'args', so there is nothing "
            "to reconstruct; the other `beit visualize` commands take any BEiT"
        )
    config = from_plain(PretrainingConfig, settings if isinstance(settings, dict) else vars(settings))
    config = replace(config, discrete_vae_weight_path=tokenizer_path or config.discrete_vae_weight_path)
    if config.target == "tokens" and not config.discrete_vae_weight_path:
        raise InputError("--tokenizer is missing: the folder of the tokenizer that the model was trained with")
    target = build_target(config, device)
    if (learned := checkpoint.get("target", target.name)) != target.name:
        raise InputError(f"{checkpoint_path} learned to predict {learned}, which this command cannot draw")
    model = build_model(config, target.output_size).to(device)
    load_exactly(model, checkpoint["model"], str(checkpoint_path))
    return config, model, target


def reconstruct_files(
    images: Sequence[Shown],
    config: PretrainingConfig,
    model: VisionTransformerForMaskedImageModeling,
    target: PredictionTarget,
    seed: int = 0,
) -> Reconstructions:
    """Masks images as in pre-training and lets a model fill them in.

    Args:
        images: Files, or images in shards.
        config: The settings of the model's run.
        model: The model.
        target: What it was trained to predict.
        seed: Seed of the masks.

    Raises:
        InputError: One cannot be read.
    """
    transform = evaluation_transform(config, target, build_mask_generator(config, model.patch_embed.grid_size))
    samples = []
    for number, shown in enumerate(images):
        image = read_shown(shown)
        with sample_randomness(seed, 0, number) as rng:
            samples.append(transform(image, rng))
    device = next(model.parameters()).device
    batch = {name: torch.stack([sample[name] for sample in samples]).to(device) for name in samples[0]}
    outputs_of_all = MaskedPrediction(target, *normalization(config.imagenet_default_mean_and_std)).outputs_of_all
    return reconstruct_tensors(model, outputs_of_all, target, batch)
