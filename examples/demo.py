"""The demo: trains a BEiT from scratch on a laptop's CPU and shows what it learned.

    python -m examples.demo --output_dir demo           # about 12 minutes on two cores
    python -m examples.demo --output_dir demo --quick   # a rehearsal of about a minute

It makes its own images, trains a small tokenizer, pre-trains a small BEiT on its tokens, and compares the result with
an untrained network on held-out images: k-NN, fine-tuning and segmentation. Every step runs one of the library's own
jobs. The demo can be stopped at any time; the same command resumes it.
"""

import json
import logging
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit.checkpoints.read import read_weights
from beit.commands import knn, visualize
from beit.commands.visualize import ReconstructConfig
from beit.data.datasets import index_images
from beit.launch import launch
from beit.storage import atomic_write
from beit.tasks import dvae_training, finetuning, pretraining
from beit.visualization.curves import overlaid, read_log
from beit.visualization.figures import draw_panels
from beit.visualization.plots import draw_curves
from examples.demo_runs import LABELLED, NUM_TOKENS, STARTS, Demo, DemoConfig
from semantic_segmentation import inference_model
from semantic_segmentation import task as segmentation
from semantic_segmentation.data import SegmentationClasses, SegmentationDataset, find_classes, find_pairs
from semantic_segmentation.modeling import segmentor_from
from semantic_segmentation.overlays import overlay

logger = logging.getLogger("beit.examples.demo")

REQUIRED_NATS = 1.0  # by which the masked-token loss is below that of knowing only how frequent each token is
REQUIRED_PERPLEXITY = 0.4  # of the codebook, relative to its size
RECONSTRUCTIONS, SEGMENTATIONS = 6, 4  # images per picture
OPACITY = 0.7  # of the colours of classes: what is below them is colourful too
FEATURES = ("pretrained", "untrained")


def main(config: DemoConfig) -> None:
    """Runs the demo; raises InputError if the folder belongs to something else, or a library is missing."""
    demo = Demo(config)
    logger.info("1/7 images: scenes, crops of photographs, handwritten digits")
    demo.make_images()
    logger.info("2/7 tokenizer: an autoencoder learns to draw images from %d tokens of 8 x 8 pixels", NUM_TOKENS)
    dvae_training.main(demo.tokenizer())
    logger.info("3/7 pre-training: BEiT learns to predict the tokens of the 40 % of patches that are masked")
    logger.info("(a model this small needs a much higher lr than the published one; expect a warning)")
    pretraining.main(demo.pretraining())
    logger.info("4/7 k-NN: do the features separate classes, without any labels in training?")
    neighbours = {
        data: {name: knn.best_of(knn.evaluate(demo.neighbours(data, name == "untrained"))).acc1 for name in FEATURES}
        for data in LABELLED
    }
    logger.info("5/7 fine-tuning on the digits, from the pre-trained weights and from scratch")
    for start in STARTS:
        finetuning.main(demo.finetuning(start))
    logger.info("6/7 segmentation with UPerNet, from the pre-trained backbone and from scratch")
    for start in STARTS:
        segmentation.main(demo.segmentation(start))
    logger.info("7/7 pictures")
    draw(demo)
    summary = summarize(demo.folder, neighbours)
    scores = {start: read_log(demo.run_folder(start))[-1]["test_mIoU"] for start in STARTS}
    write_json(demo.folder / "summary.json", summary)
    write_json(demo.folder / "segmentation.json", {"mIoU": scores})
    report(summary, scores)
    logger.info("see the pictures in %s", demo.folder)


def summarize(folder: Path, neighbours: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Returns the main results, from the logs' last lines, and whether they meet the requirements.

    ``neighbours`` are data set -> features -> k-NN accuracy in percent.
    """
    tokenizer, pretrained = read_log(folder / "dvae")[-1], read_log(folder / "pretrain")[-1]
    learnt = pretrained["test_unigram_entropy"] - pretrained["test_loss"]
    share = tokenizer["test_perplexity"] / NUM_TOKENS
    return {
        "masked_token_loss": pretrained["test_loss"],
        "unigram_entropy": pretrained["test_unigram_entropy"],
        "nats_below_unigram": learnt,
        "nats_below_unigram_required": REQUIRED_NATS,
        "nats_ok": learnt >= REQUIRED_NATS,
        "masked_token_accuracy": pretrained["test_mlm_acc"],
        "most_frequent_token_accuracy": pretrained["test_most_frequent_acc"],
        "accuracy_ratio": pretrained["test_mlm_acc"] / pretrained["test_most_frequent_acc"],
        "codebook_perplexity": tokenizer["test_perplexity"],
        "codebook_perplexity_share": share,
        "codebook_perplexity_share_required": REQUIRED_PERPLEXITY,
        "perplexity_ok": share >= REQUIRED_PERPLEXITY,
        "used_codes": tokenizer["test_used_codes"],
        "num_tokens": NUM_TOKENS,
        "reconstruction_loss": tokenizer["test_loss"],
        "psnr": tokenizer["test_psnr"],
        "ssim": tokenizer["test_ssim"],
        "knn_acc1": neighbours,
        "finetuning_acc1": {start: read_log(folder / f"finetune-{start}")[-1]["test_acc1"] for start in STARTS},
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(values, indent=2).encode() + b"\n")


def report(summary: dict[str, Any], scores: dict[str, float]) -> None:
    """Logs the results; ``scores`` are the segmentors' mIoU by start."""
    verdict = {True: "reached", False: "NOT reached"}
    logger.info(
        "tokenizer on held-out images: PSNR %.1f dB, %d of %d tokens in use, perplexity %.0f (required: %.0f; %s)",
        *(summary["psnr"], summary["used_codes"], NUM_TOKENS, summary["codebook_perplexity"]),
        *(REQUIRED_PERPLEXITY * NUM_TOKENS, verdict[summary["perplexity_ok"]]),
    )
    logger.info(
        "masked tokens of held-out images: loss %.2f nats, %.2f below the %.2f of knowing only how frequent each token "
        "is (required: %g; %s); a blind guess among %d scores %.2f",
        *(summary["masked_token_loss"], summary["nats_below_unigram"], summary["unigram_entropy"]),
        *(REQUIRED_NATS, verdict[summary["nats_ok"]], NUM_TOKENS, math.log(NUM_TOKENS)),
    )
    logger.info(
        "masked-token accuracy: %.1f %%; %.1f %% for always the most frequent token, %.1f %% for a blind guess",
        *(100 * summary["masked_token_accuracy"], 100 * summary["most_frequent_token_accuracy"], 100 / NUM_TOKENS),
    )
    for data, accuracies in summary["knn_acc1"].items():
        logger.info(
            "k-NN top-1 accuracy on held-out %s: %.1f %% pre-trained, %.1f %% untrained",
            data,
            *(accuracies[name] for name in FEATURES),
        )
    logger.info(
        "fine-tuning top-1 accuracy on held-out digits: %.1f %% from pre-training, %.1f %% from scratch",
        *(summary["finetuning_acc1"][start] for start in STARTS),
    )
    logger.info(
        "mIoU on held-out scenes: %.1f %% from pre-training, %.1f %% from scratch",
        *(100 * scores[start] for start in STARTS),
    )


def draw(demo: Demo) -> None:
    """Draws ``curves.png``, ``reconstructions.png`` and ``segmentation.png``."""
    folder = demo.folder
    curves = {
        f"{title}: {metric}": lines
        for title, run, metrics in (
            ("tokenizer", "dvae", ["psnr", "perplexity"]),
            ("BEiT", "pretrain", ["loss", "mlm_acc"]),
        )
        for metric, lines in overlaid({run: read_log(folder / run)}, metrics).items()
    }
    draw_curves(folder / "curves.png", curves, "What the tokenizer (top) and BEiT (bottom) learned")
    index = index_images(demo.images / "held_out")
    shown = np.linspace(0, len(index) - 1, RECONSTRUCTIONS).round().astype(int)
    visualize.reconstruct(
        ReconstructConfig(
            checkpoint=str(demo.checkpoint),
            tokenizer=str(folder / "dvae"),
            images=tuple(str(index.path(position)) for position in shown),
            output=str(folder / "reconstructions.png"),
            seed=demo.config.seed,
        )
    )
    draw_segmentations(demo)


def draw_segmentations(demo: Demo) -> None:
    """Draws some held-out scenes, their labels and the predictions of both segmentors."""
    config = demo.segmentation("scratch")
    root = Path(config.data_path)
    classes = find_classes(root, config.classes, config.reduce_zero_label)
    pairs = find_pairs(root / config.val_images, root / config.val_annotations)
    images = SegmentationDataset(pairs, num_classes=len(classes), reduce_zero_label=config.reduce_zero_label)
    shown = [images[0, number] for number in range(SEGMENTATIONS)]
    scenes = [sample["image"] for sample in shown]
    panels = {"image": scenes, "label": painted(scenes, [sample["label"] for sample in shown], classes)}
    for start, title in zip(STARTS, ("from pre-training", "from scratch"), strict=True):
        config = demo.segmentation(start)
        segmentor = segmentor_from(*read_weights(demo.run_folder(start) / f"checkpoint-{config.max_steps}.pth"))
        panels[title] = painted(scenes, inference_model(segmentor, scenes), classes)
    legend = list(zip(classes.names, classes.colours, strict=True))
    in_unit_range = {title: torch.stack(images) / 255 for title, images in panels.items()}
    draw_panels(demo.folder / "segmentation.png", in_unit_range, title="Held-out scenes", legend=legend)


def painted(images: list[Tensor], labels: Iterable[Tensor], classes: SegmentationClasses) -> list[Tensor]:
    """Returns images with their classes painted over them."""
    return [overlay(image, label, classes.colours, OPACITY) for image, label in zip(images, labels, strict=True)]


if __name__ == "__main__":
    sys.exit(launch(DemoConfig, main, __doc__, prog="python -m examples.demo"))
