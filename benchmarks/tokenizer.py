"""Training the tokenizer: the speed of a step beside a plain implementation, and what comes out in the same time.

    python benchmarks/tokenizer.py                                     the demo's images, 256 codes
    python benchmarks/tokenizer.py --images photographs --codes 1024 --minutes 10
    python benchmarks/tokenizer.py --quick                             small, to see that it runs

The plain implementation has the same network and Gumbel-softmax in float32 and torch's own memory format, with Adam,
as this library had it first. VQ-KD's steps are timed too, beside a plain one of timm's ViTs in float32, with codes
compared and averaged through one-hot matrices; what the teacher says is given, as it costs both the same.

The first plain implementation also sets the time: each quantiser gets what the plain implementation takes for 18,720
images (585 steps of 32, the demo's first tokenizer), or --minutes. Another row is the k-means of raw patches, no
network at all. Scores are of held-out images: PSNR of the mean squared error over all of them.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from measure import announce, headline, interleave, machine, medians, parser, prepare, show, write
from timm.models import VisionTransformer
from torch import Tensor, nn

from beit.data.datasets import ImageDataset, index_images
from beit.data.loaders import EpochLoader
from beit.data.transforms import CenterCropTransform, RandomCropTransform, to_unit_range
from beit.tasks import dvae_training
from beit.tasks.settings import DvaeConfig
from beit.tokenizers import codebook
from beit.tokenizers.dvae import DiscreteVAE, QuantizedAutoencoder, codebook_statistics, count_codes
from beit.tokenizers.vqkd import VQKD
from beit.training.optim import create_optimizer, parameter_groups
from beit.training.precision import Precision, resolve_amp_dtype
from examples.demo_runs import Demo, DemoConfig
from examples.toy_images import write_photograph_crops

GOAL = 1.5
IMAGES = 585 * 32  # that the demo's first tokenizer was trained on
CODE_DIM, PATCH = 128, 8
FORMATS = {"ours, float32": torch.float32, "ours, bf16": torch.bfloat16}
SCORES = ("psnr", "ssim", "perplexity", "used_codes")


class PlainStep:
    """The first tokenizer's training step, with nothing done for speed."""

    def __init__(self, images: Tensor, vae: DiscreteVAE) -> None:
        self.images, self.vae = images, vae
        self.optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)

    def __call__(self) -> None:
        """Does one step."""
        logits = self.vae(self.images)
        decoded = self.vae.decode_relaxed(F.gumbel_softmax(logits, tau=0.5, dim=1))
        posterior = logits.log_softmax(dim=1)
        kl = (posterior.exp() * (posterior + math.log(logits.shape[1]))).sum(dim=(1, 2, 3)).mean()
        loss = F.mse_loss(decoded, self.images) + 0.1 * kl / self.images[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class OurStep:
    """The library's step with its defaults."""

    def __init__(self, images: Tensor, vae: DiscreteVAE) -> None:
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.model = QuantizedAutoencoder(vae.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        self.optimizer = create_optimizer(DvaeConfig.opt, parameter_groups(self.model, 1e-4), lr=4e-3, fused=True)
        cpu = torch.device("cpu")
        self.precision = Precision(resolve_amp_dtype("auto", cpu, bf16_cpu=True), cpu)

    def __call__(self) -> None:
        """Does one step."""
        with self.precision.autocast():
            result = self.model(self.images)
            loss = F.mse_loss(result.images.float(), self.images) + result.penalty
        self.precision.backward(loss)
        self.precision.step(self.optimizer, self.model.parameters(), 1.0)


class PlainVqkdStep:
    """A training step of VQ-KD, with nothing done for speed."""

    def __init__(self, images: Tensor, target: Tensor, codes: int, vit: dict[str, int]) -> None:
        self.images, self.target = images, target
        same = {name: vit[name] for name in ("embed_dim", "num_heads")} | {"num_classes": 0, "global_pool": ""}
        size, patch, width = vit["img_size"], vit["patch_size"], vit["embed_dim"]
        coder = VisionTransformer(size, patch, depth=vit["depth"], **same)
        decoder = VisionTransformer(size // patch, 1, CODE_DIM, depth=vit["decoder_depth"], **same)
        self.codes = F.normalize(torch.randn(codes, CODE_DIM), dim=1)
        heads = [
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs))
            for outputs in (CODE_DIM, target.shape[2])
        ]
        self.parts = nn.ModuleList([coder, heads[0], decoder, heads[1]])
        self.optimizer = torch.optim.AdamW(self.parts.parameters(), lr=5e-5)

    def __call__(self) -> None:
        """Does one step."""
        coder, to_codes, decoder, to_target = self.parts
        vectors = F.normalize(to_codes(coder(self.images)[:, 1:]), dim=-1)
        chosen = F.one_hot(torch.cdist(vectors.detach(), self.codes[None]).argmin(dim=-1), len(self.codes)).float()
        codes = chosen @ self.codes
        passed = rearrange(
            vectors + (codes - vectors).detach(), "b (h w) d -> b d h w", h=decoder.patch_embed.grid_size[0]
        )
        predicted = to_target(decoder(passed)[:, 1:])
        loss = 1 - F.cosine_similarity(predicted, self.target, dim=-1).mean() + F.mse_loss(vectors, codes)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        flat = chosen.flatten(0, 1)
        means = F.normalize(flat.T @ vectors.detach().flatten(0, 1), dim=1)
        moved = F.normalize(0.99 * self.codes + 0.01 * means, dim=1)
        self.codes = torch.where(flat.sum(dim=0).unsqueeze(1) > 0, moved, self.codes)


class OurVqkdStep:
    """The library's step of VQ-KD in a number format."""

    def __init__(self, images: Tensor, target: Tensor, codes: int, vit: dict[str, int], dtype: torch.dtype) -> None:
        self.images, self.target = images / 2 + 0.5, target  # which VQ-KD normalises itself
        self.model = VQKD(codebook_size=codes, codebook_dim=CODE_DIM, decoder_out_dim=target.shape[2], **vit)
        groups = parameter_groups(self.model, 1e-4, no_decay=self.model.no_weight_decay())
        self.optimizer = create_optimizer("adamw", groups, lr=5e-5, fused=True)
        self.precision = Precision(dtype, torch.device("cpu"))

    def __call__(self) -> None:
        """Does one step."""
        with self.precision.autocast():
            features, quantized = self.model(self.images)
        cosine = F.cosine_similarity(features.float(), self.target, dim=-1).mean()
        self.model.update(quantized.vectors.flatten(0, 1), quantized.ids.flatten())
        self.precision.backward(1 - cosine + quantized.commitment)
        self.precision.step(self.optimizer, self.model.parameters(), None)


def vqkd_steps(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """Times a training step of VQ-KD and prints what was found."""
    vit = {"embed_dim": 384, "num_heads": 6, "depth": 1 if args.quick else 6, "decoder_depth": 1}
    vit |= {"img_size": size, "patch_size": PATCH}
    images = torch.rand(args.batch_size, 3, size, size) * 2 - 1
    target = torch.randn(args.batch_size, (size // PATCH) ** 2, 512)
    ours = {name: OurVqkdStep(images, target, args.codes, vit, dtype) for name, dtype in FORMATS.items()}
    times = interleave({"plain": PlainVqkdStep(images, target, args.codes, vit), **ours}, args.repeats, warmups=2)
    seconds = {name: parts["whole"] for name, parts in medians(times).items()}
    for name in FORMATS:
        headline(f"a training step of VQ-KD against a plain one in float32, {name}", seconds["plain"] / seconds[name])
    rows = [(name, second, args.batch_size / second) for name, second in seconds.items()]
    show(f"a training step of VQ-KD, {args.batch_size} images", ("", "s", "images/s"), rows)
    return times


def raw_patches(training: str, held_out: str, codes: int, size: int) -> dict[str, float]:
    """Returns the scores of the k-means of raw patches: 10 iterations on 64 patches of each of 2048 crops."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    def patches(images: Tensor) -> Tensor:
        return F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)

    crops = ImageDataset(index_images(training), RandomCropTransform(size, interpolation="lanczos", scale=(0.3, 1)), 0)
    loader = EpochLoader(crops, batch_size=64, seed=0)
    batches = [to_unit_range(batch["image"]) for _, batch in zip(range(32), loader.epoch(0), strict=False)]
    vectors = torch.cat([patches(images) for images in batches]).flatten(0, 1)
    means, _ = codebook.kmeans(vectors, codebook.draw(vectors, codes))
    views = ImageDataset(index_images(held_out), CenterCropTransform(size, interpolation="lanczos"), 0)
    error, similarity, counts, total = 0.0, 0.0, torch.zeros(codes, dtype=torch.int64), len(views)
    for batch in EpochLoader(views, batch_size=64, seed=0, shuffle=False, drop_last=False).epoch(0):
        images = to_unit_range(batch["image"])
        ids = codebook.nearest(patches(images).flatten(0, 1), means)
        drawn = F.fold(means[ids].view(len(images), -1, means.shape[1]).mT, size, PATCH, stride=PATCH)
        error += (drawn - images).square().mean().item() * len(images) / total
        similarity += structural_similarity_index_measure(drawn, images, data_range=1.0).item() * len(images) / total
        counts += count_codes(ids, codes)
    statistics = codebook_statistics(counts)
    psnr = -10 * math.log10(error)
    return {"psnr": psnr, "ssim": similarity, "perplexity": statistics.perplexity, "used_codes": statistics.used}


def trained(
    folder: Path, epochs: int, args: argparse.Namespace, data: dict[str, Any], **settings: Any
) -> dict[str, float]:
    """Trains a tokenizer with the library's job and returns its scores."""
    common = {"codebook_size": args.codes, "codebook_dim": CODE_DIM, "hidden_dim": args.hidden_dim, "min_crop": 0.3}
    rest = {"batch_size": args.batch_size, "warmup_steps": 20, "device": "cpu", "num_workers": 0, "pin_mem": False}
    run = {
        "epochs": epochs,
        "eval_freq": epochs,
        "save_ckpt_freq": epochs,
        "seed": args.seed,
        "output_dir": str(folder),
    }
    dvae_training.main(DvaeConfig(**{**data, **common, **rest, **run, **settings}))
    last = json.loads((folder / "log.txt").read_text(encoding="utf-8").splitlines()[-1])
    return {key: last[f"test_{key}"] for key in SCORES}


def make_images(kind: str, folder: Path, quick: bool) -> dict[str, Any]:
    """Makes the images and returns where they are and their size."""
    if kind == "photographs":
        numbers = (64, 16) if quick else (6000, 480)
        for name, number in zip(("train", "held_out"), numbers, strict=True):
            write_photograph_crops(folder / name, number, 160, 0, held_out=name == "held_out")
        return {"data_path": str(folder / "train"), "eval_data_path": str(folder / "held_out"), "input_size": 112}
    demo = Demo(DemoConfig(output_dir=str(folder), quick=quick))
    demo.make_images()
    settings = demo.tokenizer()
    return {name: getattr(settings, name) for name in ("data_path", "eval_data_path", "input_size")}


def main() -> None:
    """Times a step of each, then trains with either quantiser for the same time."""
    command = parser(__doc__)
    command.add_argument("--images", choices=["demo", "photographs"], default="demo", help="what is trained on")
    command.add_argument("--codes", type=int, default=256, help="size of the vocabulary (256)")
    command.add_argument("--hidden_dim", type=int, default=32, help="channels of both networks (32)")
    command.add_argument("--batch_size", type=int, default=16, help="images of a step (16)")
    command.add_argument("--minutes", type=float, default=0, help="training time of each; by default the first one's")
    command.add_argument("--seed", type=int, default=0, help="seed of the trainings (0)")
    command.add_argument("--keep", type=Path, help="folder for images, tokenizers and pictures; by default a temporary")
    args = command.parse_args()
    prepare(args)
    facts = machine()
    announce(facts)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        data = make_images(args.images, folder, args.quick)
        size = data["input_size"]
        images = torch.rand(args.batch_size, 3, size, size) * 2 - 1
        sizes = (size, args.codes, CODE_DIM, 3, args.hidden_dim)
        steps = {"plain": PlainStep(images, DiscreteVAE(*sizes)), "ours": OurStep(images, DiscreteVAE(*sizes))}
        times = interleave(steps, args.repeats, warmups=2)
        seconds = {name: parts["whole"] for name, parts in medians(times).items()}
        headline("a training step against the plain implementation", seconds["plain"] / seconds["ours"], GOAL)
        rate = [(name, second, args.batch_size / second / facts["threads"]) for name, second in seconds.items()]
        show(f"a training step of {args.batch_size} images", ("", "s", "images/s a core"), rate)
        vqkd_times = vqkd_steps(args, size)

        epoch = len(index_images(data["data_path"])) // args.batch_size
        limit = 60 * args.minutes or IMAGES / args.batch_size * seconds["plain"]
        epochs = {name: 1 if args.quick else max(1, round(limit / second / epoch)) for name, second in seconds.items()}
        old = {"quantizer": "gumbel", "opt": "adamw", "lr": 3e-3, "amp_dtype": "fp32"}
        scores: dict[str, dict[str, float]] = {
            "k-means of raw patches": raw_patches(data["data_path"], data["eval_data_path"], args.codes, size),
            "gumbel, AdamW, float32": trained(folder / "plain", epochs["plain"], args, data, **old),
            "gumbel": trained(folder / "gumbel", epochs["ours"], args, data, quantizer="gumbel"),
            "vq": trained(folder / "vq", epochs["ours"], args, data),
        }
    gain = scores["vq"]["psnr"] - scores["gumbel, AdamW, float32"]["psnr"]
    if not args.quick:
        print(f"{gain:+.2f} dB PSNR in the same {limit / 60:.1f} minutes, vq against the first tokenizer")
    rows = [(name, *(round(score[key], 2) for key in SCORES)) for name, score in scores.items()]
    show(f"{args.images}, {args.codes} codes", ("", "PSNR (dB)", "SSIM", "perplexity", "codes in use"), rows)
    results = {"times": times, "vqkd_times": vqkd_times, "scores": scores, "minutes": limit / 60}
    write(f"tokenizer-{args.images}-{args.codes}", facts, results, args)


if __name__ == "__main__":
    main()
