"""Training the tokenizer: a discrete VAE on a folder of images (the "customized" tokenizer of pre-training).

Source: BEiT (arXiv 2106.08254), section 2.1; DALL-E (arXiv 2102.12092), section 2.1 and appendix A.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchvision.utils import make_grid

from beit.config import Size, option, to_plain
from beit.data.datasets import ImageDataset
from beit.data.loaders import EpochDataset, EpochLoader
from beit.data.transforms import CenterCropTransform, RandomCropTransform, to_unit_range
from beit.errors import InputError
from beit.storage import atomic_write
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
    optimizer_for,
    schedules,
    session_of,
    share_out,
)
from beit.tokenizers.dvae import (
    DiscreteVAE,
    codebook_statistics,
    count_codes,
    dvae_loss,
    from_signed_range,
    kl_to_uniform,
    reconstruction_loss,
    relaxed_codes,
    save_dvae,
    to_signed_range,
)
from beit.training import distributed
from beit.training.checkpoint import RunFolder
from beit.training.logging import ScalarWriter
from beit.training.loop import Batch, Trainer
from beit.training.optim import parameter_groups
from beit.training.precision import Precision, resolve_amp_dtype
from beit.training.schedules import WarmupCosine
from beit.training.session import Session

logger = logging.getLogger(__name__)

PICTURE = "reconstructions.png"
COLLAPSED_BELOW = 0.05  # codebook perplexity, as a share of the most it could be
COLLAPSE_COUNTS_FROM = 0.25  # share of the run; before that every codebook looks collapsed
PICTURE_IMAGES = 16
PICTURE_COLUMNS = 8


@dataclass(frozen=True)
class DvaeConfig(RunOptions, OptimizerOptions):
    """The flags of ``run_dvae_training.py``."""

    data_path: str = option("", "folder of images, or a text file of paths")
    eval_data_path: str | None = option(None, "held-out images to evaluate on; some training images by default")
    eval_images: int = option(512, "training images to evaluate on where there is no --eval_data_path")
    eval_freq: int = option(1, "epochs between two evaluations")
    input_size: Size = option(112, "size of the training crops, in pixels (HEIGHTxWIDTH or one number)")
    interpolation: str = option(
        "lanczos", "interpolation of the crops, as that of the tokenizer's view in pre-training"
    )
    min_crop: float = option(0.08, "smallest crop, as a share of the image's area")
    max_unreadable: int | None = option(
        None, "unreadable images that end the run; 1 % of them, at least 10, by default"
    )

    num_tokens: int = option(8192, "size of the vocabulary")
    codebook_dim: int = option(512, "length of a code's vector")
    num_layers: int = option(3, "halvings of the resolution: 3 makes a token of 8 x 8 pixels")
    hidden_dim: int = option(256, "channels inside the encoder and the decoder")

    reconstruction: str = option("mse", "reconstruction loss", choices=("mse", "smooth_l1"))
    kl_weight: float = option(0.1, "weight of the KL divergence to uniform codes; both are per pixel value")
    kl_warmup_steps: int = option(-1, "optimizer steps from weight 0 to --kl_weight; wins over --kl_warmup_share")
    kl_warmup_share: float = option(0.1, "the same as a share of the run")
    temperature_start: float = option(1.0, "first temperature of the Gumbel-softmax")
    temperature_end: float = option(1 / 16, "last temperature of the Gumbel-softmax")
    temperature_steps: int = option(-1, "optimizer steps of its cosine; wins over --temperature_share when positive")
    temperature_share: float = option(0.75, "the same as a share of the run")
    ema_decay: float = option(0.999, "decay of the average of the weights, which is what the run is for; 0 for none")

    batch_size: int = option(64, "images per process and batch")
    epochs: int = option(20, "passes over the data")
    save_ckpt_freq: int = option(1, "epochs between two checkpoint-<epoch>.pth")
    keep_checkpoints: int = option(2, "newest checkpoint-<epoch>.pth to keep; 0 keeps all")
    lr: float = option(5e-4, "peak learning rate; never rescaled to the batch")
    min_lr: float = option(1e-5, "learning rate at the end of the cosine")
    warmup_epochs: int = option(0, "epochs of linear warm-up")
    warmup_steps: int = option(100, "optimizer steps of linear warm-up; wins over --warmup_epochs when positive")
    weight_decay: float = option(1e-4, "weight decay")
    clip_grad: float | None = option(1.0, "largest gradient norm")
    opt_betas: tuple[float, ...] | None = option((0.9, 0.999), "decay rates of Adam")


def main(config: DvaeConfig) -> None:
    """Trains a discrete VAE as the flags say."""
    check(config)
    with session_of(config) as session:
        config = share_out(config, session.world_size)
        vae = DiscreteVAE(
            config.input_size, config.num_tokens, config.codebook_dim, config.num_layers, config.hidden_dim
        )
        model = RelaxedAutoencoder(vae).to(session.device)
        average = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)

        loader = build_loader(config, session)
        steps_per_epoch = loader.batches_per_epoch // config.update_freq
        lr, weight_decay = schedules(config, steps_per_epoch)
        temperature, kl_weight = loss_schedules(config, config.epochs * steps_per_epoch)
        evaluation = HardTokenEvaluation(average.module.vae, build_eval_loader(config, session), config, session.device)
        trainer = Trainer(
            model,
            Reconstruction(temperature, kl_weight, config.reconstruction),
            loader,
            build_optimizer(config, model, session.device),
            Precision(resolve_amp_dtype(config.amp_dtype, session.device), session.device),
            loop_settings(config, evaluate_epochs=config.eval_freq),
            lr,
            weight_decay,
            folder=session.folder,
            log_dir=config.log_dir,
            config=to_plain(config),
            ema=average,
            evaluate=evaluation,
            on_epoch_end=lambda epoch, scalars: publish(average.module.vae, evaluation, session.folder, epoch, scalars),
        )
        session.resume(trainer, path=config.resume, auto=config.auto_resume, start_epoch=config.start_epoch)
        log_summary(config, trainer, session)
        trainer.fit()
        if session.folder:  # once more: a kill between the last checkpoint and its tokenizer is made good here
            save_dvae(session.folder.path, average.module.vae)


def check(config: DvaeConfig) -> None:
    """Refuses settings that cannot work.

    Raises:
        InputError: One of them; the message names the flag.
    """
    check_training(config)
    check_positive(config, "eval_images", "eval_freq")
    if not config.data_path:
        raise InputError("--data_path is missing: give a folder of images, or a text file of paths")
    if not 0 < config.temperature_end <= config.temperature_start:
        raise InputError(
            f"--temperature_end {config.temperature_end:g}: must be above 0 and at most --temperature_start "
            f"{config.temperature_start:g}"
        )
    if config.kl_weight < 0:
        raise InputError(f"--kl_weight {config.kl_weight:g}: must be 0 or more")
    for name, low, high in (("kl_warmup_share", 0, 1), ("temperature_share", 0, 1), ("ema_decay", 0, 0.999999)):
        if not low <= getattr(config, name) <= high:
            raise InputError(f"--{name} {getattr(config, name):g}: must be between 0 and 1")
    if not 0 < config.min_crop <= 1:
        raise InputError(f"--min_crop {config.min_crop:g}: must be above 0 and at most 1")


class RelaxedAutoencoder(nn.Module):
    """Image to relaxed codes to image: a training pass through a dVAE as one module, as data parallelism needs it."""

    def __init__(self, vae: DiscreteVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Maps images ``(B, 3, H, W)`` in [-1, 1] to logits ``(B, num_tokens, h, w)`` and images ``(B, 3, H, W)``."""
        logits = self.vae(images)
        return logits, self.vae.decode_relaxed(relaxed_codes(logits, temperature))


def loss_schedules(config: DvaeConfig, total_steps: int) -> tuple[WarmupCosine, WarmupCosine]:
    """Returns the schedules of the temperature (a cosine, then constant) and of the KL weight (linear, then constant).

    The cosine matters: DALL-E's authors saw runs diverge with a temperature that falls linearly.
    """
    annealing = _steps(config.temperature_steps, config.temperature_share, total_steps)
    warmup = _steps(config.kl_warmup_steps, config.kl_warmup_share, total_steps)
    return (
        WarmupCosine(config.temperature_start, config.temperature_end, annealing),
        WarmupCosine(config.kl_weight, config.kl_weight, total_steps, warmup),
    )


def _steps(steps: int, share: float, total_steps: int) -> int:
    return steps if steps >= 0 else round(share * total_steps)


class Reconstruction:
    """The objective: reconstruction from relaxed codes, and the KL divergence of the codes to the uniform prior.

    Args:
        temperature: Temperature of the relaxation at an optimizer step.
        kl_weight: Weight of the KL at an optimizer step.
        kind: ``mse`` or ``smooth_l1``.
    """

    def __init__(self, temperature: Callable[[int], float], kl_weight: Callable[[int], float], kind: str) -> None:
        self.temperature, self.kl_weight, self.kind = temperature, kl_weight, kind

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of an optimizer step, and what to log."""
        images = to_signed_range(to_unit_range(batch["image"]))
        temperature, kl_weight = self.temperature(step), self.kl_weight(step)
        logits, reconstructed = model(images, temperature)
        loss = dvae_loss(logits, reconstructed, images, kl_weight, self.kind)  # type: ignore[arg-type]
        metrics = {
            "reconstruction_loss": loss.reconstruction,
            "kl": loss.kl,
            "perplexity": batch_perplexity(logits.detach().argmax(dim=1), logits.shape[1]),
            # Filled in on the device: copying a number there would make the host wait.
            "temperature": torch.full((), temperature, device=images.device),
            "kl_weight": torch.full((), kl_weight, device=images.device),
        }
        return loss.total, metrics


def batch_perplexity(ids: Tensor, num_tokens: int) -> Tensor:
    """Returns exp of the entropy of the codes' shares, a scalar on the device that the host does not wait for."""
    ids = ids.flatten()  # bincount would make the host wait, to learn how many there are
    counts = torch.zeros(num_tokens, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))
    return torch.special.entr(counts / len(ids)).sum().exp()


def build_optimizer(config: DvaeConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Creates the optimizer; biases get no weight decay."""
    return optimizer_for(config, parameter_groups(model, config.weight_decay), device)


def build_loader(config: DvaeConfig, session: Session) -> EpochLoader:
    """Creates the loader of random crops."""
    transform = RandomCropTransform(config.input_size, interpolation=config.interpolation, scale=(config.min_crop, 1.0))
    dataset = ImageDataset(find_together(config.data_path), transform, config.seed)
    return epoch_loader(dataset, config, session)


def build_eval_loader(config: DvaeConfig, session: Session) -> EpochLoader:
    """Creates the loader of whole images, held-out ones or a fixed choice of the training images.

    It is shuffled, always in the same way, so that the picture of its first images shows something of all classes.
    """
    transform = CenterCropTransform(config.input_size, interpolation=config.interpolation)
    dataset: EpochDataset = ImageDataset(
        find_together(config.eval_data_path or config.data_path), transform, config.seed
    )
    if not config.eval_data_path and config.eval_images < len(dataset):
        dataset = EvenlySpread(dataset, config.eval_images)
    few = min(config.num_workers, EVALUATION_WORKERS)
    return epoch_loader(dataset, config, session, num_workers=few, drop_last=False)


class EvenlySpread:
    """``count`` samples of a data set at even distances, so that every class folder has its share.

    Args:
        dataset: What to choose from.
        count: How many samples; at most ``len(dataset)``.
    """

    def __init__(self, dataset: EpochDataset, count: int) -> None:
        self.dataset = dataset
        self.indices = [position * len(dataset) // count for position in range(count)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, position = key
        return self.dataset[epoch, self.indices[position]]

    def name(self, position: int) -> str:
        """Returns what the data set calls the sample."""
        return self.dataset.name(self.indices[position])


class HardTokenEvaluation:
    """What the tokenizer is worth in use: reconstructions from plain argmax tokens, and how evenly these are used.

    Args:
        vae: The averaged weights.
        loader: The images; the same ones each time.
        config: The run's settings.
        device: Where the weights are.

    Attributes:
        picture: Some images above their reconstructions, ``(3, H', W')`` in [0, 1], of the last evaluation.
    """

    def __init__(self, vae: DiscreteVAE, loader: EpochLoader, config: DvaeConfig, device: torch.device) -> None:
        self.vae, self.loader, self.device = vae, loader, device
        self.kind, self.epochs = config.reconstruction, config.epochs
        self.picture: Tensor | None = None

    @torch.no_grad()
    def __call__(self, _model: nn.Module, epoch: int) -> dict[str, float]:
        """Returns ``loss``, ``perplexity``, ``used_codes``, ``dead_codes``, ``kl_per_token`` (nats) and ``tokens``."""
        self.vae.eval()
        totals = torch.zeros(3, device=self.device)  # summed loss, summed KL, images
        counts = torch.zeros(self.vae.num_tokens, dtype=torch.int64, device=self.device)
        for number, images in enumerate(self._batches()):
            logits = self.vae(images)
            ids = logits.argmax(dim=1)
            reconstructed = self.vae.decode(ids)
            loss = reconstruction_loss(reconstructed, images, self.kind)  # type: ignore[arg-type]
            totals += torch.stack([loss, kl_to_uniform(logits), torch.ones_like(loss)]) * len(images)
            counts += count_codes(ids, self.vae.num_tokens)
            if number == 0:
                self.picture = side_by_side(from_signed_range(images), from_signed_range(reconstructed))
        results = self._results(distributed.sum_over_ranks(totals).tolist(), distributed.sum_over_ranks(counts))
        if epoch + 1 >= COLLAPSE_COUNTS_FROM * self.epochs:
            warn_of_collapse(results)
        return results

    def _batches(self) -> Iterator[Tensor]:
        for batch in self.loader.epoch(0):
            yield to_signed_range(to_unit_range(batch["image"].to(self.device, non_blocking=True)))

    def _results(self, totals: Sequence[float], counts: Tensor) -> dict[str, float]:
        loss, kl, images = totals
        tokens = int(counts.sum())
        statistics = codebook_statistics(counts)
        return {
            "loss": loss / images,
            "perplexity": statistics.perplexity,
            "used_codes": statistics.used,
            "dead_codes": statistics.dead,
            "kl_per_token": kl / tokens,
            "tokens": tokens,
        }


def side_by_side(images: Tensor, reconstructed: Tensor) -> Tensor:
    """Arranges images in [0, 1], ``(B, 3, H, W)``, in rows, each row above that of its reconstructions.

    Returns:
        One picture ``(3, H', W')`` on the CPU.
    """
    rows: list[Tensor] = []
    columns = min(PICTURE_COLUMNS, len(images))
    for start in range(0, min(PICTURE_IMAGES, len(images)) - columns + 1, columns):
        rows += [images[start : start + columns], reconstructed[start : start + columns]]
    return make_grid(torch.cat(rows).float().cpu(), nrow=columns, padding=2, pad_value=1.0)


def warn_of_collapse(results: Mapping[str, float]) -> None:
    """Warns when few codes do all the work, and says what to change.

    Args:
        results: Of an evaluation. A small ``kl_per_token`` means that the encoder commits to no code.
    """
    vocabulary = results["used_codes"] + results["dead_codes"]
    if results["perplexity"] >= COLLAPSED_BELOW * min(vocabulary, results["tokens"]):
        return
    undecided = results["kl_per_token"] < 0.25 * math.log(vocabulary)
    remedy = (
        "the encoder hardly decides between codes: lower --kl_weight or lengthen its warm-up (--kl_warmup_share)"
        if undecided
        else "the encoder settled on few codes too early: raise --kl_weight, lower --lr or --clip_grad, or lengthen "
        "the annealing (--temperature_share)"
    )
    logger.warning(
        "the codebook has collapsed: perplexity %.1f of %d codes, %d in use; %s",
        results["perplexity"],
        vocabulary,
        results["used_codes"],
        remedy,
    )


def publish(
    vae: DiscreteVAE, evaluation: HardTokenEvaluation, folder: RunFolder | None, epoch: int, scalars: ScalarWriter
) -> None:
    """Puts the tokenizer and the newest picture where the user finds them, at the end of an epoch."""
    if folder is not None:
        save_dvae(folder.path, vae)
    if evaluation.picture is None:
        return
    scalars.write_image("reconstructions", evaluation.picture, epoch)
    if folder is not None:
        pixels = (evaluation.picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        with atomic_write(folder.path / PICTURE) as file:
            Image.fromarray(pixels).save(file, format="PNG")
    evaluation.picture = None


def log_summary(config: DvaeConfig, trainer: Trainer, session: Session) -> None:
    """Says what is about to run."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    logger.info("dVAE: %s parameters, %s", f"{parameters:,}", trainer.precision.dtype)
    logger.info("%d tokens, each of %d x %d pixels", config.num_tokens, 2**config.num_layers, 2**config.num_layers)
    logger.info(
        "batch %d = %d images x %d processes x %d batches an update; %d updates an epoch, %d epochs; lr %g",
        effective_batch(config),
        config.batch_size,
        session.world_size,
        config.update_freq,
        trainer.steps_per_epoch,
        config.epochs,
        config.lr,
    )
