"""Segmentation in windows: UPerNet on BEiT, beside transformers' model window by window with the same weights.

    python benchmarks/segmentation_inference.py                    ViT-B/16, windows of 512, float32 and bf16
    python benchmarks/segmentation_inference.py --images 8 --batch_size 8      for a GPU
    python benchmarks/segmentation_inference.py --quick            small, to see that it runs

From images in uint8 to the class of each pixel: normalised, cut into windows, logits enlarged and averaged, arg-max.
Weights are random, so that classes lie closer together than those of a trained model, and fewer of them agree.
"""

import argparse
import logging
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import (
    DTYPES,
    announce,
    default_device,
    headline,
    interleave,
    machine,
    medians,
    parser,
    prepare,
    show,
    write,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BeitForSemanticSegmentation

from beit.checkpoints.export import convert
from beit.data.preprocessing import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from beit.data.transforms import normalize
from beit.storage import save_checkpoint
from beit.training.precision import Precision
from beit.zoo import create_model
from semantic_segmentation.inference import TestSettings, predict_each, window_starts
from semantic_segmentation.modeling import Segmentor, build_segmentor

GOALS = {"float32": 1.5, "bf16": 1.8, "fp16": 1.8}
CLASSES = 150
SHORT, LONG = 1.0, 4 / 3  # sides of the images, in windows: a photograph of ADE20K is 512 x 683
SIZES = {
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "out_indices": (3, 5, 7, 11)},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "out_indices": (7, 11, 15, 23)},
    "quick": {"embed_dim": 64, "depth": 4, "num_heads": 2, "out_indices": (0, 1, 2, 3)},
}
STATISTICS = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}

Contender = Callable[[], list[Tensor]]


# ------------------------------------------------------------------------------------------------------------- models
def our_model(args: argparse.Namespace) -> Segmentor:
    """Returns a segmentor with random weights, among them the bias tables and the statistics, which begin as zeros."""
    torch.manual_seed(0)
    sizes = SIZES[args.model]
    segmentor = build_segmentor(
        img_size=args.crop,
        num_classes=CLASSES,
        channels=sizes["embed_dim"],
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        **sizes,
    )
    for name, tensor in segmentor.state_dict().items():
        if name.endswith("bias_table"):
            nn.init.normal_(tensor, std=0.2)
        elif name.endswith("running_mean"):
            nn.init.normal_(tensor, std=0.1)
    return segmentor.eval()


def peer_of(segmentor: Segmentor) -> nn.Module:
    """Returns transformers' model with the weights of ours, as `beit convert` writes them."""
    with tempfile.TemporaryDirectory() as folder:
        recorded = {"out_indices": list(segmentor.backbone.out_indices), "num_heads": segmentor.backbone.num_heads}
        save_checkpoint(Path(folder) / "ours.pth", {"model": segmentor.state_dict(), **recorded})
        convert(Path(folder) / "ours.pth", Path(folder) / "theirs", "huggingface")
        return BeitForSemanticSegmentation.from_pretrained(Path(folder) / "theirs").eval()


# ----------------------------------------------------------------------------------------------------------- contenders
def settings_of(args: argparse.Namespace, batch_size: int) -> TestSettings:
    """Returns windows of the crop's size, two thirds of it apart."""
    crop, stride = args.crop, args.crop * 2 // 3
    return TestSettings(crop=(crop, crop), stride=(stride, stride), image_scale=(4 * crop, crop), batch_size=batch_size)


def ours(model: Segmentor, images: list[Tensor], settings: TestSettings, precision: Precision) -> Contender:
    """Returns our prediction of all images."""

    def run() -> list[Tensor]:
        each = predict_each(model, enumerate(images), settings, precision=precision, **STATISTICS)
        return [classes for _, classes in each]

    return run


def window_by_window(model: nn.Module, images: list[Tensor], settings: TestSettings, precision: Precision) -> Contender:
    """Returns the usual prediction with transformers' model, which has no windows of its own."""

    @torch.inference_mode()
    def run() -> list[Tensor]:
        return [one_image(image.to(precision.device)) for image in images]

    def one_image(image: Tensor) -> Tensor:
        pixels = normalize(image[None], *STATISTICS.values())
        (height, width), (crop, _), (stride, _) = image.shape[1:], settings.crop, settings.stride
        total = torch.zeros(1, CLASSES, height, width, device=image.device)
        count = torch.zeros(1, 1, height, width, device=image.device)
        for top in window_starts(height, crop, stride):
            for left in window_starts(width, crop, stride):
                place = (..., slice(top, top + crop), slice(left, left + crop))
                with precision.autocast():
                    logits = model(pixels[place]).logits
                total[place] += F.interpolate(logits.float(), size=(crop, crop), mode="bilinear", align_corners=False)
                count[place] += 1
        return (total / count)[0].argmax(dim=0).to(torch.uint8)

    return run


# ------------------------------------------------------------------------------------------------------------- measures
def peak_memory(run: Callable[[], Any], device: torch.device) -> float | None:
    """Returns the most memory that a run takes beside what there was before, in MB; None where nobody says."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the highest memory so far to that of now
        before = _status("VmRSS")
        run()
        return (_status("VmHWM") - before) / 2**10
    except OSError:
        return None


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def agreement(found: list[Tensor], expected: list[Tensor]) -> float:
    """Returns the share of pixels of the same class."""
    pairs = zip(found, expected, strict=True)
    return statistics.mean((a == b).float().mean().item() for a, b in pairs)


def compare(
    args: argparse.Namespace,
    name: str,
    models: tuple[Segmentor, nn.Module],
    images: list[Tensor],
    exact: list[Tensor] | None,
    device: torch.device,
) -> tuple[dict[str, Any], list[Tensor]]:
    """Times the contenders in one number format, and prints what was found.

    Returns:
        The numbers, and what transformers predicts.
    """
    precision = Precision(DTYPES[name], device)
    contenders: dict[str, Contender] = {
        "transformers, window by window": window_by_window(models[1], images, settings_of(args, 1), precision),
        "ours, window by window": ours(models[0], images, settings_of(args, 1), precision),
    }
    if args.batch_size > 1:
        together = ours(models[0], images, settings_of(args, args.batch_size), precision)
        contenders[f"ours, {args.batch_size} windows at once"] = together
    predicted: dict[str, list[Tensor]] = {}
    memory: dict[str, float | None] = {}
    flops = {}
    for run in contenders.values():  # the warm-up: what libraries keep from then on is no contender's own
        run()
    for contender, run in contenders.items():
        with FlopCounterMode(display=False) as counter:
            memory[contender] = peak_memory(lambda run=run, c=contender: predicted.update({c: run()}), device)  # type: ignore[misc]
        flops[contender] = counter.get_total_flops()
    times = interleave(contenders, args.repeats, warmups=0, device=device)
    found = medians(times)
    peer, *own = contenders
    exact = predicted[peer] if exact is None else exact
    ratios = {contender: found[peer]["whole"] / found[contender]["whole"] for contender in own}
    for contender, ratio in ratios.items():
        headline(f"{contender}, against {peer}, {name}", ratio, GOALS[name])
    same = {contender: agreement(labels, exact) for contender, labels in predicted.items()}
    rows = [
        (
            contender,
            len(images) / found[contender]["whole"],
            f"{found[contender]['whole'] / len(images):.2f}",
            flops[contender] / len(images) / 1e12,
            "?" if (peak := memory[contender]) is None else f"{peak:.0f}",
            f"{same[contender]:.2%}",
        )
        for contender in contenders
    ]
    title = f"{name}, {len(images)} images of {images[0].shape[1]} x {images[0].shape[2]}"
    show(title, ("", "images/s", "s/image", "TFLOP/image", "peak MB", "same class"), rows)
    results = {
        "ratio": ratios,
        "goal": GOALS[name],
        "median_seconds": {contender: parts["whole"] for contender, parts in found.items()},
        "seconds": {contender: parts["whole"] for contender, parts in times.items()},
        "flops": flops,
        "peak_mb": memory,
        "share_of_pixels_with_the_class_of_transformers_in_float32": same,
    }
    return results, exact


def by_resolution(args: argparse.Namespace, name: str, device: torch.device) -> dict[str, Any]:
    """Times a forward pass of the backbone alone at several resolutions; resolution.py has a training step's memory."""
    precision = Precision(DTYPES[name], device)
    rows, results = [], {}
    sizes = {key: value for key, value in SIZES[args.model].items() if key != "out_indices"}
    for side in args.resolutions:
        model = create_model("beit_base_patch16_224", img_size=side, num_classes=0, init_values=0.1, **sizes)
        model = model.eval().to(device)
        images = torch.randn(1, 3, side, side, device=device)

        @torch.inference_mode()
        def forward(model: nn.Module = model, images: Tensor = images) -> None:
            with precision.autocast():
                model(images)

        with FlopCounterMode(display=False) as counter:
            forward()
        seconds = interleave({"forward": forward}, args.repeats, device=device)["forward"]["whole"]
        median, flops = statistics.median(seconds), counter.get_total_flops()
        results[str(side)] = {"median_seconds": median, "seconds": seconds, "flops": flops}
        rows.append((side, (side // 16) ** 2 + 1, f"{median:.3f}", flops / 1e9, flops / median / 1e9))
    header = ("pixels", "tokens", "s/image", "GFLOP", "GFLOP/s")
    show(f"{name}, forward pass of the backbone by resolution", header, rows)
    return results


# ------------------------------------------------------------------------------------------------------------- the run
def main() -> None:
    """Runs the benchmark."""
    made = parser(__doc__, repeats=3)
    made.add_argument("--model", choices=[*SIZES], default="base")
    made.add_argument("--precision", nargs="+", choices=[*DTYPES], default=["float32", "bf16"])
    made.add_argument("--crop", type=int, default=512, help="side of a window, in pixels")
    made.add_argument("--images", type=int, default=1, help="photographs of two windows each")
    made.add_argument("--batch_size", type=int, default=2, help="windows at once")
    made.add_argument("--resolutions", type=int, nargs="*", default=[224, 384, 512, 640], help="of the backbone alone")
    args = made.parse_args()
    prepare(args)
    if args.quick:
        args.model, args.crop, args.images, args.resolutions = "quick", 64, 2, [64, 96]
    logging.getLogger("beit").setLevel(logging.ERROR)
    device = default_device()
    facts = machine(device)
    announce(facts)
    segmentor = our_model(args)
    models = segmentor.to(device), peer_of(segmentor).to(device)
    size = (3, int(SHORT * args.crop), int(LONG * args.crop))
    images = [torch.randint(256, size, dtype=torch.uint8) for _ in range(args.images)]
    results: dict[str, Any] = {"sizes": _sizes(args)}
    exact = None
    for name in args.precision:
        results[name], exact = compare(args, name, models, images, exact, device)
        if args.resolutions:
            results[name]["backbone_by_resolution"] = by_resolution(args, name, device)
    if device.type != "cuda":
        print("CUDA: not measured.")
    write("segmentation_inference", facts, results, args)


def _sizes(args: argparse.Namespace) -> Mapping[str, Any]:
    return {name: getattr(args, name) for name in ("model", "crop", "images", "batch_size")}


if __name__ == "__main__":
    main()
