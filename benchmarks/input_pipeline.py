"""Images a second that one core prepares for pre-training, against the usual order of operations; files and shards.

    python benchmarks/input_pipeline.py             500 x 375 photographs; then 50,000 small images as files and shards
    python benchmarks/input_pipeline.py --quick     small, to see that it runs

The usual order is the official one: decode, jitter the whole image, flip, crop, resize twice with Pillow, turn both
views into normalised float32 tensors, stack them. Ours ends with uint8 batches, which the device normalises; a
contender that stops the usual order at uint8 too tells the two gains apart, and what the CPU would take to normalise is
a row of its own. The photographs are cut out of scikit-image's and saved as JPEG of quality 90, as large as ImageNet's
mostly are. All is done in this process, by one thread, and the files are in the page cache, so what counts is the
processor's time: what else runs on the machine disturbs it less than the clock's.
"""

import argparse
import contextlib
import importlib.util
import itertools
import logging
import pickle
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import announce, headline, interleave, machine, medians, parser, prepare, show, write
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import transforms as v1

from beit.commands.shards import write_shards
from beit.data.datasets import ImageDataset, kept_randomness, read_pixels, sample_randomness
from beit.data.index import ImageIndex, index_images
from beit.data.jitter import ViewJitter
from beit.data.loaders import EpochLoader, _Batches
from beit.data.transforms import (
    MaskedImageModelingTransform,
    cut_out,
    flip_and_box,
    normalize,
    resized,
    to_unit_range,
)
from beit.masking import BlockwiseMaskGenerator

BATCH = 32
READ = 1024  # of the small images, in each repeat
HALF = (0.5, 0.5, 0.5)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MASKS = BlockwiseMaskGenerator((14, 14), 75, 16)
NOT_MEASURED = "not measured: the package is not installed"
GOALS = {"same filters": 2.0, "second view bicubic": 3.0}


# ------------------------------------------------------------------------------------------------------- the images
def make_photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Writes ``count`` JPEG photographs of ``(width, height)``, parts of those that come with scikit-image."""
    from skimage import data

    sources = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), data.stereo_motorcycle()[0]]
    rng = np.random.default_rng(0)
    for number in range(count):
        source = Image.fromarray(sources[number % len(sources)])
        zoom = rng.uniform(0.6, 1) * min(source.width / size[0], source.height / size[1])
        width, height = int(size[0] * zoom), int(size[1] * zoom)
        left, top = int(rng.integers(source.width - width + 1)), int(rng.integers(source.height - height + 1))
        part = source.crop((left, top, left + width, top + height))
        part.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:03d}.jpg", quality=90)


def make_small_images(folder: Path, count: int) -> None:
    """Writes ``count`` JPEG images of 32 x 32 pixels in folders of a thousand; contents repeat after 500."""
    rng = np.random.default_rng(0)
    make_photographs(folder, 1, (500, 375))
    photograph = Image.open(folder / "000.jpg")
    photograph.load()
    (folder / "000.jpg").unlink()
    contents = []
    for _ in range(500):
        left, top = (int(rng.integers(side - 64)) for side in photograph.size)
        photograph.crop((left, top, left + 64, top + 64)).resize((32, 32)).save(folder / "one.jpg")
        contents.append((folder / "one.jpg").read_bytes())
    (folder / "one.jpg").unlink()
    for number in range(count):
        path = folder / f"{number // 1000:04d}" / f"{number:08d}.jpg"
        if number % 1000 == 0:
            path.parent.mkdir()
        path.write_bytes(contents[number % 500])


# ------------------------------------------------------------------------------------------------------- contenders
def usual_order(
    paths: list[str], *, normalised: bool = True, second: str = "lanczos", stages: "Stages | None" = None
) -> None:
    """Prepares images in the order of the official code, with torchvision and Pillow."""
    jitter, flip = v1.ColorJitter(0.4, 0.4, 0.4), v1.RandomHorizontalFlip()
    filters = [(224, Image.Resampling.BICUBIC), (112, getattr(Image.Resampling, second.upper()))]
    float_of = (v1.Compose([v1.ToTensor(), v1.Normalize(HALF, HALF)]), v1.ToTensor())
    timed = stages or _untimed
    for start in range(0, len(paths), BATCH):
        samples = []
        for path in paths[start : start + BATCH]:
            with timed("decode"), open(path, "rb") as file:
                image = Image.open(file).convert("RGB")
            with timed("jitter"):
                image = jitter(image)
            with timed("flip and crop"):
                image = flip(image)
                top, left, height, width = v1.RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
                region = image.crop((left, top, left + width, top + height))
            views = []
            for (size, how), to_float, name in zip(filters, float_of, ("resize 224", "resize 112"), strict=True):
                with timed(name):
                    view = region.resize((size, size), how)
                with timed("to tensors"):
                    views.append(to_float(view) if normalised else v1.functional.pil_to_tensor(view))
            with timed("mask"):
                mask = MASKS(np.random.default_rng(random.getrandbits(32)))
            samples.append({"image": views[0], "token_image": views[1], "mask": torch.from_numpy(mask)})
        with timed("stack"):
            default_collate(samples)


def ours(index: ImageIndex, *, second: str = "lanczos", fast_decode: bool = False) -> None:
    """Prepares images as a worker process does."""
    transform = MaskedImageModelingTransform(second_interpolation=second, mask_generator=MASKS)
    batches = _Batches(ImageDataset(index, transform, seed=0, fast_decode=fast_decode))
    for start in range(0, len(index), BATCH):
        batches.__getitems__([(0, number) for number in range(start, min(start + BATCH, len(index)))])


def ours_in_stages(paths: list[str], stages: "Stages", second: str = "lanczos") -> None:
    """Prepares images as :func:`ours` does, step by step."""
    jitter = ViewJitter(0.4)
    for start in range(0, len(paths), BATCH):
        samples: list[dict[str, Tensor]] = []
        with kept_randomness():
            for number, path in enumerate(paths[start : start + BATCH], start):
                with stages("decode"):
                    image, _ = read_pixels(path)
                with stages("randomness"):
                    state = sample_randomness(0, 0, number)
                    rng = state.__enter__()
                with stages("flip and crop"):
                    flipped, box = flip_and_box((image.shape[2], image.shape[1]), SCALE, RATIO, rng)
                    region = cut_out(image, box)
                with stages("resize 224"):
                    sample = {"image": resized(region, (224, 224), "bicubic", rng)}
                with stages("resize 112"):
                    sample["token_image"] = resized(region, (112, 112), second, rng)
                with stages("jitter"):
                    sample = jitter(sample, image)
                with stages("flip and crop"):
                    sample = {name: view.flip(-1) for name, view in sample.items()} if flipped else sample
                with stages("mask"):
                    sample["mask"] = torch.from_numpy(MASKS(rng))
                with stages("randomness"):
                    state.__exit__(None, None, None)
                samples.append(sample)
        with stages("stack"):
            batch = default_collate(samples)
        with stages("(normalise, on the device)"):
            normalize(batch["image"], HALF, HALF), to_unit_range(batch["token_image"])


def _processor(run: Callable[[], object]) -> dict[str, float]:
    start = time.process_time()
    run()
    return {"processor": time.process_time() - start}


def median_seconds(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the median of each contender's processor time, in seconds."""
    timed = {name: partial(_processor, run) for name, run in contenders.items()}
    return {name: parts["processor"] for name, parts in medians(interleave(timed, repeats)).items()}


class Stages:
    """Adds up the processor's seconds in the named parts of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts what is done in the block."""
        start = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


@contextlib.contextmanager
def _untimed(_name: str) -> Iterator[None]:
    yield


def _staged(run: Callable[..., None], *arguments: Any, **options: Any) -> Mapping[str, float]:
    stages = Stages()
    run(*arguments, stages=stages, **options)
    return stages.seconds


# ------------------------------------------------------------------------------------------------------ measurements
def measure_order(folder: Path, count: int, repeats: int) -> dict[str, Any]:
    """Times whole pipelines and their stages on ``count`` photographs."""
    photographs = folder / "photographs"
    photographs.mkdir()
    make_photographs(photographs, count, (500, 375))
    index = index_images(photographs, folder / "cache")
    paths = [index.path(number) for number in range(count)]
    contenders: dict[str, Callable[[], Any]] = {
        "usual order": partial(usual_order, paths),
        "usual order, second view bicubic": partial(usual_order, paths, second="bicubic"),
        "usual order, uint8": partial(usual_order, paths, normalised=False),
        "ours": partial(ours, index),
        "ours, second view bicubic": partial(ours, index, second="bicubic"),
        "ours, bicubic, fast decode": partial(ours, index, second="bicubic", fast_decode=True),
    }
    staged: dict[str, Callable[[], Any]] = {
        "usual order": partial(_staged, usual_order, paths),
        "ours": partial(_staged, ours_in_stages, paths),
    }
    seconds = median_seconds(contenders, repeats)
    stages = medians(interleave(staged, repeats))
    usual = seconds["usual order"]
    headline("images/s per core, same filters", usual / seconds["ours"], GOALS["same filters"])
    bicubic = seconds["ours, second view bicubic"]
    headline("with --second_interpolation bicubic", usual / bicubic, GOALS["second view bicubic"])
    headline("same filters, the usual order stopping at uint8 too", seconds["usual order, uint8"] / seconds["ours"])
    rows = [(n, f"{count / s:.0f}", f"{s / count * 1e3:.2f}", f"{usual / s:.2f}x") for n, s in seconds.items()]
    show(f"{count} photographs of 500 x 375, one core", ("pipeline", "images/s", "ms/image", "ratio"), rows)
    names = list(dict.fromkeys(itertools.chain(*(parts for parts in stages.values()))))
    per_image = {name: {part: s / count * 1e3 for part, s in parts.items()} for name, parts in stages.items()}
    table = [(n, *(f"{p[n]:.3f}" if n in p else "-" for p in per_image.values())) for n in names if n != "whole"]
    show("stages, ms/image", ("stage", *per_image), table)
    return {
        "images_per_second": {name: count / s for name, s in seconds.items()},
        "ratio_to_usual_order": {name: usual / s for name, s in seconds.items()},
        "stages_ms": per_image,
    }


def measure_fast_decode(folder: Path, count: int, repeats: int) -> dict[str, Any]:
    """Times ``--fast_decode`` on larger photographs, where there is something to leave out."""
    large = folder / "large"
    large.mkdir()
    make_photographs(large, count, (2000, 1500))
    index = index_images(large, folder / "cache")
    contenders = {name: partial(ours, index, fast_decode=fast) for name, fast in (("whole", False), ("fast", True))}
    seconds = median_seconds(contenders, repeats)
    rows = [(f"decode {name}", f"{count / s:.1f}", f"{s / count * 1e3:.1f}") for name, s in seconds.items()]
    show(f"{count} photographs of 2000 x 1500, one core", ("pipeline", "images/s", "ms/image"), rows)
    return {"images_per_second": {name: count / s for name, s in seconds.items()}}


def measure_files_and_shards(folder: Path, count: int, repeats: int) -> dict[str, Any]:
    """Times listing and reading of small images as files and as shards, and weighs their indices."""
    small = folder / "small"
    small.mkdir()
    make_small_images(small, count)
    start = time.perf_counter()
    pattern = write_shards(index_images(small, folder / "no cache"), folder / "shards", 10_000)
    packing = time.perf_counter() - start
    time.sleep(2.5)  # an index of what has just changed is not kept
    sources = {"files": str(small), "shards": pattern}
    results: dict[str, dict[str, Any]] = {name: {"peak": _peak(path, folder)} for name, path in sources.items()}
    listing: dict[str, Callable[[], Any]] = {}
    for name, path in sources.items():
        listing[f"{name}, listed"] = partial(_listed_anew, path, folder)
        listing[f"{name}, kept"] = partial(index_images, path, folder / "kept")
    starts = {name: parts["whole"] for name, parts in medians(interleave(listing, repeats)).items()}  # by the clock
    indices = {name: index_images(path, folder / "kept") for name, path in sources.items()}
    reading = {name: partial(_read_some, index, min(count, READ)) for name, index in indices.items()}
    if importlib.util.find_spec("webdataset"):
        reading["webdataset"] = partial(_read_with_webdataset, pattern, min(count, READ))
    read = median_seconds(reading, repeats)
    peer = min(count, READ) / read["webdataset"] if "webdataset" in read else NOT_MEASURED
    for name, index in indices.items():
        results[name] |= {
            "images_per_second": min(count, READ) / read[name],
            "listing_seconds": starts[f"{name}, listed"],
            "start_up_seconds_with_kept_index": starts[f"{name}, kept"],
            "index_mb_per_million": len(pickle.dumps(index)) / count,
            "listing_peak_mb_per_million": results[name].pop("peak") / count,
            "resume_exact": _resumes_exactly(index),
        }
    rows = [
        (title, *(f"{results[name][key]:{form}}" if form else results[name][key] for name in sources))
        for title, key, form in (
            ("images/s, one core, 112-pixel views", "images_per_second", ".0f"),
            ("listing, s", "listing_seconds", ".2f"),
            ("start-up with the kept index, s", "start_up_seconds_with_kept_index", ".3f"),
            ("index, MB per million images", "index_mb_per_million", ".0f"),
            ("peak while listing, MB per million", "listing_peak_mb_per_million", ".0f"),
            ("resumes at any batch to the bit", "resume_exact", ""),
        )
    ]
    show(f"{count} images of 32 x 32 pixels", ("", *sources), rows)
    print(f"packing them into shards took {packing:.1f} s")
    print(
        "webdataset reads the shards, from the first image on:",
        peer if isinstance(peer, str) else f"{peer:.0f} images/s",
    )
    return {"images": count, "packing_seconds": packing, **results, "webdataset_images_per_second": peer}


def _listed_anew(path: str, folder: Path) -> ImageIndex:
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        return index_images(path, cache)


def _peak(path: str, folder: Path) -> int:
    tracemalloc.start()
    _listed_anew(path, folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def _transform() -> MaskedImageModelingTransform:
    return MaskedImageModelingTransform(112, None, mask_generator=BlockwiseMaskGenerator((7, 7), 20, 4))


def _dataset(index: ImageIndex) -> ImageDataset:
    return ImageDataset(index, _transform(), seed=0)


def _read_some(index: ImageIndex, count: int) -> None:
    loader = EpochLoader(_dataset(index), BATCH, seed=0)
    for _ in itertools.islice(loader.epoch(0), count // BATCH):
        pass


def _read_with_webdataset(pattern: str, count: int) -> None:
    # As its users read: from the beginning of a shard on, decoded by Pillow. The views are made as ours are.
    import webdataset

    transform, rng = _transform(), np.random.default_rng(0)
    images = webdataset.WebDataset(pattern, shardshuffle=False).decode("pil").to_tuple("jpg")
    samples = (transform(image, rng) for (image,) in images)
    for _ in range(count // BATCH):
        default_collate(list(itertools.islice(samples, BATCH)))


def _resumes_exactly(index: ImageIndex) -> bool:
    loader = EpochLoader(_dataset(index), BATCH, seed=0)
    first = loader.batches_per_epoch // 2
    through = next(itertools.islice(_keys(loader, 0), first, None))
    return bool(torch.equal(next(loader.epoch(0, first))["image"], _dataset_batch(loader, through)))


def _keys(loader: EpochLoader, epoch: int) -> Iterator[list[int]]:
    order = loader.order(epoch).tolist()
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def _dataset_batch(loader: EpochLoader, numbers: list[int]) -> Tensor:
    return torch.stack([loader.dataset[0, number]["image"] for number in numbers])


def main() -> None:
    """Measures, prints and writes."""
    made = parser(__doc__, repeats=9)
    made.add_argument("--images", type=int, default=60, help="photographs (60)")
    made.add_argument("--small_images", type=int, default=50_000, help="small images as files and as shards (50,000)")
    args: argparse.Namespace = made.parse_args()
    args.threads = 1
    prepare(args)
    if args.quick:
        args.images, args.small_images = 8, 400
    logging.disable(logging.INFO)
    facts = {**machine(), "seconds_are": "processor time, of listings wall clock"}
    announce(facts)
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "order_of_operations": measure_order(Path(folder), args.images, args.repeats),
            "fast_decode": measure_fast_decode(Path(folder), max(4, args.images // 6), args.repeats),
            "files_and_shards": measure_files_and_shards(Path(folder), args.small_images, args.repeats),
        }
    write("input_pipeline", facts, results, args)


if __name__ == "__main__":
    main()
