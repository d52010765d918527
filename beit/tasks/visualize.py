"""Pictures on demand: what a pre-trained model makes of masked images, and the curves of training logs."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from beit.config import from_plain, option
from beit.data.datasets import UnreadableImageError, read_image, sample_randomness
from beit.data.transforms import MaskedImageModelingEvalTransform
from beit.errors import InputError
from beit.modeling import VisionTransformerForMaskedImageModeling
from beit.storage import load_checkpoint
from beit.tasks.masked_image_modeling import PretrainingConfig, build_mask_generator, build_model
from beit.tasks.options import check_positive, normalization
from beit.tasks.visualize_inputs import image_files
from beit.tokenizer import VisualTokenizer, load_tokenizer
from beit.training.checkpoint import load_exactly
from beit.training.distributed import select_device
from beit.visualization.curves import diagrams, read_log
from beit.visualization.figures import check_picture_name, draw_curves, draw_panels
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
    """Draws the numbers of one or several runs over epochs."""
    check_picture_name(config.output)
    runs = {_run_name(path, config.logs): read_log(path) for path in config.logs}
    draw_curves(config.output, diagrams(runs, config.metrics))
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
    tokenizer: str = option("", "folder of its tokenizer; the run's own by default")
    images: tuple[str, ...] = option((), "image files, or folders of images")
    output: str = option("reconstructions.png", "the picture to write, .png or .svg", short="-o")
    limit: int = option(8, "most images to draw")
    seed: int = option(0, "seed of the masks")
    device: str = option("cpu", "cuda, cpu or mps")


def reconstruct(config: ReconstructConfig) -> None:
    """Draws image, masked image, the tokenizer's reconstruction and the predicted tokens decoded."""
    if not config.checkpoint or not config.images:
        raise InputError("--checkpoint and --images are needed: a pre-training checkpoint, and what to show it")
    check_picture_name(config.output)
    check_positive(config, "limit")
    device = select_device(config.device, 0)
    pretraining, model, tokenizer = load_pretrained(config.checkpoint, config.tokenizer, device)
    paths = image_files(config.images, config.limit)
    result = reconstruct_files(paths, pretraining, model, tokenizer, config.seed)
    draw_panels(config.output, result.panels(), result.captions())
    logger.info("%s written", config.output)


def load_pretrained(
    checkpoint_path: str | Path, tokenizer_path: str, device: torch.device
) -> tuple[PretrainingConfig, VisionTransformerForMaskedImageModeling, VisualTokenizer]:
    """Rebuilds a pre-trained model from its checkpoint, with the tokenizer it was trained with.

    Args:
        checkpoint_path: A pre-training checkpoint; it holds the settings of its run.
        tokenizer_path: The tokenizer's folder; empty for the one that the run used.
        device: Where both go.

    Raises:
        InputError: The file is no pre-training checkpoint, or the tokenizer cannot be loaded.
    """
    checkpoint = load_checkpoint(Path(checkpoint_path))
    settings = checkpoint.get("args")
    if settings is None or "model" not in checkpoint:
        raise InputError(f"{checkpoint_path} does not hold the settings of a pre-training run under 'args'")
    config = from_plain(PretrainingConfig, settings if isinstance(settings, dict) else vars(settings))
    folder = tokenizer_path or config.discrete_vae_weight_path
    if not folder:
        raise InputError("--tokenizer is missing: the folder of the tokenizer that the model was trained with")
    tokenizer = load_tokenizer(folder, config.discrete_vae_type, device)  # type: ignore[arg-type]
    model = build_model(config, tokenizer.vocab_size).to(device)
    load_exactly(model, checkpoint["model"], str(checkpoint_path))
    return config, model, tokenizer


def reconstruct_files(
    paths: Sequence[str | Path],
    config: PretrainingConfig,
    model: VisionTransformerForMaskedImageModeling,
    tokenizer: VisualTokenizer,
    seed: int = 0,
) -> Reconstructions:
    """Masks image files as in pre-training and lets a model fill them in.

    Args:
        paths: The images.
        config: The settings of the model's run.
        model: The model.
        tokenizer: Its tokenizer.
        seed: Seed of the masks.

    Raises:
        InputError: A file is missing, or no image.
    """
    transform = MaskedImageModelingEvalTransform(
        config.input_size,
        config.second_input_size,
        interpolation=config.train_interpolation,
        second_interpolation=config.second_interpolation,
        mask_generator=build_mask_generator(config, model.patch_embed.grid_size),
    )
    samples = []
    for number, path in enumerate(paths):
        with sample_randomness(seed, 0, number) as rng:
            try:
                samples.append(transform(read_image(path), rng))
            except UnreadableImageError as error:
                raise InputError(f"cannot read the image {path}: {error}") from error
    device = next(model.parameters()).device
    batch: dict[str, Tensor] = {
        name: torch.stack([sample[name] for sample in samples]).to(device) for name in samples[0]
    }
    views = batch["image"], batch["token_image"], batch["mask"]
    return reconstruct_tensors(model, tokenizer, *views, *normalization(config))
