"""The demonstration: from nothing to a BEiT that has visibly learnt, on a laptop's CPU, in minutes.

It makes its own images, trains a small tokenizer, pre-trains a small BEiT with the same code as the launchers, and
shows on held-out images what was learnt, and what it is worth to tasks with labels. Every part can be stopped; the same
command goes on from there.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beit.commands import knn
from beit.commands.knn import KnnConfig
from beit.commands.visualize import load_pretrained, reconstruct_files
from beit.config import option
from beit.data.datasets import index_images
from beit.errors import InputError
from beit.storage import atomic_write
from beit.tasks import dvae_training as dvae
from beit.tasks import finetuning as classification
from beit.tasks import pretraining as masked_image_modeling
from beit.tasks.finetuning import FinetuningConfig
from beit.tasks.settings import DvaeConfig, PretrainingConfig
from beit.visualization.curves import Curve, diagrams, read_log
from beit.visualization.figures import draw_panels
from beit.visualization.plots import draw_curves
from examples.toy_images import write_digits, write_photograph_crops, write_scenes

logger = logging.getLogger(__name__)

MARKER = "made_with.json"
TRAINING_LIST = "train.txt"  # all that is trained on without labels, the digits too; it holds no held-out image
# With labels: where the training and the held-out images of each kind are.
LABELLED = {"digits": ("digits/train", "digits/val"), "scenes": ("train/scenes", "held_out/scenes")}
STARTS = {"pretrained": 0.8, "scratch": 1.0}  # with the layer decay that suits each
STORED_PIXELS = 96  # larger than what is trained on: random crops are not all blurred
IMAGE_PIXELS, PATCH_PIXELS = 64, 8  # a grid of 8 x 8 tokens
NUM_TOKENS = 256
MODEL = {"patch_size": PATCH_PIXELS, "embed_dim": 128, "depth": 6, "num_heads": 4}
MASKED_PATCHES = 26  # of 64: 40 %
REQUIRED_RATIO = 2.0  # masked-token accuracy over the most frequent token's share
REQUIRED_PERPLEXITY = 0.10  # of the vocabulary
PICTURE_IMAGES = 6


@dataclass(frozen=True)
class DemoConfig:
    """The flags of ``beit demo``."""

    output_dir: str = option("demo", "folder for images, runs, pictures and summary.json")
    quick: bool = option(False, "a rehearsal of under a minute that learns next to nothing")
    device: str = option("cpu", "cuda, cpu or mps")
    num_workers: int = option(0, "data-loading processes; training itself uses all cores")
    seed: int = option(0, "seed of images and training")


@dataclass(frozen=True)
class Budget:
    """How much is made and trained.

    Args:
        scenes: Synthetic training images.
        crops: Training crops of photographs.
        held_out_scenes: Held-out synthetic images.
        held_out_crops: Held-out crops of photographs.
        dvae_epochs: Passes of the tokenizer's training.
        dvae_batch: Its images a step.
        pretrain_epochs: Passes of the pre-training.
        pretrain_batch: Its images a step.
        finetune_epochs: Passes of each fine-tuning over the digits.
    """

    scenes: int
    crops: int
    held_out_scenes: int
    held_out_crops: int
    dvae_epochs: int
    dvae_batch: int
    pretrain_epochs: int
    pretrain_batch: int
    finetune_epochs: int


FULL = Budget(
    scenes=1800,
    crops=600,
    held_out_scenes=320,
    held_out_crops=160,
    dvae_epochs=5,
    dvae_batch=32,
    pretrain_epochs=17,
    pretrain_batch=64,
    finetune_epochs=8,
)
QUICK = Budget(
    scenes=96,
    crops=32,
    held_out_scenes=16,
    held_out_crops=16,
    dvae_epochs=1,
    dvae_batch=16,
    pretrain_epochs=1,
    pretrain_batch=32,
    finetune_epochs=1,
)


def main(config: DemoConfig) -> None:
    """Runs the demonstration."""
    budget = QUICK if config.quick else FULL
    folder = Path(config.output_dir)
    logger.info("1/6 images: scenes, crops of photographs, and digits")
    make_images(folder / "images", budget, config)
    logger.info("2/6 tokenizer: a discrete VAE learns %d tokens, each of 8 x 8 pixels", NUM_TOKENS)
    dvae.main(tokenizer_config(folder, budget, config))
    logger.info("3/6 BEiT: it learns to predict the tokens of the 40 % of patches that it does not see")
    logger.info("(so small a model takes a much higher lr than the published one, as a warning will say)")
    masked_image_modeling.main(pretraining_config(folder, budget, config))
    logger.info("4/6 nearest neighbours: do its features tell classes apart that it was never told?")
    neighbours = {data: score_neighbours(folder, data, config) for data in LABELLED}
    logger.info("5/6 fine-tuning on the digits, from the pre-trained weights and from scratch")
    for start in STARTS:
        classification.main(finetuning_config(folder, start, budget, config))
    logger.info("6/6 pictures")
    summary = summarize(folder, neighbours)
    draw(folder, config)
    with atomic_write(folder / "summary.json") as file:
        file.write(json.dumps(summary, indent=2).encode() + b"\n")
    report(summary, folder)


def tokenizer_config(folder: Path, budget: Budget, config: DemoConfig) -> DvaeConfig:
    """Returns the settings of the tokenizer's training."""
    return DvaeConfig(
        data_path=str(folder / "images" / TRAINING_LIST),
        eval_data_path=str(folder / "images" / "held_out"),
        output_dir=str(folder / "dvae"),
        input_size=IMAGE_PIXELS,
        num_tokens=NUM_TOKENS,
        codebook_dim=64,
        num_layers=3,
        hidden_dim=32,
        min_crop=0.3,
        epochs=budget.dvae_epochs,
        batch_size=budget.dvae_batch,
        lr=3e-3,
        warmup_steps=20,
        save_ckpt_freq=budget.dvae_epochs,
        save_ckpt_steps=50,
        **_run_options(config),
    )


def pretraining_config(folder: Path, budget: Budget, config: DemoConfig) -> PretrainingConfig:
    """Returns the settings of the pre-training."""
    return PretrainingConfig(
        data_path=str(folder / "images" / TRAINING_LIST),
        eval_data_path=str(folder / "images" / "held_out"),
        output_dir=str(folder / "pretrain"),
        model="beit_tiny_patch16_224_8k_vocab",
        model_kwargs=MODEL,
        input_size=IMAGE_PIXELS,
        second_input_size=IMAGE_PIXELS,
        discrete_vae_type="customized",
        discrete_vae_weight_path=str(folder / "dvae"),
        num_mask_patches=MASKED_PATCHES,
        min_mask_patches_per_block=4,
        color_jitter=0.0,
        drop_path=0.0,
        epochs=budget.pretrain_epochs,
        batch_size=budget.pretrain_batch,
        lr=2e-3,
        warmup_steps=40,
        clip_grad=3.0,
        eval_freq=3,
        save_ckpt_freq=budget.pretrain_epochs,
        save_ckpt_steps=100,
        **_run_options(config),
    )


def finetuning_config(folder: Path, start: str, budget: Budget, config: DemoConfig) -> FinetuningConfig:
    """Returns the settings of fine-tuning on the digits; the same budget from pre-trained weights and from scratch."""
    train, val = LABELLED["digits"]
    return FinetuningConfig(
        data_set="image_folder",
        data_path=str(folder / "images" / train),
        eval_data_path=str(folder / "images" / val),
        output_dir=str(folder / f"finetune-{start}"),
        finetune=str(pretrained_checkpoint(folder)) if start == "pretrained" else "",
        model="beit_tiny_patch16_224",
        model_kwargs=MODEL,
        input_size=IMAGE_PIXELS,
        crop_pct=1.0,
        drop_path=0.0,
        aa="none",
        color_jitter=0.0,
        reprob=0.0,
        smoothing=0.0,
        epochs=budget.finetune_epochs,
        batch_size=32,
        lr=2e-3,
        layer_decay=STARTS[start],
        warmup_epochs=1,
        clip_grad=3.0,
        save_ckpt_freq=budget.finetune_epochs,
        save_ckpt_steps=100,
        **_run_options(config),
    )


def pretrained_checkpoint(folder: Path) -> Path:
    """Returns the pre-training's last checkpoint."""
    checkpoints = (folder / "pretrain").glob("checkpoint-[0-9]*.pth")
    return max(checkpoints, key=lambda path: int(path.stem.split("-")[1]))


def _run_options(config: DemoConfig) -> dict[str, Any]:
    return {"device": config.device, "num_workers": config.num_workers, "seed": config.seed, "pin_mem": False}


# Images


def make_images(folder: Path, budget: Budget, config: DemoConfig) -> None:
    """Makes training and held-out images, unless they are there already.

    Raises:
        InputError: The folder holds something else, or images made with other settings; or scikit-image is missing.
    """
    make_once(folder, {"budget": asdict(budget), "seed": config.seed}, lambda made: _write_images(made, budget, config))


def make_once(folder: Path, recipe: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Makes a folder whole or not at all, unless it is there already, made by the same recipe.

    Args:
        folder: What to make.
        recipe: What it depends on, kept beside it.
        write: Fills the folder that it is given, which becomes ``folder``.

    Raises:
        InputError: The folder holds something else, or was made by another recipe.
    """
    if folder.exists():
        marker = folder / MARKER
        if not marker.is_file() or json.loads(marker.read_text(encoding="utf-8")) != recipe:
            raise InputError(
                f"{folder} is not what these settings would make (--quick, --seed): use another --output_dir"
            )
        return
    unfinished = folder.with_name(f".{folder.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was stopped here
    write(unfinished)
    (unfinished / MARKER).write_text(json.dumps(recipe), encoding="utf-8")
    unfinished.rename(folder)


def _write_images(folder: Path, budget: Budget, config: DemoConfig) -> None:
    splits = (("train", budget.scenes, budget.crops), ("held_out", budget.held_out_scenes, budget.held_out_crops))
    for number, (split, scenes, crops) in enumerate(splits):
        # A scene depends on seed and number: the splits need seeds of their own. The crops know about held-out ones.
        write_scenes(folder / split / "scenes", scenes, STORED_PIXELS, seed=2 * config.seed + number)
        held_out = split == "held_out"
        photographs = folder / split / "photographs"
        write_photograph_crops(photographs, crops, STORED_PIXELS, seed=config.seed, held_out=held_out)
    write_digits(folder / "digits", IMAGE_PIXELS, config.seed)
    training = sorted(path for part in ("train", "digits/train") for path in (folder / part).rglob("*.*"))
    names = (f"{path.relative_to(folder)}\n" for path in training)
    (folder / TRAINING_LIST).write_text("".join(names), encoding="utf-8")


# Results


def score_neighbours(folder: Path, data: str, config: DemoConfig) -> dict[str, float]:
    """Returns the k-NN accuracy, in percent, of pre-trained and of untrained features: each of its best block."""
    train, val = LABELLED[data]
    scores = {}
    for name, untrained in (("pretrained", False), ("untrained", True)):
        settings = KnnConfig(
            checkpoint=str(pretrained_checkpoint(folder)),
            untrained=untrained,
            data_set="image_folder",
            data_path=str(folder / "images" / train),
            eval_data_path=str(folder / "images" / val),
            pool=("mean",),
            k=(10,),
            device=config.device,
            num_workers=config.num_workers,
            seed=config.seed,
        )
        scores[name] = knn.best_of(knn.evaluate(settings)).acc1
    return scores


def summarize(folder: Path, neighbours: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Returns the numbers that count, from the last lines of the logs, and the verdict on each."""
    tokenizer, pretraining = read_log(folder / "dvae")[-1], read_log(folder / "pretrain")[-1]
    ratio = pretraining["test_mlm_acc"] / pretraining["test_most_frequent_acc"]
    share = tokenizer["test_perplexity"] / NUM_TOKENS
    return {
        "masked_token_accuracy": pretraining["test_mlm_acc"],
        "most_frequent_token_accuracy": pretraining["test_most_frequent_acc"],
        "accuracy_ratio": ratio,
        "accuracy_ratio_required": REQUIRED_RATIO,
        "accuracy_ok": ratio >= REQUIRED_RATIO,
        "codebook_perplexity": tokenizer["test_perplexity"],
        "codebook_perplexity_share": share,
        "codebook_perplexity_share_required": REQUIRED_PERPLEXITY,
        "perplexity_ok": share >= REQUIRED_PERPLEXITY,
        "used_codes": tokenizer["test_used_codes"],
        "num_tokens": NUM_TOKENS,
        "reconstruction_loss": tokenizer["test_loss"],
        "pretraining_loss": pretraining["test_loss"],
        "knn_acc1": neighbours,
        "finetuning_acc1": {start: read_log(folder / f"finetune-{start}")[-1]["test_acc1"] for start in STARTS},
    }


def draw(folder: Path, config: DemoConfig) -> None:
    """Draws ``curves.png`` and ``reconstructions.png``."""
    draw_curves(folder / "curves.png", demo_diagrams(folder), "What the tokenizer (above) and BEiT (below) learnt")
    index = index_images(folder / "images" / "held_out")
    paths = [index.path(position) for position in np.linspace(0, len(index) - 1, PICTURE_IMAGES).round().astype(int)]
    settings, model, tokenizer = load_pretrained(
        pretrained_checkpoint(folder), str(folder / "dvae"), torch.device("cpu")
    )
    result = reconstruct_files(paths, settings, model, tokenizer, config.seed)
    draw_panels(folder / "reconstructions.png", result.panels(), result.captions(), "Held-out images")


def demo_diagrams(folder: Path) -> dict[str, list[Curve]]:
    """Returns what tells most about both runs."""
    tokenizer = diagrams({"dvae": read_log(folder / "dvae")}, ["loss", "perplexity"])
    pretraining = diagrams({"pretrain": read_log(folder / "pretrain")}, ["loss", "mlm_acc", "most_frequent_acc"])
    accuracy = pretraining["mlm_acc"] + [
        Curve("most frequent token", curve.epochs, curve.values) for curve in pretraining["most_frequent_acc"]
    ]
    return {
        "dVAE: reconstruction loss": tokenizer["loss"],
        "dVAE: codebook perplexity": tokenizer["perplexity"],
        "BEiT: loss on masked tokens": pretraining["loss"],
        "BEiT: masked-token accuracy": accuracy,
    }


def report(summary: dict[str, Any], folder: Path) -> None:
    """Says how it went."""
    verdict = {True: "reached", False: "NOT reached"}
    logger.info(
        "masked-token accuracy on held-out images: %.1f %%, %.1f times the %.1f %% of the most frequent token "
        "(wanted: %g times; %s)",
        100 * summary["masked_token_accuracy"],
        summary["accuracy_ratio"],
        100 * summary["most_frequent_token_accuracy"],
        REQUIRED_RATIO,
        verdict[summary["accuracy_ok"]],
    )
    logger.info(
        "codebook perplexity: %.1f, %.0f %% of the %d tokens (wanted: %.0f %%; %s); %d tokens in use",
        summary["codebook_perplexity"],
        100 * summary["codebook_perplexity_share"],
        NUM_TOKENS,
        100 * REQUIRED_PERPLEXITY,
        verdict[summary["perplexity_ok"]],
        summary["used_codes"],
    )
    for data, scores in summary["knn_acc1"].items():
        logger.info(
            "k-NN on held-out %s: %.1f %% with the pre-trained features, %.1f %% with those of the untrained network",
            data,
            scores["pretrained"],
            scores["untrained"],
        )
    logger.info(
        "fine-tuned on the digits, held-out accuracy: %.1f %% from pre-training, %.1f %% from scratch, same budget",
        *(summary["finetuning_acc1"][start] for start in STARTS),
    )
    logger.info("see %s and %s", folder / "reconstructions.png", folder / "curves.png")
