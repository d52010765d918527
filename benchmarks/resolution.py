"""What a fine-tuning step costs at larger images, in time and memory, beside timm's BEiT.

    python benchmarks/resolution.py                               ViT-B/16 at 224, 384, 512 and 640 pixels
    python benchmarks/resolution.py --model large --batch_size 16 --precision bf16
    python benchmarks/resolution.py --quick                       small, to see that it runs

The step is that of finetune_step.py. Each model and size has a process of its own, whose peak memory is told whole:
PyTorch (about half a gigabyte on a CPU), weights, gradients, moments and activations. On a GPU it is what PyTorch
allocated there. The contenders take turns twice at each size, the second time backwards.
"""

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

import torch
from finetune_step import MODELS, Step, our_model, timm_model
from measure import (
    DTYPES,
    Clock,
    announce,
    default_device,
    headline,
    machine,
    parser,
    peak_memory,
    prepare,
    show,
    synchronize,
    write,
)
from torch import nn

SIZES = (224, 384, 512, 640)
TURNS = 2


def checkpointed(args: argparse.Namespace) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Returns our classifier, which computes its activations a second time in the backward pass."""
    model, groups = our_model(args)
    model.set_grad_checkpointing()  # type: ignore[operator]
    return model, groups


CONTENDERS = {"timm": timm_model, "ours": our_model, "ours, --grad_checkpointing": checkpointed}


def report_one(args: argparse.Namespace, device: torch.device) -> None:
    """Takes the steps of one contender at one size and prints their seconds and the peak memory, in GiB."""
    step = Step(CONTENDERS[args.one], args, DTYPES[args.precision], device)
    step()
    seconds = []
    for _ in range(args.repeats):
        start = Clock.now()
        step()
        synchronize(device)
        seconds.append(Clock.now() - start)
    print(json.dumps({"seconds": seconds, "peak_memory_gib": peak_memory(device) / 2**30}))


def measure_all(args: argparse.Namespace, size: int) -> dict[str, dict[str, Any]]:
    """Returns the seconds, their median and the peak memory of all contenders at one size."""
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "peak_memory_gib": 0.0} for name in CONTENDERS}
    for turn in range(1 if args.quick else TURNS):
        for name in list(CONTENDERS)[:: 1 if turn % 2 == 0 else -1]:
            told, of_name = measure_one(args, name, size), found[name]
            of_name["seconds"] += told["seconds"]
            of_name["peak_memory_gib"] = max(of_name["peak_memory_gib"], told["peak_memory_gib"])
            of_name["median_seconds"] = statistics.median(of_name["seconds"])
    return found


def measure_one(args: argparse.Namespace, name: str, size: int) -> dict[str, Any]:
    """Returns what a process of its own tells of one contender at one size."""
    command = [sys.executable, __file__, "--one", name, "--input_size", str(size), "--model", args.model]
    command += ["--precision", args.precision, "--batch_size", str(args.batch_size), "--repeats", str(args.repeats)]
    command += ["--clock", args.clock, "--threads", str(torch.get_num_threads())]
    command += ["--quick"] if args.quick else []
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(told.splitlines()[-1])


def main() -> None:
    """Runs the benchmark."""
    made = parser(__doc__, repeats=2)
    made.add_argument("--model", choices=[*MODELS], default="base")
    made.add_argument("--precision", choices=[*DTYPES], default="float32")
    made.add_argument("--batch_size", type=int, default=1, help="images per step (1)")
    made.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="sides of the images, in pixels")
    made.add_argument("--one", default="", help=argparse.SUPPRESS)
    made.add_argument("--input_size", type=int, default=0, help=argparse.SUPPRESS)
    args = made.parse_args()
    prepare(args)
    device = default_device()
    if args.one:
        return report_one(args, device)
    if args.quick:
        args.sizes = (32,)
    facts = machine(device)
    announce(facts)
    found = {size: measure_all(args, size) for size in args.sizes}
    for size, of_size in found.items():
        ratio = of_size["timm"]["median_seconds"] / of_size["ours"]["median_seconds"]
        headline(f"ours against timm at {size} pixels, {args.precision}", ratio)
    rows = []
    for size, of_size in found.items():
        for name, one in of_size.items():
            seconds, first = one["median_seconds"], found[args.sizes[0]][name]["median_seconds"]
            tokens = (size // 16) ** 2 + 1
            rows.append(
                (name, size, tokens, f"{seconds:.2f}", f"{seconds / first:.1f}x", f"{one['peak_memory_gib']:.1f}")
            )
    title = f"fine-tuning step, {args.model}, {args.precision}, batch {args.batch_size}"
    show(title, ("", "pixels", "tokens", "s/step", f"of {args.sizes[0]}", "peak GiB"), rows)
    if device.type != "cuda":
        print("CUDA: not measured.")
    sizes = {"model": args.model, "batch": args.batch_size, "precision": args.precision}
    write("resolution", facts, {"sizes": sizes, "by_size": found}, args)
    return None


if __name__ == "__main__":
    main()
