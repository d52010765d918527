"""Training the tokenizer: a discrete VAE on a folder of images (the "customized" tokenizer of pre-training).

Source: BEiT (arXiv 2106.08254), section 2.1; DALL-E (arXiv 2102.12092), section 2.1 and appendix A; for ``vq`` arXiv
1711.00937 (VQ-VAE), with the start of arXiv 2205.08535: first an autoencoder, then k-means, then quantisation.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from beit.data.datasets import ImageDataset
from beit.data.loaders import EpochDataset, EpochLoader, EvenlySpread
from beit.data.transforms import CenterCropTransform, RandomCropTransform, to_unit_range
from beit.errors import InputError
from beit.storage import atomic_write, weights_fingerprint
from beit.tasks.base import Evaluation, Metrics, Result, Task, find_together, fingerprints, run
from beit.tasks.settings import DvaeConfig
from beit.tokenizers.dvae import (
    Autoencoder,
    DiscreteVAE,
    QuantizedAutoencoder,
    RelaxedAutoencoder,
    closest_codes,
    codebook_statistics,
    count_codes,
    from_signed_range,
    kl_to_uniform,
    load_dvae,
    reconstruction_loss,
    save_dvae,
    to_signed_range,
    warn_of_collapse,
)
from beit.training import distributed
from beit.training.precision import Precision, resolve_amp_dtype
from beit.training.schedules import WarmupCosine
from beit.training.state import Average, Batch, LoopSettings, StepFunction
from beit.training.trackers import Trackers
from beit.visualization.reconstructions import side_by_side

logger = logging.getLogger(__name__)

PICTURE = "reconstructions.png"
COLLAPSE_COUNTS_FROM = 0.25  # share of the run; before that every codebook looks collapsed
QUANTIZED_BY = 2000  # steps, in which an autoencoder has learnt enough for the first codes, however long the run
REVIVE_EVERY, REVIVE_UNTIL = 10, 0.9  # steps, and share of the run: a code needs some time to find its place


def main(config: DvaeConfig) -> Result:
    """Trains a discrete VAE as the settings say."""
    return run(DvaeTraining(config))


class DvaeTraining(Task[DvaeConfig]):
    """A discrete VAE; the moving average of its weights is the tokenizer that is published after every epoch."""

    def check(self) -> None:
        config = self.config
        if config.temperature_end > config.temperature_start:
            first, last = config.temperature_start, config.temperature_end
            raise InputError(f"--temperature_end {last:g}: must be at most --temperature_start {first:g}")

    def prepare(self) -> None:
        self.index = find_together(self.config.data_path)
        self.eval_index = find_together(self.config.eval_data_path) if self.config.eval_data_path else None

    def build_precision(self) -> Precision:
        """Returns the number format: bf16 on CPUs too, where they have it, since convolutions are all there is."""
        return Precision(resolve_amp_dtype(self.config.amp_dtype, self.device, bf16_cpu=True), self.device)

    def build_model(self) -> Autoencoder:
        config = self.config
        sizes = (config.codebook_size, config.codebook_dim, config.num_layers, config.hidden_dim)
        vae = DiscreteVAE(config.input_size, *sizes, in_chans=config.in_chans).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.quantizer == "gumbel":
            return RelaxedAutoencoder(vae)
        return QuantizedAutoencoder(vae, config.codebook_decay, config.commitment)

    def build_loader(self) -> EpochLoader:
        config = self.config
        scale = (config.min_crop, 1.0)
        options: dict[str, Any] = {"interpolation": config.interpolation, "in_chans": config.in_chans}
        transform = RandomCropTransform(config.input_size, **options, scale=scale)
        return self.loader_of(ImageDataset(self.index, transform, config.seed))

    def build_objective(self) -> StepFunction:
        return Reconstruction(schedule_of(self.config, self.loop_settings()), self.config.reconstruction)

    def build_average(self) -> Average:
        self.average = Average(self.model, decay=self.config.ema_decay, use_warmup=True)
        return self.average

    def build_evaluation(self) -> Evaluation:
        """Returns the evaluation with hard tokens on whole images, held-out ones or a fixed choice of training images.

        They are shuffled, always in the same way, so that the picture of the first ones shows all classes.
        """
        config = self.config
        options: dict[str, Any] = {"interpolation": config.interpolation, "in_chans": config.in_chans}
        transform = CenterCropTransform(config.input_size, **options)
        dataset: EpochDataset = ImageDataset(self.eval_index or self.index, transform, config.seed)
        if self.eval_index is None and config.eval_images < len(dataset):
            dataset = EvenlySpread(dataset, config.eval_images)
        loader = self.loader_of(dataset, training=False, shuffle=True, num_workers=self.few_workers())
        kind, epochs = config.reconstruction, config.epochs
        self.evaluation = HardTokenEvaluation(self.average.module, loader, kind, epochs, self.device)
        return self.evaluation

    def extras(self) -> Mapping[str, object]:
        return {**fingerprints(self.index, self.eval_index), "quantizer": self.config.quantizer}

    def build_epoch_end(self) -> Callable[[int, Trackers], None]:
        return self.publish

    def publish(self, epoch: int, scalars: Trackers) -> None:
        """Puts the tokenizer and the newest picture where the user finds them, at the end of an epoch."""
        folder, picture = self.session.folder, self.evaluation.picture
        self.finish()
        if picture is None:
            return
        scalars.write_image("reconstructions", picture, epoch)
        if folder is not None:
            pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            with atomic_write(folder.path / PICTURE) as file:
                Image.fromarray(pixels).save(file, format="PNG")
        self.evaluation.picture = None

    def summary(self) -> Iterator[str]:
        yield from super().summary()
        side = 2**self.config.num_layers
        yield f"{self.config.codebook_size} tokens, each of {side} x {side} pixels; lr {self.config.lr:g}"

    def finish(self) -> None:
        """Writes the tokenizer unless it is there: after a kill between checkpoint and tokenizer it is not."""
        if self.session.folder and self.average.module.has_codes():
            path, tokenizer = self.session.folder.path, self.average.module.tokenizer()
            with contextlib.suppress(InputError):  # as there is none yet, or a damaged one
                if weights_fingerprint(load_dvae(path)) == weights_fingerprint(tokenizer):
                    return
            save_dvae(path, tokenizer)


def loss_schedules(config: DvaeConfig, settings: LoopSettings) -> tuple[WarmupCosine, WarmupCosine]:
    """Returns the schedules of the temperature (a cosine, then constant) and of the KL weight (linear, then constant).

    The cosine matters: DALL-E's authors saw runs diverge with a temperature that falls linearly.
    """
    total = settings.total_steps
    annealing = config.temperature_steps if config.temperature_steps >= 0 else round(config.temperature_share * total)
    warmup = config.kl_warmup_steps if config.kl_warmup_steps >= 0 else round(config.kl_warmup_share * total)
    return (
        WarmupCosine(config.temperature_start, config.temperature_end, annealing),
        WarmupCosine(config.kl_weight, config.kl_weight, total, warmup),
    )


def schedule_of(config: DvaeConfig, settings: LoopSettings) -> Callable[[int], dict[str, float]]:
    """Returns the arguments of a pass besides the images, as a function of the optimizer step."""
    if config.quantizer == "gumbel":
        temperature, kl_weight = loss_schedules(config, settings)
        return lambda step: {"temperature": temperature(step), "kl_weight": kl_weight(step)}
    start = min(round(config.quantize_from * settings.total_steps), QUANTIZED_BY)
    end = REVIVE_UNTIL * settings.total_steps
    return lambda step: {"quantized": step >= start, "revive": step % REVIVE_EVERY == 0 and step < end}


class Reconstruction:
    """The objective: the error of reconstructed images (``mse`` or ``smooth_l1``), and the quantiser's penalty.

    ``schedule`` gives the quantiser's settings at an optimizer step.
    """

    def __init__(self, schedule: Callable[[int], dict[str, float]], kind: str) -> None:
        self.schedule, self.kind = schedule, kind

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = to_signed_range(to_unit_range(batch["image"])).contiguous(memory_format=torch.channels_last)
        reconstructed, penalty, metrics = model(images, **self.schedule(step))
        error = reconstruction_loss(reconstructed, images, self.kind)  # type: ignore[arg-type]
        return error + penalty, {"reconstruction_loss": error, **metrics}


class HardTokenEvaluation:
    """Evaluates the tokenizer as it is used: reconstructions from argmax tokens, and how evenly these are used.

    It has the averaged weights and ``loader`` the same images each time; early in the ``epochs`` no collapse is told.
    ``picture`` are some images above their reconstructions, ``(3, H', W')`` in [0, 1], of the last evaluation.
    """

    def __init__(self, average: Autoencoder, loader: EpochLoader, kind: str, epochs: int, device: torch.device) -> None:
        self.average, self.loader, self.device = average, loader, device
        self.kind, self.epochs = kind, epochs
        self.picture: Tensor | None = None

    @torch.no_grad()
    def __call__(self, _model: nn.Module, epoch: int) -> Metrics:
        """Returns the metrics below; none as long as there are no codes.

        ``loss``, ``psnr`` (dB, of the mean squared error over all images), ``ssim``, ``perplexity``, ``used_codes``,
        ``dead_codes``, ``code_distance`` (from a code's vector to the closest other one, mean), ``tokens`` and, of
        relaxed codes, ``kl_per_token`` (nats).
        """
        from torchmetrics.functional.image import structural_similarity_index_measure  # takes seconds

        if not self.average.has_codes():
            logger.info("no tokenizer is written yet: the codes start at --quantize_from of the run")
            return {}
        vae, relaxed = self.average.tokenizer().eval(), isinstance(self.average, RelaxedAutoencoder)
        totals = torch.zeros(5, device=self.device)  # summed loss, squared error, SSIM and KL; images
        counts = torch.zeros(vae.num_tokens, dtype=torch.int64, device=self.device)
        for number, batch in enumerate(self.loader.epoch(0)):
            shown = to_unit_range(batch["image"].to(self.device, non_blocking=True))
            images = to_signed_range(shown).contiguous(memory_format=torch.channels_last)
            logits = vae(images)
            ids = logits.argmax(dim=1)
            output = vae.decode(ids)
            decoded = from_signed_range(output)
            scores = (
                reconstruction_loss(output, images, self.kind),  # type: ignore[arg-type]
                (decoded - shown).square().mean(),
                structural_similarity_index_measure(decoded, shown, data_range=1.0),
                kl_to_uniform(logits) if relaxed else totals.new_zeros(()),
                totals.new_ones(()),
            )
            totals += torch.stack(scores) * len(images)  # type: ignore[arg-type]
            counts += count_codes(ids, vae.num_tokens)
            if number == 0:
                self.picture = side_by_side(shown, decoded)
        loss, squared_error, ssim, kl, images = distributed.sum_over_ranks(totals).tolist()
        counts = distributed.sum_over_ranks(counts)
        tokens, statistics = int(counts.sum()), codebook_statistics(counts)
        results = {
            "loss": loss / images,
            "psnr": -10 * math.log10(max(squared_error / images, 1e-10)),
            "ssim": ssim / images,
            "perplexity": statistics.perplexity,
            "used_codes": statistics.used,
            "dead_codes": statistics.dead,
            "code_distance": closest_codes(vae.codebook.weight).mean().item(),
            "tokens": tokens,
            **({"kl_per_token": kl / tokens} if relaxed else {}),
        }
        if epoch + 1 >= COLLAPSE_COUNTS_FROM * self.epochs:
            warn_of_collapse(results)
        return results
