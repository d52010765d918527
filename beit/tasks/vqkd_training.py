"""Training VQ-KD, the tokenizer of BEiT v2: patches become codes from which a frozen teacher's features are predicted.

Source: BEiT v2 (arXiv 2208.06366), section 3.1; microsoft/unilm, beit2/TOKENIZER.md. Deviations: with ``--update_freq``
the codes move once per optimizer step, by all its batches, and sums of vectors are float32 whatever ``--amp_dtype`` is;
the teacher sees the image as it is with any ``--process_type`` (official: only with ``default``).
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from beit.data.datasets import ImageDataset
from beit.data.loaders import EpochDataset, EpochLoader, EvenlySpread
from beit.data.transforms import CenterCropTransform, RandomCropTransform, size_pair, to_unit_range
from beit.errors import InputError, did_you_mean
from beit.storage import weights_fingerprint
from beit.tasks.base import (
    Evaluation,
    Metrics,
    Result,
    Task,
    checkpoint_to_evaluate,
    evaluated,
    find_together,
    fingerprints,
    opened,
    run,
)
from beit.tasks.settings import VqkdConfig
from beit.teachers import load_teacher
from beit.tokenizers.base import load_tokenizer
from beit.tokenizers.dvae import (
    COLLAPSED_BELOW,
    DiscreteVAE,
    batch_perplexity,
    codebook_statistics,
    count_codes,
    save_dvae,
    to_signed_range,
)
from beit.tokenizers.vqkd import MODELS, VQKD, Quantized, VqkdTokenizer, load_vqkd
from beit.training import distributed
from beit.training.checkpoint import load_exactly
from beit.training.loop import to_device
from beit.training.optim import parameter_groups
from beit.training.state import Batch, StepFunction

logger = logging.getLogger(__name__)

BASE_BATCH = 128  # images per step that --lr is for
CROP_FRACTION = 0.875  # of the side of an evaluated image: 224 of 256 pixels
FEW_CODES = 0.5  # of a codebook's: with fewer in use it has collapsed


def main(config: VqkdConfig) -> Result:
    """Trains VQ-KD as the settings say, or evaluates it, or trains what draws its codes."""
    if config.pixels_of:
        return run(PixelDecoding(config))
    if config.eval or config.calculate_codebook_usage:
        return evaluated(evaluate_checkpoint(VqkdTraining(config)))
    return run(VqkdTraining(config))


class ImageTask(Task[VqkdConfig]):
    """What both jobs share: the images, and a learning rate scaled to their number."""

    def prepare(self) -> None:
        self.index = find_together(self.config.data_path)
        self.eval_index = find_together(self.config.eval_data_path) if self.config.eval_data_path else None

    def build_loader(self) -> EpochLoader:
        config = self.config
        transform = RandomCropTransform(
            config.input_size,
            interpolation=config.train_interpolation,
            scale=(config.min_crop, 1.0),
            color_jitter=config.color_jitter,
        )
        return self.loader_of(ImageDataset(self.index, transform, config.seed))

    def evaluation_loader(self) -> EpochLoader:
        """Creates the loader of whole images: held-out ones, or a fixed choice of training images."""
        config, how = self.config, self.config.train_interpolation
        transform = CenterCropTransform(config.input_size, interpolation=how, crop_fraction=CROP_FRACTION)
        dataset: EpochDataset = ImageDataset(self.eval_index or self.index, transform, config.seed)
        if self.eval_index is None and config.eval_images < len(dataset):
            dataset = EvenlySpread(dataset, config.eval_images)
        return self.loader_of(dataset, training=False, num_workers=self.few_workers())

    def peak_lr(self) -> float:
        return self.config.lr * self.images_per_step() / BASE_BATCH


class VqkdTraining(ImageTask):
    """VQ-KD; every checkpoint of the run is a tokenizer."""

    model: VQKD

    def check(self) -> None:
        """Makes sure that the model has a name, which says who teaches it."""
        name, kind = self.config.model, self.config.teacher_model_type
        if name not in MODELS:
            raise InputError(f"unknown --model {name!r}{did_you_mean(name, MODELS)}: choose from {', '.join(MODELS)}")
        if kind != VqkdConfig.teacher_model_type and not name.endswith(kind):
            logger.warning("--teacher_model_type %s has no effect: the end of --model %s decides", kind, name)

    def prepare(self) -> None:
        super().prepare()
        self.teacher = load_teacher(self.config.teacher or MODELS[self.config.model][1]).to(self.device)

    def build_model(self) -> VQKD:
        config = self.config
        arguments: dict[str, Any] = {
            "codebook_size": config.codebook_size,
            "codebook_dim": config.codebook_dim,
            "decoder_depth": MODELS[config.model][0],
            "decoder_out_dim": self.teacher.dim,
            "ema_decay": config.ema_decay,
            "kmeans_start": config.quantize_kmeans_init,
            "process_type": config.process_type,
            "img_size": size_pair(config.input_size),
        }
        try:
            return VQKD(**{**arguments, **(config.model_kwargs or {})})
        except (TypeError, ValueError) as error:
            raise InputError(f"--model {config.model} cannot be built: {error}") from error

    def build_objective(self) -> StepFunction:
        self._batches: list[tuple[Tensor, Tensor]] = []  # vectors and codes of the present optimizer step
        return self.step

    def step(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch, and what to log; moves the codes with the last batch of an optimizer step."""
        if not self._batches and step % self.steps_per_epoch() == 0:
            self.model.quantize.cluster_size.zero_()  # counts the codes that an epoch uses
        rec_loss, quantized = self.distances(model, batch)
        self._batches.append((quantized.vectors.flatten(0, 1), quantized.ids.flatten()))
        if len(self._batches) == self.config.update_freq:
            vectors, ids = map(torch.cat, zip(*self._batches, strict=True))
            self.model.update(vectors, ids, self.config.revive_codes)
            self._batches.clear()
        loss = rec_loss + quantized.commitment
        metrics = {"rec_loss": rec_loss, "quant_loss": quantized.commitment, "total_loss": loss}
        return loss, {**metrics, "perplexity": batch_perplexity(quantized.ids, self.config.codebook_size)}

    def distances(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Quantized]:
        """Returns the mean over all patches of one minus the cosine with the teacher's features, and the codes."""
        images = to_unit_range(batch["image"])
        target = self.teacher(images, self.model.grid).flatten(1, 2)
        features, quantized = model(images)
        with torch.autocast(images.device.type, enabled=False):
            return 1 - F.cosine_similarity(features.float(), target, dim=-1).mean(), quantized

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the official grouping: no weight decay on biases, norms, class tokens and positions."""
        return parameter_groups(self.model, self.config.weight_decay, no_decay=self.model.no_weight_decay())

    def build_evaluation(self) -> Evaluation:
        """Returns the evaluation of the codes that an epoch used, and of the losses unless they are not wanted."""
        loader = self.evaluation_loader()
        return lambda _model, _epoch: {**({} if self.config.disable_eval else self.evaluate(loader)), **self.usage()}

    @torch.no_grad()
    def evaluate(self, loader: EpochLoader) -> Metrics:
        """Returns the losses over a data set, in float32, and how evenly it uses the codes."""
        self.model.eval()
        totals = torch.zeros(3, device=self.device)  # summed distance from the teacher, from the codes, images
        counts = torch.zeros(self.config.codebook_size, dtype=torch.int64, device=self.device)
        for batch in loader.epoch(0):
            rec_loss, quantized = self.distances(self.model, to_device(batch, self.device))
            totals += torch.stack([rec_loss, quantized.commitment, torch.ones_like(rec_loss)]) * len(quantized.ids)
            counts += count_codes(quantized.ids, len(counts))
        rec, quant, images = distributed.sum_over_ranks(totals).tolist()
        codes, loss = codebook_statistics(distributed.sum_over_ranks(counts)), (rec + quant) / images
        losses = {"loss": loss, "rec_loss": rec / images, "quant_loss": quant / images, "total_loss": loss}
        return {**losses, "unused_code": codes.dead, "used_codes": codes.used, "perplexity": codes.perplexity}

    def usage(self) -> Metrics:
        """Returns how the epoch used the codes, and warns of a collapse."""
        vectors = self.steps_per_epoch() * self.images_per_step() * math.prod(self.model.grid)
        codes, most = codebook_statistics(self.model.quantize.cluster_size), min(self.config.codebook_size, vectors)
        if codes.used < FEW_CODES * most or codes.perplexity < COLLAPSED_BELOW * most:
            logger.warning(
                "the codebook has collapsed: this epoch used %d of %d codes, in effect %.1f; --quantize_kmeans_init, a "
                "--codebook_dim of 32 or less, fewer codes, more images per step and --revive_codes help against it",
                *(codes.used, self.config.codebook_size, codes.perplexity),
            )
        longest = int(self.model.loss_idle.max())  # optimizer steps
        return {"train_Unused_code": codes.dead, "train_used_codes": codes.used, "train_longest_dead": longest}

    def extras(self) -> Mapping[str, object]:
        meaning = {"teacher": weights_fingerprint(self.teacher), "process_type": self.config.process_type}
        heads = {"num_heads": self.model.encoder.num_heads}
        return {**meaning, **heads, **fingerprints(self.index, self.eval_index)}

    def summary(self) -> Iterator[str]:
        config, (rows, columns) = self.config, self.model.grid
        yield from super().summary()
        yield f"{config.codebook_size} codes of {config.codebook_dim} numbers, {rows} x {columns} per image"
        h, w = self.teacher.grid
        resized = "" if self.teacher.grid == self.model.grid else f", resized from {h} x {w}"
        yield f"teacher {self.teacher.name}: {self.teacher.dim} numbers per patch{resized}"
        images = self.images_per_step()
        yield f"lr {self.peak_lr():g} = --lr {config.lr:g} x {images} images per step / {BASE_BATCH}, as official"


class PixelDecoding(ImageTask):
    """A decoder from a frozen tokenizer's codes to pixels, the decoder of a discrete VAE; for pictures."""

    def prepare(self) -> None:
        super().prepare()
        tokenizer = load_tokenizer(self.config.pixels_of, "vqkd", self.device)
        assert isinstance(tokenizer, VqkdTokenizer)
        self.tokenizer = tokenizer
        self.config = replace(self.config, input_size=self.tokenizer.model.encoder.img_size)

    def build_model(self) -> nn.Module:
        codes, layers = self.tokenizer.model.quantize.codes, int(math.log2(self.tokenizer.downsampling))
        if 2**layers != self.tokenizer.downsampling:
            raise InputError(f"--pixels_of: patches of {self.tokenizer.downsampling} pixels, which is no power of 2")
        size, dim = codes.shape
        shape = (size, dim, layers, self.config.hidden_dim)
        self.vae = DiscreteVAE(size_pair(self.config.input_size), *shape).requires_grad_(False)
        self.vae.codebook.weight.copy_(codes)
        self.vae.decoder.requires_grad_(True)
        return nn.Sequential(self.vae.codebook, Rearrange("b h w d -> b d h w"), self.vae.decoder)

    def build_objective(self) -> StepFunction:
        return lambda model, batch, _step: (self.error(model, batch), {})

    def error(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the mean squared error of a batch."""
        images = to_unit_range(batch["image"])
        return F.mse_loss(model(self.tokenizer.encode(images)).float(), to_signed_range(images))

    def build_evaluation(self) -> Evaluation | None:
        """Returns the evaluation, in float32: ``loss``, and ``psnr`` in dB."""
        loader = self.evaluation_loader()

        @torch.no_grad()
        def evaluate(_model: nn.Module, _epoch: int) -> Metrics:
            self.model.eval()
            totals = torch.zeros(2, device=self.device)  # summed error, images
            for batch in loader.epoch(0):
                error = self.error(self.model, to_device(batch, self.device))
                totals += torch.stack([error, torch.ones_like(error)]) * len(batch["image"])
            error, images = distributed.sum_over_ranks(totals).tolist()
            loss = error / images
            return {"loss": loss, "psnr": -10 * math.log10(max(loss / 4, 1e-10))}  # of values in [0, 1]

        return None if self.config.disable_eval else evaluate

    def extras(self) -> Mapping[str, object]:
        return {"tokenizer": self.tokenizer.fingerprint(), **fingerprints(self.index, self.eval_index)}

    def summary(self) -> Iterator[str]:
        yield from super().summary()
        height, width = size_pair(self.config.input_size)
        yield f"images of {height} x {width} pixels, as the tokenizer's; lr {self.peak_lr():g}"

    def finish(self) -> None:
        """Writes the decoder where its tokenizer looks for it."""
        if distributed.is_main():
            save_dvae(self.tokenizer.pixels_folder, self.vae)
            logger.info("%s draws the codes of %s", self.tokenizer.pixels_folder, self.config.pixels_of)


def evaluate_checkpoint(task: VqkdTraining) -> Metrics:
    """Evaluates a checkpoint, for ``--eval``; :class:`InputError` if there is none, or it does not fit the settings."""
    with opened(task, writes=False) as session:
        source = checkpoint_to_evaluate(task.config)
        task.model = task.build_model().to(session.device)
        load_exactly(task.model, load_vqkd(Path(source), task.model.encoder.num_heads).state_dict(), source)
        results = task.evaluate(task.evaluation_loader())
        logger.info("%s", "  ".join(f"{name} {value:.5g}" for name, value in results.items()))
        return results
