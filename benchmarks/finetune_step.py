"""One step of fine-tuning for classification, beside timm's BEiT in the same precision.

    python benchmarks/finetune_step.py                     ViT-B/16, batch 8, float32 and bf16
    python benchmarks/finetune_step.py --input_size 384    at another resolution
    python benchmarks/finetune_step.py --quick             small, to see that it runs

A step is uint8 images to normalised ones, forward, label-smoothed loss, backward, norm, AdamW with layer decay.
All but the model and its grouping of parameters is the same code for both.
"""

import argparse
from collections.abc import Callable
from typing import Any

import timm
import torch
from measure import (
    DTYPES,
    Stages,
    announce,
    default_device,
    goal_of,
    headline,
    interleave,
    let_biases_learn,
    machine,
    matrix_product_peak,
    medians,
    parser,
    prepare,
    show,
    write,
)
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from beit.data.preprocessing import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from beit.tasks.finetuning import Classification
from beit.training.optim import create_optimizer, parameter_groups
from beit.training.precision import Precision
from beit.zoo import create_model

GOALS = {"float32": 1.03, "bf16": 1.03, "bf16, AMX": 1.2}
CLASSES, LAYER_DECAY, WEIGHT_DECAY, LR, DROP_PATH, SMOOTHING = 1000, 0.65, 0.05, 5e-4, 0.1, 0.1
PARTS = ("forward", "backward", "optimizer", "whole")
MODELS = {"base": "beit_base_patch16_224", "large": "beit_large_patch16_224"}


def our_model(args: argparse.Namespace) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Returns our classifier and its parameters in groups."""
    model = create_model(
        MODELS[args.model], img_size=args.input_size, num_classes=CLASSES, drop_path_rate=DROP_PATH, **reduced(args)
    )
    groups = parameter_groups(
        model,
        WEIGHT_DECAY,
        no_decay=model.no_weight_decay(),
        layer_id=model.layer_id,
        num_layers=model.get_num_layers(),
        layer_decay=LAYER_DECAY,
    )
    for group in groups:
        group["lr"] = LR * group["lr_scale"]
    return model, groups


def timm_model(args: argparse.Namespace) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Returns timm's classifier and its parameters in groups."""
    model = timm.create_model(
        MODELS[args.model], img_size=args.input_size, num_classes=CLASSES, drop_path_rate=DROP_PATH, **reduced(args)
    )
    groups = param_groups_layer_decay(model, WEIGHT_DECAY, layer_decay=LAYER_DECAY)
    for group in groups:
        group["lr"] = LR * group["lr_scale"]
    return model, groups


def reduced(args: argparse.Namespace) -> dict[str, int]:
    """Returns the sizes of a model that is only to run."""
    return {"embed_dim": 64, "depth": 2, "num_heads": 2} if args.quick else {}


class Step:
    """A training step of a model.

    Args:
        build: Returns the model and its parameter groups.
        args: The flags.
        dtype: Number format of forward and backward.
        device: Where to compute.
        compiled: Compile the model.
    """

    def __init__(
        self,
        build: Callable[[argparse.Namespace], tuple[nn.Module, list[dict[str, Any]]]],
        args: argparse.Namespace,
        dtype: torch.dtype,
        device: torch.device,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        let_biases_learn()
        model, groups = build(args)
        self.model, self.device = model.train().to(device), device
        if compiled:
            self.model.compile(dynamic=False)
        self.optimizer = create_optimizer("adamw", groups, lr=LR, fused=True)
        self.objective = Classification(IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD, smoothing=SMOOTHING)
        self.precision = Precision(dtype, device)
        size = (args.batch_size, 3, args.input_size, args.input_size)
        self.batch = {
            "image": torch.randint(256, size, dtype=torch.uint8, device=device),
            "label": torch.randint(CLASSES, size[:1], device=device),
        }

    def __call__(self) -> dict[str, float]:
        """Does one step; returns the seconds of its parts."""
        stages = Stages(self.device)
        with stages("forward"), self.precision.autocast():
            loss, _ = self.objective(self.model, self.batch, 0)
        with stages("backward"):
            self.precision.backward(loss)
        with stages("optimizer"):
            self.precision.step(self.optimizer, self.model.parameters(), None)
        return stages.seconds


def compare(args: argparse.Namespace, precision: str, device: torch.device) -> dict[str, Any]:
    """Times both models in one number format and prints what was found."""
    dtype = DTYPES[precision]
    steps = {"timm": Step(timm_model, args, dtype, device), "ours": Step(our_model, args, dtype, device)}
    flops = {}
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step()
        flops[name] = counter.get_total_flops()
    if args.compile:
        for name, build in (("timm, compiled", timm_model), ("ours, compiled", our_model)):
            steps[name] = Step(build, args, dtype, device, compiled=True)
            steps[name]()
            flops[name] = flops[name.split(",")[0]]
    peak = matrix_product_peak(dtype, device)
    times = interleave(steps, args.repeats, warmups=0, device=device)
    found = medians(times)
    ratios = {"ours": found["timm"]["whole"] / found["ours"]["whole"]}
    if args.compile:
        ratios["ours, compiled"] = found["timm, compiled"]["whole"] / found["ours, compiled"]["whole"]
    goal = goal_of(GOALS, precision, device)
    for name, ratio in ratios.items():
        headline(f"{name} against timm in the same loop, {precision}", ratio, goal)
    rows = []
    for name, seconds in found.items():
        rate = flops[name] / seconds["whole"]
        parts = [f"{seconds[part]:.2f}" for part in PARTS]
        rows.append((name, *parts, args.batch_size / seconds["whole"], rate / 1e12, f"{rate / peak:.0%}"))
    title = f"{precision}, batch {args.batch_size}, {args.input_size} pixels"
    show(title, ("s/step", *PARTS, "images/s", "TFLOP/s", "of peak"), rows)
    return {
        "ratio": ratios,
        "goal": goal,
        "median_seconds": found,
        "seconds": times,
        "flops": flops,
        "matrix_product_peak_flops": peak,
    }


def main() -> None:
    """Runs the benchmark."""
    made = parser(__doc__)
    made.add_argument("--model", choices=[*MODELS], default="base")
    made.add_argument("--precision", nargs="+", choices=["float32", "bf16"], default=["float32", "bf16"])
    made.add_argument("--batch_size", type=int, default=8, help="images per step")
    made.add_argument("--input_size", type=int, default=224, help="side of the images, in pixels")
    made.add_argument("--compile", action="store_true", help="both models compiled as well; takes minutes to begin")
    args = made.parse_args()
    prepare(args)
    if args.quick:
        args.batch_size, args.input_size = 2, 64
    device = default_device()
    facts = machine(device)
    announce(facts)
    sizes = {"model": args.model, "batch": args.batch_size, "image": args.input_size}
    results = {name: compare(args, name, device) for name in args.precision}
    if device.type != "cuda":
        print("CUDA: not measured.")
    write("finetune_step", facts, {"sizes": sizes, **results}, args)


if __name__ == "__main__":
    main()
