"""A folder of photographs classified by `beit predict` and embedded by `beit features`, beside timm and transformers.

    python benchmarks/predict.py                    512 photographs, ViT-B/16, float32 and bf16
    python benchmarks/predict.py --quick            small, to see that it runs

Every contender opens its model, of the same weights, and the files, and is done when it has an answer for each. The
peers are what a user writes with timm: a loop over batches of 32, and the same with a DataLoader's workers; and
transformers' pipeline in batches of 32.
"""

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from input_pipeline import make_photographs
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
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import pipeline

from beit.checkpoints.export import convert
from beit.commands import features, predict
from beit.commands.settings import FeaturesConfig, PredictConfig
from beit.storage import save_checkpoint
from beit.zoo import create_model

GOAL = 1.2
BATCH, CLASSES = 32, 1000
OURS = {"float32": "fp32", "bf16": "bf16"}  # as --amp_dtype spells them


class Photographs(Dataset[Tensor]):
    """Image files as timm's transform makes them."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor:
        with Image.open(self.paths[number]) as image:
            return self.transform(image.convert("RGB"))


class Contenders:
    """All ways to classify or embed the photographs of a folder.

    Args:
        folder: Where the photographs and the models are, and the features go.
        device: Where to compute.
        precision: One of :data:`measure.DTYPES`.
        workers: Processes of the DataLoader.
    """

    def __init__(self, folder: Path, device: torch.device, precision: str, workers: int) -> None:
        self.folder, self.device, self.precision, self.workers = folder, device, precision, workers
        self.paths = sorted((folder / "photographs").iterdir())

    def ours(self) -> list[int]:
        """Returns the classes that `beit predict` writes."""
        settings = {"images": (str(self.folder / "photographs"),), "json": True, **self._common}
        with contextlib.redirect_stdout(io.StringIO()) as told:
            predict.main(PredictConfig(**settings))
        return [json.loads(line)["class"] for line in told.getvalue().splitlines()]

    def our_features(self) -> np.ndarray:
        """Returns the features that `beit features` writes."""
        output = self.folder / "features.npz"
        features.main(FeaturesConfig(data_path=str(self.folder / "photographs"), output=str(output), **self._common))
        with np.load(output) as found:
            return found["features"]

    @property
    def _common(self) -> dict[str, Any]:
        checkpoint, device = str(self.folder / "model.pth"), str(self.device)
        return {"checkpoint": checkpoint, "device": device, "amp_dtype": OURS[self.precision]}

    def timm(self, *, workers: int = 0) -> list[int]:
        """Returns the classes that timm's model finds."""
        model, batches = self._timm(workers)
        return [number for batch in batches for number in self._run(model, batch).argmax(dim=1).tolist()]

    def timm_features(self, *, workers: int = 0) -> np.ndarray:
        """Returns the mean patch tokens of the last block of timm's model."""
        model, batches = self._timm(workers)
        last = partial(model.forward_intermediates, indices=1, output_fmt="NLC", intermediates_only=True)
        return torch.cat([self._run(last, batch)[0].float().mean(dim=1).cpu() for batch in batches]).numpy()

    def _timm(self, workers: int) -> tuple[nn.Module, Iterable[Tensor]]:
        model = timm.create_model(f"local-dir:{self.folder / 'timm'}", pretrained=True).eval().to(self.device)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        return model, DataLoader(Photographs(self.paths, transform), BATCH, num_workers=workers)

    def _run(self, model: Callable[[Tensor], Any], batch: Tensor) -> Any:
        lower = self.precision != "float32"
        with torch.inference_mode(), torch.autocast(self.device.type, DTYPES[self.precision], enabled=lower):
            return model(batch.to(self.device))

    def transformers(self) -> list[int]:
        """Returns the classes that transformers' pipeline finds."""
        where = {"model": str(self.folder / "huggingface"), "device": self.device, "dtype": DTYPES[self.precision]}
        classify = pipeline("image-classification", **where)
        found = classify([str(path) for path in self.paths], batch_size=BATCH, top_k=1)
        return [classify.model.config.label2id[first["label"]] for (first,) in found]

    def named(self) -> dict[str, Callable[[], Any]]:
        """Returns all of them by name."""
        loop, loaded = "timm, batches of 32", f"timm, {self.workers} workers"
        return {
            loop: self.timm,
            loaded: partial(self.timm, workers=self.workers),
            "transformers' pipeline": self.transformers,
            "beit predict": self.ours,
            f"{loop}: features": self.timm_features,
            f"{loaded}: features": partial(self.timm_features, workers=self.workers),
            "beit features": self.our_features,
        }


def make_models(folder: Path, quick: bool) -> None:
    """Writes the same weights for this library, timm and transformers."""
    torch.manual_seed(0)
    sizes = {"depth": 1} if quick else {}
    model = create_model("beit_base_patch16_224", num_classes=CLASSES, **sizes)
    nn.init.normal_(model.head.weight, std=0.3)  # a fresh head answers nearly the same for all images
    save_checkpoint(folder / "model.pth", {"model": model.state_dict()})
    for name in ("timm", "huggingface"):
        convert(folder / "model.pth", folder / name, name)


def compare(contenders: Contenders, repeats: int) -> dict[str, Any]:
    """Times all contenders in one number format and prints what was found."""
    named, count = contenders.named(), len(contenders.paths)
    first, ours = np.asarray(contenders.timm()), np.asarray(contenders.ours())
    alike = float((first == ours).mean())
    times = interleave({name: lambda run=run: (run(), None)[1] for name, run in named.items()}, repeats, warmups=0)
    seconds = {name: parts["whole"] for name, parts in medians(times).items()}
    ratios = {}
    for name, suffix in (("beit predict", ""), ("beit features", ": features")):
        ratios[name] = seconds[f"timm, batches of 32{suffix}"] / seconds[name]
        headline(f"`{name}` against timm in batches of {BATCH}, {contenders.precision}", ratios[name], GOAL)
    rows = [(name, f"{second:.2f}", f"{count / second:.1f}") for name, second in seconds.items()]
    show(f"{count} photographs of 500 x 375, {contenders.precision}", ("", "s", "images/s"), rows)
    print(f"timm and beit predict find the same class for {alike:.1%} of them")
    return {"ratio": ratios, "seconds": times, "same_class": alike}


def main() -> None:
    """Runs the benchmark."""
    made = parser(__doc__, repeats=3)
    made.add_argument("--images", type=int, default=512, help="photographs (512)")
    made.add_argument("--precision", nargs="+", choices=[*OURS], default=[*OURS])
    made.add_argument("--workers", type=int, default=2, help="processes of timm's loader in its second row (2)")
    args: argparse.Namespace = made.parse_args()
    prepare(args)
    if args.quick:
        args.images = 8
    device = default_device()
    facts = machine(device)
    announce(facts)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "photographs").mkdir()
        make_photographs(folder / "photographs", args.images, (500, 375))
        make_models(folder, args.quick)
        results = {
            name: compare(Contenders(folder, device, name, args.workers), args.repeats) for name in args.precision
        }
    write("predict", facts, {"images": args.images, **results}, args)


if __name__ == "__main__":
    main()
