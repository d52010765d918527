"""``beit visualize reconstruct``, ``embeddings`` and ``curves``: predictions, features and the course of runs."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit.checkpoints.released import resolve
from beit.commands.features import compute
from beit.commands.settings import CurvesConfig, EmbeddingsConfig, ReconstructConfig
from beit.commands.visualize_inputs import open_viewer
from beit.config import from_plain
from beit.data.datasets import index_images, sample_randomness
from beit.data.index import image_files
from beit.data.preprocessing import IMAGENET_DEFAULT_MEAN
from beit.errors import InputError, counted
from beit.inference import OneImage, as_input, block_number
from beit.modeling import VisionTransformerForMaskedImageModeling
from beit.registry import TARGETS
from beit.storage import load_checkpoint, settings_in
from beit.targets import VISUAL_TOKENS, MaskedPrediction, PredictionTarget, TokenTarget
from beit.tasks.base import image_statistics
from beit.tasks.pretraining import build_mask_generator, build_model, build_target, evaluation_transform
from beit.tasks.settings import PretrainingConfig
from beit.tokenizers.base import load_tokenizer
from beit.training.checkpoint import load_exactly
from beit.training.distributed import select_device
from beit.visualization.curves import overlaid, read_log
from beit.visualization.embeddings import check_embedding, embed, group_by_class
from beit.visualization.figures import check_picture, draw_panels
from beit.visualization.plots import draw_curves, draw_points
from beit.visualization.reconstructions import reconstruct as reconstruct_batch
from beit.zoo import open_model

logger = logging.getLogger(__name__)

MASKED_SHARE = 0.4  # of the patches, where a checkpoint does not record it: the paper's


def curves(config: CurvesConfig) -> None:
    """Draws logged metrics over epochs, or steps if logged; raises InputError if a log is unreadable or empty."""
    check_picture(config.output, config.overwrite)
    folders = [path if path.is_dir() else path.parent for path in (Path(log).resolve() for log in config.logs)]
    names = [folder.name for folder in folders]
    labels = [name if names.count(name) == 1 else log for name, log in zip(names, config.logs, strict=True)]
    runs = {label: read_log(log) for label, log in zip(labels, config.logs, strict=True)}
    draw_curves(config.output, overlaid(runs, config.metrics))
    logger.info("%s written", config.output)


def reconstruct(config: ReconstructConfig) -> None:
    """Draws images, masked images and predictions; for a model of tokens also the tokenizer's own reconstructions."""
    if not config.checkpoint or not config.images:
        raise InputError("--checkpoint and --images are needed: a pre-training checkpoint, and images to show")
    check_picture(config.output, config.overwrite)
    paths = image_files(config.images, config.limit)
    run, model, target = open_pretrained(config.checkpoint, config.tokenizer, select_device(config.device, 0))
    draw_panels(config.output, *reconstruct_files(paths, run, model, target, config.seed, config.steps))
    logger.info("%s written", config.output)


def open_pretrained(
    checkpoint_path: str | Path, tokenizer_path: str, device: torch.device
) -> tuple[PretrainingConfig, VisionTransformerForMaskedImageModeling, PredictionTarget]:
    """Rebuilds a pre-trained model and its prediction target from its checkpoint, which has the run's settings.

    ``tokenizer_path`` is the folder of the tokenizer; empty for the one the run used. A checkpoint without a run's
    settings is taken for one of visual tokens, in any format. Raises :class:`InputError` for other checkpoints, or if
    target or tokenizer cannot be built.
    """
    found = resolve(checkpoint_path)
    checkpoint: Any = load_checkpoint(found) if found.is_file() else None
    settings = settings_in(checkpoint) if isinstance(checkpoint, Mapping) else {}
    if not settings or "lm_head.weight" not in checkpoint.get("model", ()):
        return _open_of_elsewhere(str(checkpoint_path), tokenizer_path, device)
    chosen, learned = settings.get("target", "tokens"), checkpoint.get("target")
    if chosen not in TARGETS or (chosen == "tokens" and learned not in (None, VISUAL_TOKENS)):
        raise InputError(f"{checkpoint_path} was trained to predict {learned}, which this command cannot draw")
    config = from_plain(PretrainingConfig, settings)
    path = tokenizer_path or config.discrete_vae_weight_path or ""
    if chosen == "tokens" and not tokenizer_path and not os.path.exists(path):
        was = f"; {path}, where the run had it, is not there" if path else ""
        raise InputError(f"--tokenizer is missing: the folder of the tokenizer the model was trained with{was}")
    target = build_target(replace(config, discrete_vae_weight_path=path), device)
    if learned not in (None, target.name):
        raise InputError(f"{checkpoint_path} was trained to predict {learned}, which this command cannot draw")
    model = build_model(config, target.output_size).to(device)
    load_exactly(model, checkpoint["model"], str(checkpoint_path))
    return config, model, target


def _open_of_elsewhere(
    source: str, tokenizer_path: str, device: torch.device
) -> tuple[PretrainingConfig, VisionTransformerForMaskedImageModeling, PredictionTarget]:
    model, metadata = open_model(source)
    if not isinstance(model, VisionTransformerForMaskedImageModeling):
        others = "other commands of `beit visualize` take any BEiT"
        raise InputError(f"{source} has nothing to reconstruct: needed is a checkpoint of pre-training; {others}")
    if not tokenizer_path:
        raise InputError(f"--tokenizer is missing: {source} does not say which one it was trained with")
    tokenizer = load_tokenizer(tokenizer_path, device=device)
    if tokenizer.vocab_size != model.lm_head.out_features:
        sizes = f"{tokenizer.vocab_size} tokens, and {source} predicts {model.lm_head.out_features}"
        raise InputError(f"{tokenizer_path} is not the tokenizer of this model: it has {sizes}")
    grid = model.patch_embed.grid_size
    masked = round(MASKED_SHARE * grid[0] * grid[1])
    run = PretrainingConfig(
        input_size=model.img_size,
        second_input_size=(grid[0] * tokenizer.downsampling, grid[1] * tokenizer.downsampling),
        imagenet_default_mean_and_std=metadata.get("mean") == IMAGENET_DEFAULT_MEAN,
        num_mask_patches=masked,
        min_mask_patches_per_block=max(1, min(PretrainingConfig.min_mask_patches_per_block, masked // 4)),
    )
    return run, model.to(device), TokenTarget(tokenizer)


def reconstruct_files(
    images: Sequence[OneImage],
    run: PretrainingConfig,
    model: VisionTransformerForMaskedImageModeling,
    target: PredictionTarget,
    seed: int = 0,
    steps: int = 1,
) -> tuple[dict[str, Tensor], list[str]]:
    """Masks images as in pre-training and lets the model fill them in; raises InputError for an unreadable image.

    Returns panels and captions; see :func:`beit.visualization.reconstructions.reconstruct`.
    """
    transform = evaluation_transform(run, target, build_mask_generator(run, model.patch_embed.grid_size))
    samples = []
    for number, shown in enumerate(images):
        with sample_randomness(seed, 0, number) as rng:
            samples.append(transform(as_input(shown, run.in_chans), rng))
    device = next(model.parameters()).device
    batch = {name: torch.stack([sample[name] for sample in samples]).to(device) for name in samples[0]}
    outputs_of_all = MaskedPrediction(target, *image_statistics(run)).outputs_of_all
    return reconstruct_batch(model, outputs_of_all, target, batch, steps)


def embeddings(config: EmbeddingsConfig) -> None:
    """Draws the features of images as points in 2D, coloured by class; raises InputError if there are no classes."""
    check_picture(config.output, config.overwrite)
    index = index_images(config.data_path)
    if not index.class_names:
        needed = "a folder for the images of each class (in shards, a .cls for each image)"
        raise InputError(f"{config.data_path} has no classes: needed is {needed}")
    check_embedding(min(len(index), config.limit), config.method)
    viewer = open_viewer(config)
    features, labels, *_ = compute(config, index, viewer, config.limit)
    points, axes = embed(features, config.method, config.seed)
    groups = [(name, points[where]) for name, where in group_by_class(labels, index.class_names)]
    others = None
    if not groups[-1][0]:
        others = (counted(len(labels.unique()) - len(groups) + 1, "other class"), groups.pop()[1])
    pool = {"mean": "mean of patch tokens", "cls": "class token"}.get(config.pool, config.pool)
    block = block_number(viewer.model, config.block)
    title = f"{len(labels)} images, block {block}, {pool}: {Path(config.checkpoint).name}"
    draw_points(config.output, groups, axes, title, others)
    logger.info("%s written", config.output)
