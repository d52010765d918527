"""How long until something happens: imports, the first training step, and the listing of a million files.

    python benchmarks/startup.py                    a million empty files in a temporary folder
    python benchmarks/startup.py --files 50000      fewer of them
    python benchmarks/startup.py --quick            few, to see that it runs

Each repeat is a process of its own, started with the files in the cache of the operating system. Peers: timm and
transformers to import and to do the first step with, torchvision's ImageFolder to list the files with.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import Clock, announce, headline, machine, parser, prepare, show, write

GOAL = 1.2
COMPARED = ("timm", "ours", "ours: import beit")  # in the ratios
CLASSES = 1000  # folders that the files are in

FIRST_STEP = (
    "import torch; images = torch.randn(2, 3, 224, 224); optimizer = torch.optim.AdamW(model.parameters()); "
    "out = model(images); out = getattr(out, 'logits', out); out.float().square().mean().backward(); optimizer.step()"
)
IMPORTS = {
    "torch alone": "import torch",
    "timm": "import timm",
    "transformers' BEiT": "from transformers import BeitForImageClassification",
    "ours: import beit": "import beit",
    "ours: the pre-training job": "import beit.tasks.pretraining",
}
FIRST_STEPS = {
    "timm": "import timm; model = timm.create_model('beit_base_patch16_224', depth=depth).train(); " + FIRST_STEP,
    "transformers": "from transformers import BeitConfig, BeitForImageClassification as M; "
    "model = M(BeitConfig(use_relative_position_bias=True, num_hidden_layers=depth)).train(); " + FIRST_STEP,
    "ours": "from beit import create_model; "
    "model = create_model('beit_base_patch16_224', depth=depth).train(); " + FIRST_STEP,
}
LISTINGS = {
    "torchvision's ImageFolder": "from torchvision.datasets import ImageFolder as find",
    "ours, for the first time": "from beit.data.datasets import index_images as find",
    "ours, once more": "from beit.data.datasets import index_images as find",
}
# Prints the seconds that the listing took and what it holds in memory, in MiB, besides what the import brought.
LIST = """
{find}
import gc, resource, sys, time
def resident():
    gc.collect()
    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() / 2**20
before, start = resident(), time.{clock}()
found = find({folder!r})
seconds = time.{clock}() - start
print(seconds, resident() - before, len(found))
"""


def seconds_of(code: str, environment: dict[str, str]) -> float:
    """Returns how long a fresh interpreter takes for some code."""
    start, spent = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    done = resource.getrusage(resource.RUSAGE_CHILDREN)
    if Clock.now is time.perf_counter:
        return time.perf_counter() - start
    return done.ru_utime + done.ru_stime - spent.ru_utime - spent.ru_stime


def measure(what: dict[str, str], repeats: int, environment: dict[str, str]) -> dict[str, list[float]]:
    """Runs each of some pieces of code in turn, so many times; once more before several, to fill the caches."""
    times: dict[str, list[float]] = {name: [] for name in what}
    warmups = 1 if repeats > 1 else 0
    for repeat in range(warmups + repeats):
        for name, code in what.items():
            seconds = seconds_of(code, environment)
            if repeat >= warmups:
                times[name].append(seconds)
    return times


def make_files(folder: Path, count: int) -> None:
    """Fills a folder with empty files, in folders as of an image data set."""
    for number in range(CLASSES):
        (folder / f"n{number:08d}").mkdir()
    for number in range(count):
        kind = number % CLASSES
        os.close(os.open(folder / f"n{kind:08d}" / f"n{kind:08d}_{number}.JPEG", os.O_CREAT | os.O_WRONLY))


def list_files(count: int, environment: dict[str, str]) -> dict[str, dict[str, float]]:
    """Returns seconds and MiB of each way to list so many files."""
    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        folder.mkdir()
        make_files(folder, count)
        time.sleep(3)  # a folder that changed just now is not trusted to stay as it is, and listed again next time
        home = {**environment, "BEIT_HOME": str(Path(place) / "home")}
        clock = "perf_counter" if Clock.now is time.perf_counter else "process_time"
        for name, find in LISTINGS.items():
            code = LIST.format(find=find, folder=str(folder), clock=clock)
            done = subprocess.run([sys.executable, "-c", code], check=True, env=home, capture_output=True, text=True)
            seconds, mebibytes, files = map(float, done.stdout.split()[-3:])
            assert files == count, (name, files)
            found[name] = {"seconds": seconds, "mebibytes": mebibytes, "mebibytes_per_million": mebibytes * 1e6 / count}
    return found


def table(title: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """Prints the medians; returns them with what they are of."""
    rows = [(name, statistics.median(values)) for name, values in times.items()]
    show(title, ("", "s"), rows)
    return {"median_seconds": dict(rows), "seconds": times}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all of it."""
    threads = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **threads}
    depth = 1 if args.quick else 12
    imports, of_depth = IMPORTS, {name: f"depth = {depth}; {code}" for name, code in FIRST_STEPS.items()}
    if args.quick:  # each takes seconds, however small the model: only those that are compared
        imports, of_depth = ({name: each[name] for name in each if name in COMPARED} for each in (imports, of_depth))
    imports = measure(imports, args.repeats, environment)
    steps = measure(of_depth, args.repeats, environment)
    listings = list_files(args.files, environment)
    ours, peer = listings["ours, for the first time"], listings["torchvision's ImageFolder"]
    ratio = peer["seconds"] / ours["seconds"]
    headline(f"listing {args.files:,} files, against torchvision's ImageFolder", ratio, GOAL)
    headline("from nothing to a first step of ViT-B/16, against timm", _ratio(steps, "timm", "ours"))
    headline("`import beit`, against `import timm`", _ratio(imports, "timm", "ours: import beit"))
    results = {"imports": table("imports", imports), "first_step": table("from nothing to a first step", steps)}
    rows = [(name, *(found[key] for key in ("seconds", "mebibytes"))) for name, found in listings.items()]
    show(f"listing {args.files:,} files", ("", "s", "MiB"), rows)
    return {**results, "listing": {"files": args.files, **listings}}


def _ratio(times: dict[str, list[float]], peer: str, ours: str) -> float:
    return statistics.median(times[peer]) / statistics.median(times[ours])


def main() -> None:
    """Runs the benchmark."""
    made = parser(__doc__, repeats=3)
    made.add_argument("--files", type=int, default=1_000_000, help="files to list")
    args = made.parse_args()
    prepare(args)
    if args.quick:
        args.files = 2000
    facts = machine()
    announce(facts)
    write("startup", facts, run(args), args)


if __name__ == "__main__":
    main()
