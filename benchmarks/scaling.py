"""How a training step grows with processes: images/s against the ideal, and memory a process.

    python benchmarks/scaling.py                      1, 2 and 4 processes, each with its own batch: BEiT-small on CPUs,
                                                      one thread a process, BEiT-base on GPUs, as many as there are
    python benchmarks/scaling.py --processes 1 2 8    other numbers of them, the first of which must be 1
    python benchmarks/scaling.py --quick              small, to see that it runs

Each process trains on a batch of its own, so the work of a process stays the same and the ideal is as many times the
images/s of one process as there are processes, but no more than cores or GPUs. Pre-training on pixels, whole steps of
the training loop with AdamW, batches that lie ready in memory. Peers are the two ways to train together:
DistributedDataParallel (gloo between CPUs, NCCL between GPUs) and `--shard fsdp`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import announce, default_device, headline, machine, parser, peak_memory, prepare, show, write
from torch import Tensor

from beit.data.preprocessing import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from beit.launch import end_at_once
from beit.masking import BlockwiseMaskGenerator
from beit.targets import PixelTarget
from beit.tasks.pretraining import MaskedPrediction, with_patch_index
from beit.training import distributed
from beit.training.fsdp import FullyShardedTrainer
from beit.training.loop import Trainer
from beit.training.optim import create_optimizer, parameter_groups
from beit.training.precision import Precision, resolve_amp_dtype
from beit.training.session import open_session
from beit.training.state import LoopSettings, Period
from beit.zoo import create_model

ONE, DDP, FSDP = "one process", "DDP", "FSDP"
WINDOWS = 3  # timed ones of each start, after one that warms up
LR, WEIGHT_DECAY = 1.5e-3, 0.05


@dataclass(frozen=True)
class Sizes:
    """What a process trains, on how much.

    Args:
        model: The backbone's size.
        batch: Images a process and step.
        image: Side of the images, in pixels.
        steps: Optimizer steps of a window.
    """

    model: str
    batch: int
    image: int
    steps: int


SIZES = {
    "cpu": Sizes("small", batch=4, image=224, steps=1),
    "cuda": Sizes("base", batch=64, image=224, steps=20),
    "quick": Sizes("tiny", batch=2, image=32, steps=1),
}


# ----------------------------------------------------------------------------------------------------------- a process
class Ready:
    """A loader of one batch, again and again, that notes how long each epoch takes."""

    def __init__(self, batch: dict[str, Tensor], batches: int) -> None:
        self.batch_size, self.batches_per_epoch = len(batch["image"]), batches
        self.seconds: list[float] = []
        self._batch = batch

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[dict[str, Tensor]]:  # noqa: ARG002  (as loaders have)
        """Yields the batch; the loop closes the epoch once the device has done it."""
        start = time.perf_counter()
        try:
            for _ in range(first_batch, self.batches_per_epoch):
                yield self._batch
        finally:
            self.seconds.append(time.perf_counter() - start)


def make_batch(sizes: Sizes) -> dict[str, Tensor]:
    """Returns random pixels with blockwise masks."""
    side, rng = sizes.image // 16, np.random.default_rng(0)
    masks = BlockwiseMaskGenerator((side, side), num_mask_patches=round(side**2 * 75 / 196), min_num_patches=1)
    mask = torch.from_numpy(np.stack([masks(rng) for _ in range(sizes.batch)]))
    return {"image": torch.randint(256, (sizes.batch, 3, sizes.image, sizes.image), dtype=torch.uint8), "mask": mask}


def work(args: argparse.Namespace) -> None:
    """Trains as one of the processes; the main one writes what was measured."""
    sizes = Sizes(**json.loads(args.sizes))
    with open_session(device=args.device, output_dir=None, settings="", seed=0) as session:
        before = peak_memory(session.device)
        loader = Ready(make_batch(sizes), sizes.steps)
        make_trainer(args.way, sizes, loader, session.device).fit()
        memory = torch.tensor([0.0] * session.world_size, device=session.device)
        memory[session.rank] = (peak_memory(session.device) - before) / 2**20
        memory = distributed.sum_over_ranks(memory).cpu()
    if session.rank == 0:
        args.worker.write_text(json.dumps({"seconds": loader.seconds[1:], "mebibytes": memory.max().item()}))


def make_trainer(way: str, sizes: Sizes, loader: Ready, device: torch.device) -> Trainer:
    """Returns what trains in one of the ways."""
    mean, std = IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
    target = PixelTarget((16, 16), mean, std, normalised=True)
    name = f"beit_{sizes.model}_patch16_224_8k_vocab"
    model = create_model(name, img_size=sizes.image, vocab_size=target.output_size).to(device)
    optimizer = create_optimizer(
        "adamw",
        parameter_groups(model, WEIGHT_DECAY, no_decay=model.no_weight_decay()),  # type: ignore[operator]
        lr=LR,
        fused=True,
    )
    precision = Precision(resolve_amp_dtype("auto", device), device)
    settings = LoopSettings(
        total_steps=(1 + WINDOWS) * sizes.steps, period=Period("epoch", sizes.steps), log_every=sizes.steps, save=False
    )
    arguments = {
        "model": model,
        "step": MaskedPrediction(target, mean, std),
        "loader": loader,
        "optimizer": optimizer,
        "precision": precision,
        "settings": settings,
        "lr": lambda _: LR,
        "prepare": with_patch_index,
    }
    if way != FSDP:
        return Trainer(**arguments)
    return FullyShardedTrainer(**arguments, layers=lambda model: model.blocks)


# ----------------------------------------------------------------------------------------------------------- all of it
def start(way: str, processes: int, sizes: Sizes, args: argparse.Namespace) -> dict[str, Any]:
    """Starts so many processes; returns the seconds of their windows and the memory of the largest."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads or 1)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.json"
        own = ["--worker", report, "--way", way, "--sizes", json.dumps(asdict(sizes)), "--device", args.device]
        command = [sys.executable, *(torchrun if processes > 1 else []), __file__, *map(str, own)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{way}, {processes} processes, failed:\n{done.stderr}")
        return json.loads(report.read_text())


def measure(sizes: Sizes, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Runs every way with every number of processes in turn, each second round backwards."""
    contenders = [(ONE, 1), *((way, count) for way in (DDP, FSDP) for count in args.processes[1:])]
    found: dict[str, dict[str, Any]] = {}
    for number in range(args.repeats):
        for way, count in contenders if number % 2 == 0 else reversed(contenders):
            measured = start(way, count, sizes, args)
            entry = found.setdefault(f"{way} {count}", {"way": way, "processes": count, "seconds": [], "mebibytes": []})
            entry["seconds"] += measured["seconds"]
            entry["mebibytes"].append(measured["mebibytes"])
    return found


def evaluate(found: dict[str, dict[str, Any]], sizes: Sizes, places: int) -> list[dict[str, Any]]:
    """Returns for each contender images/s, the ratio to one process, the ideal and what is missing from it."""
    rows = []
    for entry in found.values():
        count, window = entry["processes"], statistics.median(entry["seconds"])
        rate = count * sizes.batch * sizes.steps / window
        rows.append({**entry, "images_per_second": rate, "ideal": min(count, places)})
    one = rows[[row["way"] for row in rows].index(ONE)]["images_per_second"]
    for row in rows:
        row["ratio"] = row["images_per_second"] / one
        row["overhead"] = 1 - row["ratio"] / row["ideal"]
    return sorted(rows, key=lambda row: ((ONE, DDP, FSDP).index(row["way"]), row["processes"]))


def tell(rows: list[dict[str, Any]], sizes: Sizes, places: int, what: str) -> None:
    """Prints the ratios and the table."""
    for row in rows[1:]:
        crowded = f", {row['processes']} processes on {places} {what}" * (row["processes"] > places)
        headline(f"{row['way']} of {row['processes']} against one process, ideal {row['ideal']}{crowded}", row["ratio"])
    table = [
        (
            row["way"],
            f"{row['processes']} on {places} {what}",
            row["images_per_second"],
            f"{row['ratio']:.2f}x of {row['ideal']}x",
            f"{row['overhead']:.0%}",
            f"{statistics.median(row['mebibytes']):.0f}",
        )
        for row in rows
    ]
    title = f"BEiT-{sizes.model}, {sizes.batch} images of {sizes.image} pixels per process"
    show(title, ("", "processes", "images/s", "of one", "overhead", "MiB per process"), table)


def main() -> None:
    """Runs the benchmark, or one of its processes."""
    made = parser(__doc__, repeats=2)
    made.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes, first 1")
    made.add_argument("--device", default=default_device().type, help="cuda or cpu")
    for hidden, kind in (("--worker", Path), ("--way", str), ("--sizes", str)):
        made.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.worker:
        work(args)
        end_at_once(0)
    if args.processes[0] != 1 or args.clock != "wall":
        made.error("--processes begins with 1, and only the wall clock tells how processes wait for each other")
    prepare(args)
    facts = machine(args.device)
    cuda = args.device == "cuda"
    places, what = (torch.cuda.device_count(), "GPUs") if cuda else (facts["cores"], "cores")
    if args.quick or cuda:
        args.processes = [count for count in args.processes if count <= (places if cuda else 2)]
    sizes = SIZES["quick" if args.quick else args.device]
    announce(facts)
    print(f"{args.threads or 1} thread(s) a process" if not cuda else f"{places} GPUs")
    rows = evaluate(measure(sizes, args), sizes, places)
    tell(rows, sizes, places, what)
    if len(rows) == 1:
        print("1.00x  one process: there is one GPU, so more were not measured")
    write("scaling", facts, {"sizes": asdict(sizes), "places": places, "rows": rows}, args)


if __name__ == "__main__":
    main()
