"""What the benchmarks share: interleaved repeats and their medians, facts about the machine, a table and a JSON file.

Run as a command it prints the machine and its matrix-product peak, which the shares of the peak refer to:

    python benchmarks/measure.py
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "timm", "transformers", "numpy", "Pillow")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PEAK_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices: large enough that a larger one is not faster

Times = dict[str, list[float]]
Goal = TypeVar("Goal", float, tuple[float, float])


# ------------------------------------------------------------------------------------------------------- the command
def parser(description: str | None, repeats: int = 5) -> argparse.ArgumentParser:
    """Returns a parser with the flags that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="small sizes and one repeat: does it run at all?")
    made.add_argument("--repeats", type=int, default=repeats, help=f"timed repeats of each contender ({repeats})")
    made.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: seconds of all threads added up, which another job on the machine changes less; for CPUs alone, and "
        "with OMP_WAIT_POLICY=passive in the environment, lest waiting be counted as work",
    )
    made.add_argument("--threads", type=int, default=0, help="torch's threads; 0 leaves them as they are")
    made.add_argument("--output", type=Path, help=f"JSON file; by default {RESULTS.name}/<benchmark>-<processor>.json")
    return made


def prepare(args: argparse.Namespace) -> None:
    """Makes the flags take effect."""
    if args.threads:
        torch.set_num_threads(args.threads)
    Clock.now = time.perf_counter if args.clock == "wall" else time.process_time
    if args.quick:
        args.repeats = 1
        PEAK_SIDE.update(dict.fromkeys(PEAK_SIDE, 256))  # the large products would take minutes on a slow machine


def default_device() -> torch.device:
    """Returns the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------------------------------- timing
def synchronize(device: torch.device | str = "cpu") -> None:
    """Waits until the device has done what it was given; a CPU has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def let_biases_learn() -> None:
    """Keeps torch from cuDNN's attention, which it prefers on Hopper, and which refuses a bias that needs a gradient.

    Without this the peers, who leave the choice to torch, would end with an error there.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


class Clock:
    """The clock of the whole benchmark, in seconds."""

    now: Callable[[], float] = time.perf_counter


class Stages:
    """Adds up the seconds of the named parts of a run; waits for the device at the end of each."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        synchronize(self.device)
        start = Clock.now()
        yield
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + Clock.now() - start


def interleave(
    contenders: Mapping[str, Callable[[], Mapping[str, float] | object]],
    repeats: int,
    warmups: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, Times]:
    """Runs contenders in turn, so that what else the machine does meets all of them alike.

    Every second round goes through them backwards, for the one after a hot cache is not always the same.

    Args:
        contenders: What to time. One that returns numbers by name, such as the seconds of :class:`Stages`, has them
            recorded too.
        repeats: Timed rounds.
        warmups: Rounds before them, not recorded.
        device: Where they compute.

    Returns:
        For each contender the seconds of each repeat, of the ``whole`` and of its parts.
    """
    times: dict[str, Times] = {name: {} for name in contenders}
    for round_number in range(warmups + repeats):
        names = list(contenders) if round_number % 2 == 0 else list(reversed(contenders))
        for name in names:
            synchronize(device)
            start = Clock.now()
            parts = contenders[name]()
            synchronize(device)
            whole = Clock.now() - start
            if round_number >= warmups:
                measured = {**parts, "whole": whole} if isinstance(parts, Mapping) else {"whole": whole}
                for part, seconds in measured.items():
                    times[name].setdefault(part, []).append(seconds)
    return times


def medians(times: Mapping[str, Times]) -> dict[str, dict[str, float]]:
    """Returns the median of every part of every contender, in seconds."""
    return {name: {part: statistics.median(values) for part, values in parts.items()} for name, parts in times.items()}


def matrix_product_peak(dtype: torch.dtype, device: torch.device | str = "cpu", repeats: int = 5) -> float:
    """Returns the FLOP/s of the fastest of some products of two large square matrices."""
    device = torch.device(device)
    side = PEAK_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = {"product": lambda: (a @ b).sum()}
    seconds = interleave(product, repeats, warmups=2, device=device)["product"]["whole"]
    return 2 * side**3 / min(seconds)


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Returns the most memory so far, in bytes: what PyTorch allocated on a GPU, or the process held on a CPU.

    On Linux not by ``getrusage``, whose figure begins with that of the process that started this one.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    (kibibytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kibibytes) * 1024


# --------------------------------------------------------------------------------------------------------- the machine
def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Returns what a number is worth nothing without; call it before the work, for the load at the start."""
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "seconds_are": "wall clock" if Clock.now is time.perf_counter else "CPU time of all threads",
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    return facts


def cpu_model() -> str:
    """Returns the processor's name with the matrix instructions that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    present = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in said.get("flags", "").split()]
    return " ".join(
        [said.get("model name", platform.machine()), *(["(" + ", ".join(present) + ")"] if present else [])]
    )


def goal_of(goals: Mapping[str, Goal], precision: str, device: torch.device) -> Goal:
    """Returns the goal in a number format, where there is one for CPUs that multiply bf16 matrices in units, theirs."""
    units = device.type == "cpu" and "amx_bf16" in cpu_model()
    return goals.get(f"{precision}, AMX", goals[precision]) if units else goals[precision]


def processor(facts: Mapping[str, Any]) -> str:
    """Returns a short name, of which the first word tells one processor's results from another's."""
    name = facts.get("gpu") or facts["cpu"].partition(" (avx")[0].replace("(R)", "").replace(" Processor", "")
    return f"{name}, AMX" if "gpu" not in facts and "amx_bf16" in facts["cpu"] else name


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# ------------------------------------------------------------------------------------------------------------- results
def show(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table; numbers to the right, in the precision that they were given as text or as 3 digits.

    :func:`write` writes it too.
    """
    cells = [[*map(_cell, row)] for row in [header, *rows]]
    TABLES.append({"title": title, "rows": cells})
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}")
    for number, row in enumerate(cells):
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))
        if number == 0:
            print("  ".join("-" * width for width in widths))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


HEADLINES: list[dict[str, Any]] = []  # of this run
TABLES: list[dict[str, Any]] = []  # likewise


def headline(what: str, ratio: float, goal: float | None = None) -> None:
    """Prints the ratio that a benchmark is about, before its tables; :func:`write` writes it too."""
    HEADLINES.append({"what": what, "ratio": ratio, "goal": goal})
    print(f"{ratio:.2f}x  {what}" + (f"  (goal: at least {goal:.2f}x)" if goal else ""), flush=True)


def announce(facts: Mapping[str, Any]) -> None:
    """Prints the machine in one line."""
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    where = facts.get("gpu", f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads")
    load = f"load {facts['load_average_at_start']} at the start"
    print(f"{where}; {packages}; {facts['seconds_are']}; {load}; {facts['date']}", flush=True)


def write(name: str, facts: Mapping[str, Any], results: Mapping[str, Any], args: argparse.Namespace) -> Path | None:
    """Writes the results with the machine they are of; a quick run, which measures nothing, only where it is told to.

    Args:
        name: The benchmark's.
        facts: From :func:`machine`.
        results: Plain values.
        args: The flags.

    Returns:
        The file, or None.
    """
    place = RESULTS / f"{name}-{processor(facts).split()[0].lower()}.json"
    path = args.output or (None if args.quick else place)
    if path is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"benchmark": name, "machine": facts, "headlines": HEADLINES, "tables": TABLES, **results}
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {os.path.relpath(path)}")
    return path


def main() -> None:
    """Prints the machine and its peak."""
    args = parser(__doc__).parse_args()
    prepare(args)
    device = default_device()
    announce(machine(device))
    rows = [(name, matrix_product_peak(dtype, device) / 1e12) for name, dtype in DTYPES.items() if _worth(name, device)]
    show("matrix-product peak", ("format", "TFLOP/s"), rows)


def _worth(name: str, device: torch.device) -> bool:
    return device.type == "cuda" or name != "fp16"  # few CPUs compute in float16


if __name__ == "__main__":
    main()
