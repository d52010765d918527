"""BEiT pre-training: predict the visual tokens of masked patches (arXiv 2106.08254, section 2), or another target."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from beit.checkpoints.load import load_weights
from beit.checkpoints.read import read_weights
from beit.data.datasets import ImageDataset, sample_randomness
from beit.data.loaders import EpochLoader
from beit.data.preprocessing import COLOURS
from beit.data.transforms import MaskedImageModelingEvalTransform, MaskedImageModelingTransform, Size, size_pair
from beit.errors import InputError, counted
from beit.masking import PUBLISHED_SHARE, MaskGenerator
from beit.modeling import VisionTransformerForMaskedImageModeling
from beit.registry import MASK_STRATEGIES, TARGETS, resolve
from beit.storage import weights_fingerprint
from beit.targets import (
    VISUAL_TOKENS,
    FeatureTarget,
    MaskedPrediction,
    PredictionTarget,
    TokenTarget,
    numbered,
    with_patch_index,
)
from beit.tasks.base import (
    Evaluation,
    Metrics,
    Result,
    Task,
    find_together,
    fingerprints,
    image_statistics,
    named_model,
    run,
)
from beit.tasks.representation import RepresentationProbe
from beit.tasks.settings import PretrainingConfig, PretrainingV2Config
from beit.teachers import load_teacher
from beit.tokenizers.base import VisualTokenizer, load_tokenizer
from beit.training import distributed
from beit.training.compilation import uncompiled
from beit.training.loop import to_device
from beit.training.meaning import FACTS, difference
from beit.training.optim import parameter_groups
from beit.training.precision import AMP_DTYPES, Precision, resolve_amp_dtype
from beit.training.state import Batch, LoopSettings, StepFunction
from beit.training.trackers import Trackers
from beit.visualization.reconstructions import reconstruction_picture, spread_samples
from beit.zoo import MODELS

logger = logging.getLogger(__name__)

PUBLISHED_LR, PUBLISHED_MIN_LR, PUBLISHED_BATCH = 1.5e-3, 1e-5, 2048
MASK_DRAWS = 1000
CLS_PT = ("early_layers", "head_layers", "shared_lm_head")  # of models that predict through the class token too
VARIETY = ("codebook_perplexity", "token_entropy")  # scores that show whether tokens collapse


def main(config: PretrainingConfig) -> Result:
    """Pre-trains a model as the settings say."""
    return run(Pretraining(config))


class Pretraining(Task[PretrainingConfig]):
    """Masked image modeling."""

    def prepare(self) -> None:
        self.target = build_target(self.config, self.device)
        self.mean, self.std = image_statistics(self.config)
        self.index = find_together(self.config.data_path)
        self.eval_index = find_together(self.config.eval_data_path) if self.config.eval_data_path else None
        room = self.config.batch_size * self.config.num_mask_patches if self.config.compile else 0
        self.prepare_batch = partial(with_patch_index, predict=self.config.predict, room=room)
        self.objective = MaskedPrediction(self.target, self.mean, self.std)

    def build_model(self) -> VisionTransformerForMaskedImageModeling:
        config = self.config
        model = build_model(config, self.target.output_size)
        self.target.check(model.patch_embed.grid_size, size_pair(config.second_input_size))
        self.masks = build_mask_generator(config, model.patch_embed.grid_size)
        if config.init_from:
            initialize_from(model, config.init_from, meaning_of(self.target), config.model_key, config.model_prefix)
        return model

    def build_loader(self) -> EpochLoader:
        config = self.config
        transform = MaskedImageModelingTransform(
            config.input_size,
            second_view_size(config, self.target),
            interpolation=config.train_interpolation,
            second_interpolation=config.second_interpolation,
            color_jitter=config.color_jitter,
            in_chans=config.in_chans,
            scale=(config.min_crop, 1.0),
            mask_generator=self.masks,
        )
        return self.loader_of(ImageDataset(self.index, transform, config.seed, fast_decode=config.fast_decode))

    def build_objective(self) -> StepFunction:
        return self.objective

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the official grouping: no weight decay on biases, norms and tokens but the mask token."""
        no_decay = self.model.no_weight_decay()  # type: ignore[operator]
        return parameter_groups(self.model, self.config.weight_decay, no_decay=no_decay)

    def extras(self) -> Mapping[str, object]:
        return {
            **meaning_of(self.target),
            "mean": list(self.mean),
            "std": list(self.std),
            **({"early_layers": self.model.early_layers} if class_token_arguments(self.config) else {}),
            **fingerprints(self.index, self.eval_index),
        }

    def build_evaluation(self) -> Evaluation | None:
        config, due = self.config, []
        transform = evaluation_transform(config, self.target, self.masks)
        loader_of = partial(self.loader_of, training=False, num_workers=self.few_workers())
        if self.eval_index is not None:
            loader = loader_of(ImageDataset(self.eval_index, transform, config.seed))
            due.append((config.eval_freq, lambda model: evaluate(model, self.objective, loader, self.precision)))
        if config.probe_data_path:
            look = (self.mean, self.std, self.precision)
            probe = RepresentationProbe(config.probe_data_path, transform, loader_of, *look)

            def watched(model: nn.Module) -> Metrics:
                scores = probe(model)
                if isinstance(self.target, TokenTarget):
                    found = evaluate(model, self.objective, probe.loaders[-1], self.precision)
                    scores |= {name: score for name, score in found.items() if name.startswith(VARIETY)}
                return probe.watch(scores, self.session.folder)

            due.append((config.probe_freq, watched))

        def evaluation(model: nn.Module, epoch: int) -> Metrics:
            last = epoch + 1 == config.epochs
            found = [score(model) for frequency, score in due if last or (epoch + 1) % frequency == 0]
            return {name: value for scores in found for name, value in scores.items()}

        return evaluation if due else None

    def loop_settings(self) -> LoopSettings:
        """Returns the loop's settings, with an evaluation in each epoch in which anything is to be scored."""
        config, settings = self.config, super().loop_settings()
        frequencies = [config.eval_freq] if config.eval_data_path else []
        frequencies += [config.probe_freq] if config.probe_data_path else []
        return dataclasses.replace(settings, evaluate_every=(math.gcd(*frequencies) or 1) * settings.period.steps)

    def build_epoch_end(self) -> Callable[[int, Trackers], None] | None:
        config = self.config
        if config.log_images and not ((config.log_dir or config.report_to) and config.output_dir):
            logger.warning("--log_images has no effect without --log_dir or --report_to, and --output_dir")
        elif config.log_images:
            transform = evaluation_transform(config, self.target, self.masks)
            dataset = ImageDataset(self.eval_index or self.index, transform, config.seed)
            samples = to_device(spread_samples(dataset, config.log_images), self.device)

            def outputs_of_all(model: nn.Module, batch: Batch) -> Tensor:
                with uncompiled(), self.precision.autocast():
                    return self.objective.outputs_of_all(model, batch)

            picture = partial(reconstruction_picture, self.model, outputs_of_all, self.target, samples)
            distributed.on_main(lambda: [picture()][:0])  # what cannot be drawn is found now, and ends all processes
            return lambda epoch, scalars: scalars.write_image("reconstructions", picture(), epoch)
        return None

    def summary(self) -> Iterator[str]:
        config = self.config
        log_flags_without_effect(config)
        yield from super().summary()
        if isinstance(self.target, TokenTarget):
            yield f"tokenizer {config.discrete_vae_weight_path}: {self.target.output_size} tokens"
        else:
            yield f"predicting {self.target.name}: {self.target.output_size} numbers per patch"
        if isinstance(config, PretrainingV2Config) and not class_token_arguments(config):
            logger.warning("--model %s does not train the class token: BEiT v2's is %s_cls_pt", *[config.model] * 2)
        yield describe_masks(self.masks)
        batch = self.images_per_step()
        ratio = (config.lr / batch) / (PUBLISHED_LR / PUBLISHED_BATCH)
        if not 0.5 <= ratio <= 2:
            logger.warning(
                "lr/batch is %.3g times the published one (%g for a batch of %d), which would be --lr %.2g --min_lr "
                "%.2g for this batch; the learning rate is left as given",
                *(ratio, PUBLISHED_LR, PUBLISHED_BATCH),
                *(published * batch / PUBLISHED_BATCH for published in (PUBLISHED_LR, PUBLISHED_MIN_LR)),
            )


def build_target(config: PretrainingConfig, device: torch.device) -> PredictionTarget:
    """Creates the ``--target``; :class:`InputError` if something it needs, such as the tokenizer, is missing."""
    with torch.device("meta"):  # takes no memory and draws no random number
        patch_size = build_model(config, 1).patch_embed.patch_size
    mean, std = image_statistics(config)
    if config.target == "features" and config.in_chans != COLOURS:
        raise InputError(f"--in_chans {config.in_chans}: a teacher sees images of 3 channels; choose another --target")
    target: PredictionTarget = resolve(TARGETS, config.target, "target").build(
        tokenizer=partial(build_tokenizer, config, device),
        teacher=lambda: load_teacher(config.teacher).to(device),
        patch_size=patch_size,
        mean=mean,
        std=std,
        pixel_norm=config.pixel_norm,
    )
    return target


def build_tokenizer(config: PretrainingConfig, device: torch.device) -> VisualTokenizer:
    """Loads the frozen tokenizer; :class:`InputError` if no path was given or it holds no tokenizer."""
    path = config.discrete_vae_weight_path
    if not path:
        ways = [
            "`beit download tokenizer DIR` fetches OpenAI's (--discrete_vae_type dall-e)",
            "run_dvae_training.py trains one on your images (--discrete_vae_type customized)",
            "run_vqkd_training.py trains BEiT v2's, and released ones go by name (--discrete_vae_type vqkd)",
        ]
        if isinstance(config, PretrainingV2Config):
            ways.reverse()
        problem = "--discrete_vae_weight_path (--tokenizer_weight) is missing: give the tokenizer's file or folder"
        raise InputError(f"{problem}. {'; '.join(ways)}; --target pixels, hog and features need none")
    dtype = tokenizer_dtype(config, device)
    tokenizer = load_tokenizer(path, config.discrete_vae_type, device, dtype, config.tokenizer_compile)
    if tokenizer.in_chans != config.in_chans:
        channels = f"images of {counted(tokenizer.in_chans, 'channel')}, and --in_chans is {config.in_chans}"
        raise InputError(f"the tokenizer {path} is for {channels}: train one with run_dvae_training.py --in_chans")
    sizes = {"codebook_size": tokenizer.vocab_size, "codebook_dim": getattr(tokenizer, "codebook_dim", None)}
    for name, size in sizes.items():
        if size is not None and (wanted := getattr(config, name)) not in (None, size):
            raise InputError(f"--{name} {wanted}: the tokenizer {path} has {size}; leave the flag out, or give another")
    return tokenizer


def tokenizer_dtype(config: PretrainingConfig, device: torch.device) -> torch.dtype:
    """Returns the number format of the tokenizer's encoder.

    ``auto`` is float32 if the run is, else float16 on a GPU, as published, and bfloat16 elsewhere.
    """
    if config.tokenizer_dtype != "auto":
        return AMP_DTYPES[config.tokenizer_dtype]
    if resolve_amp_dtype(config.amp_dtype, device) == torch.float32:
        return torch.float32
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def build_model(config: PretrainingConfig, output_size: int) -> VisionTransformerForMaskedImageModeling:
    """Creates the model with ``output_size`` outputs per patch; :class:`InputError` for a bad name or option."""
    model = named_model(
        config,
        masked=True,
        img_size=config.input_size,
        vocab_size=output_size,
        drop_path_rate=config.drop_path,
        use_shared_rel_pos_bias=config.rel_pos_bias,
        **class_token_arguments(config),
    )
    assert isinstance(model, VisionTransformerForMaskedImageModeling)
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model


def class_token_arguments(config: PretrainingConfig) -> dict[str, Any]:
    """Returns the arguments of a model that, as its name says, also predicts through the class token, as BEiT v2's."""
    takes = config.model in MODELS and "head_layers" in MODELS[config.model].arguments
    return {name: getattr(config, name) for name in CLS_PT} if takes else {}


def build_mask_generator(config: PretrainingConfig, grid_size: tuple[int, int]) -> MaskGenerator:
    """Creates the generator of masks for a grid of patches ``(h, w)``."""
    masks: MaskGenerator = resolve(MASK_STRATEGIES, config.mask_strategy, "mask strategy")(
        grid_size,
        num_mask_patches=config.num_mask_patches,
        min_num_patches=config.min_mask_patches_per_block,
        max_num_patches=config.max_mask_patches_per_block,
    )
    return masks


def describe_masks(masks: MaskGenerator) -> str:
    """Says how many patches are masked on average, from some draws; warns where that is far from the usual share."""
    with sample_randomness(0, 0, 0) as rng:  # of its own: the run's draws stay what they are
        mean = float(np.mean([masks(rng).sum() for _ in range(MASK_DRAWS)]))
    patches = math.prod(masks.grid_size)
    line = f"masks: {mean:.1f} of {patches} patches on average ({100 * mean / patches:.0f} %)"
    if not 0.2 <= mean / patches <= 0.6:
        usual = round(PUBLISHED_SHARE * patches)
        logger.warning("%s; usual are 20 to 60 %%, as published --num_mask_patches %d in blocks from 16", line, usual)
    return line


def second_view_size(config: PretrainingConfig, target: PredictionTarget) -> Size | None:
    """Returns the size of the tokenizer's view, where there is one and its pixels are not those of the model's."""
    first = size_pair(config.input_size), config.train_interpolation
    second = size_pair(config.second_input_size), config.second_interpolation
    return config.second_input_size if target.second_view and (first != second or "random" in first) else None


def evaluation_transform(
    config: PretrainingConfig, target: PredictionTarget, masks: MaskGenerator
) -> MaskedImageModelingEvalTransform:
    """Creates the views of images that are not trained on."""
    return MaskedImageModelingEvalTransform(
        config.input_size,
        second_view_size(config, target),
        interpolation=config.train_interpolation,
        second_interpolation=config.second_interpolation,
        mask_generator=masks,
        in_chans=config.in_chans,
    )


def meaning_of(target: PredictionTarget) -> dict[str, str]:
    """Returns what a head that predicts a target depends on."""
    tokens = {"tokenizer": target.tokenizer.fingerprint()} if isinstance(target, TokenTarget) else {}
    teacher = {"teacher": weights_fingerprint(target.teacher)} if isinstance(target, FeatureTarget) else {}
    return {"target": target.name, **tokens, **teacher}


def initialize_from(
    model: VisionTransformerForMaskedImageModeling,
    source: str,
    meaning: Mapping[str, str] | None = None,
    model_key: str = "model|module",
    prefix: str = "",
) -> None:
    """Loads a checkpoint, given as for :func:`read_weights`; without its head if that predicts something else.

    ``meaning`` is what the model's head will predict, from :func:`meaning_of`; by default what the checkpoint's does.
    Raises :class:`InputError` for a checkpoint that cannot be read or is of another model.
    """
    weights, metadata = read_weights(source, model_key, prefix)
    theirs = {"target": VISUAL_TOKENS, **metadata}
    other = [key for key, own in (meaning or {}).items() if theirs.get(key, own) != own]
    report = load_weights(model, weights, metadata, drop_head=bool(other))
    report.log()
    if other or "lm_head.weight" in report.missing:
        reason = "has another vocabulary or none"
        if meaning and other:
            reason = f"learned {FACTS[other[0]].other}{difference(theirs[other[0]], meaning[other[0]])}"
        logger.info("%s %s: the head is initialised from scratch", source, reason)
    elif unknown := [FACTS[key].name for key in meaning or {} if key not in theirs]:
        logger.warning("%s does not record its %s: its head is kept as it is", source, ", ".join(unknown))


@torch.no_grad()
def evaluate(model: nn.Module, objective: MaskedPrediction, loader: EpochLoader, precision: Precision) -> Metrics:
    """Returns ``loss`` and the target's scores over a data set, each image once with a fixed mask.

    Only masked patches count, whichever were trained on, so that all runs with one target can be compared.
    """
    model.eval()
    target, device = objective.target, precision.device
    totals: dict[tuple[int, str], Tensor] = {}  # (number of the prediction, what is added up)
    for host_batch in loader.epoch(0):
        batch = to_device(with_patch_index(host_batch), device)
        with precision.autocast(), uncompiled():
            predictions, targets = objective.predict(model, batch)
        for number, outputs in enumerate(predictions):
            tally = {"loss": target.loss(outputs, targets, "sum"), **target.tally(outputs, targets)}
            tally["patches"] = torch.full((), len(targets), device=device)
            for name, value in tally.items():
                totals[number, name] = totals[number, name] + value if (number, name) in totals else value
    # A process may have had no images; the main one always has some, so it names what there is to add up.
    zeros = distributed.on_main(lambda: {name: torch.zeros_like(value, device="cpu") for name, value in totals.items()})
    totals = {name: distributed.sum_over_ranks(totals.get(name, zero.to(device))) for name, zero in zeros.items()}
    results = []
    for number in dict.fromkeys(number for number, _ in totals):
        tally = {name: value for (of, name), value in totals.items() if of == number}
        patches, loss = int(tally.pop("patches").item()), tally.pop("loss").item()
        results.append({"loss": loss / patches, **target.scores(tally, patches)})
    return {"loss": sum(one["loss"] for one in results), **numbered(results)}


def log_flags_without_effect(config: PretrainingConfig) -> None:
    """Warns of flags that have no effect together with the others."""
    tokenizer = ("discrete_vae_weight_path", "discrete_vae_type", "tokenizer_dtype", "tokenizer_compile")
    views = ("second_input_size", "second_interpolation")
    unused = {
        ("mask_strategy", "random"): ("min_mask_patches_per_block", "max_mask_patches_per_block"),
        ("target", "tokens"): ("pixel_norm", "teacher"),
        ("target", "features"): (*tokenizer, *views),
        **{("target", name): (*tokenizer, *views, "teacher") for name in ("pixels", "hog")},
    }
    if not class_token_arguments(config):
        unused["model", config.model] = CLS_PT
    default = type(config)()
    for (because, value), names in unused.items():
        given = [f"--{name}" for name in names if getattr(config, name) != getattr(default, name)]
        if given and getattr(config, because) == value:
            logger.warning("no effect with --%s %s: %s", because, value, ", ".join(given))
