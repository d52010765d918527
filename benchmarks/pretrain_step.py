"""One step of BEiT pre-training, against the usual composition: transformers' BEiT and OpenAI's encoder, eager.

    python benchmarks/pretrain_step.py                      ViT-B/16, full DALL-E encoder, batch 8, all contenders
    python benchmarks/pretrain_step.py --precision bf16     under bf16 autocast alone
    python benchmarks/pretrain_step.py --no_compile         without the compiled contender, which takes minutes to begin
    python benchmarks/pretrain_step.py --quick              small, to see that it runs

A step is what a run does with a batch on the device: uint8 views to tokens of the masked patches, forward, loss,
backward, gradient norm, AdamW. OpenAI's package (DALL-E 0.1) is read from the environment's folder `peers`, where
`make test` puts it. Weights are random: time does not depend on them. Whether ids stay equal does, so the share of
equal ids is measured a second time with a trained tokenizer where one is given (`--dvae FOLDER`, such as the demo's).
"""

import argparse
import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
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
    peak_memory,
    prepare,
    show,
    write,
)
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from beit.data.preprocessing import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from beit.data.transforms import normalize, to_unit_range
from beit.masking import BlockwiseMaskGenerator
from beit.targets import TokenTarget
from beit.tasks.pretraining import MaskedPrediction, with_patch_index
from beit.tokenizers.base import VisualTokenizer, load_tokenizer
from beit.tokenizers.dalle import DallETokenizer
from beit.training.optim import create_optimizer, parameter_groups
from beit.training.precision import Precision
from beit.zoo import create_model
from dall_e import Encoder

PEERS = Path(sys.prefix) / "peers"
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "camera.png")
COMPILED = "ours, compiled"
GOALS = {"float32": (1.3, 1.4), "bf16": (1.45, 1.5), "bf16, AMX": (2.1, 2.7)}  # eager and compiled
LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 1.5e-3, (0.9, 0.999), 1e-8, 0.05, 3.0

Step = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Sizes:
    """What is trained, on how much."""

    batch: int = 8
    image: int = 224
    embed_dim: int = 768
    depth: int = 12
    heads: int = 12
    layer_scale: float = 0.1
    encoder_width: int = 256
    encoder_blocks: int = 2
    vocabulary: int = 8192
    masked: float = 75 / 196


MODELS = {
    "small": Sizes(
        batch=2, image=64, embed_dim=64, depth=2, heads=2, encoder_width=64, encoder_blocks=1, vocabulary=512
    ),
    "base": Sizes(),
    "large": Sizes(embed_dim=1024, depth=24, heads=16, layer_scale=1e-5),
}


# --------------------------------------------------------------------------------------------------------------- data
def make_batch(sizes: Sizes, device: torch.device, padded: bool = False) -> dict[str, Tensor]:
    """Returns views of random pixels with blockwise masks, prepared as the training loop does it."""
    side, rng = sizes.image // 16, np.random.default_rng(0)
    most = round(sizes.masked * side**2)
    masks = BlockwiseMaskGenerator((side, side), num_mask_patches=most, min_num_patches=4)
    generator = torch.Generator().manual_seed(0)
    image, second = (
        torch.randint(256, (sizes.batch, 3, size, size), dtype=torch.uint8, generator=generator)
        for size in (sizes.image, sizes.image // 2)
    )
    mask = torch.from_numpy(np.stack([masks(rng) for _ in range(sizes.batch)]))
    room = sizes.batch * most if padded else 0  # as --compile has it
    batch = with_patch_index({"image": image, "token_image": second, "mask": mask}, room=room)
    return {name: value.to(device) for name, value in batch.items()}


def photographs(size: int) -> Tensor:
    """Returns the middle of scikit-image's photographs, uint8 ``(6, 3, size, size)``."""
    folder = Path(importlib.import_module("skimage.data").__file__).parent
    views = []
    for name in PHOTOGRAPHS:
        with Image.open(folder / name) as file:
            image = file.convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        view = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        views.append(torch.from_numpy(np.array(view)).permute(2, 0, 1))
    return torch.stack(views)


# ---------------------------------------------------------------------------------------------------- the usual way
@contextlib.contextmanager
def openai_package() -> Iterator[Any]:
    """Inside, `dall_e` is OpenAI's package, which has the name of ours."""

    def named_so(name: str) -> bool:
        return name == "dall_e" or name.startswith("dall_e.")

    if not (PEERS / "dall_e").is_dir():
        raise SystemExit(f"OpenAI's package is not in {PEERS}: `make test` puts it there, or pip install --target")
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if named_so(name)}
    sys.path.insert(0, str(PEERS))
    try:
        yield importlib.import_module("dall_e")
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if named_so(name)]:
            del sys.modules[name]
        sys.modules.update(kept)


def openai_encoder(sizes: Sizes, weights: dict[str, Tensor], device: torch.device) -> tuple[nn.Module, Callable]:
    """Returns OpenAI's encoder with our random weights, and its ``map_pixels``."""
    with openai_package() as package:
        encoder = package.Encoder(
            n_hid=sizes.encoder_width, n_blk_per_group=sizes.encoder_blocks, vocab_size=sizes.vocabulary, device=device
        )
        encoder.load_state_dict(weights)
        return encoder.eval(), package.map_pixels


def transformers_beit(sizes: Sizes) -> nn.Module:
    """Returns transformers' BEiT for masked image modeling, at the published settings."""
    from transformers import BeitConfig, BeitForMaskedImageModeling

    config = BeitConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.embed_dim,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.embed_dim,
        image_size=sizes.image,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
        layer_scale_init_value=sizes.layer_scale,
        drop_path_rate=0.1,
    )
    return BeitForMaskedImageModeling(config).train()


class Usual:
    """The usual composition: all logits of the encoder, all predictions of the model, torch's own AdamW."""

    def __init__(self, sizes: Sizes, weights: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        let_biases_learn()
        self.encoder, self.map_pixels = openai_encoder(sizes, weights, device)
        self.model = transformers_beit(sizes).to(device)
        self.device, self.dtype, self.batch = device, dtype, make_batch(sizes, device)
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for _, p in named if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
        self.ids = torch.empty(0)

    def tokens(self, images: Tensor) -> Tensor:
        """Returns all tokens of uint8 images, ``(B, h, w)``."""
        with torch.no_grad():
            return self.encoder(self.map_pixels(to_unit_range(images))).argmax(dim=1)

    def __call__(self) -> dict[str, float]:
        """Does one step; returns the seconds of its parts."""
        stages, batch = Stages(self.device), self.batch
        mask = batch["mask"].flatten(1)
        with stages("tokenizer"):
            labels = self.ids = self.tokens(batch["token_image"]).flatten(1)[mask]
        half = self.dtype != torch.float32
        with stages("forward and backward"):
            with torch.autocast(self.device.type, dtype=self.dtype if half else None, enabled=half):
                images = normalize(batch["image"], IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
                loss = self.model(images, bool_masked_pos=mask, labels=labels).loss
            loss.backward()
        with stages("optimizer"):
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return stages.seconds


# ------------------------------------------------------------------------------------------------------------ our way
class Ours:
    """The step of `run_beit_pretraining.py`: its objective, its optimizer, its tokenizer."""

    def __init__(
        self,
        sizes: Sizes,
        weights: dict[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        compiled: bool = False,
    ) -> None:
        half = torch.float16 if device.type == "cuda" else torch.bfloat16  # as `--tokenizer_dtype auto` chooses
        of_tokenizer = dtype if dtype == torch.float32 else half
        self.tokenizer = dall_e_tokenizer(sizes, weights, of_tokenizer, compiled).to(device)
        target = TokenTarget(self.tokenizer)
        self.model = create_model(
            "beit_base_patch16_224_8k_vocab",
            img_size=sizes.image,
            vocab_size=sizes.vocabulary,
            embed_dim=sizes.embed_dim,
            depth=sizes.depth,
            num_heads=sizes.heads,
            init_values=sizes.layer_scale,
            drop_path_rate=0.1,
        ).to(device)
        if compiled:
            self.model.compile(dynamic=False)
        self.device, self.batch = device, make_batch(sizes, device, padded=compiled)
        self.objective = MaskedPrediction(target, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
        self.precision = Precision(dtype, device)
        groups = parameter_groups(self.model, WEIGHT_DECAY, no_decay=self.model.no_weight_decay())
        self.optimizer = create_optimizer("adamw", groups, lr=LR, betas=BETAS, eps=EPS, fused=True)
        self.ids = torch.empty(0)
        self._tokens_of, self._stages = target.compute, Stages(device)
        target.compute = self._timed_tokens  # type: ignore[method-assign]

    def _timed_tokens(self, batch: Any, index: Tensor) -> Tensor:
        with self._stages("tokenizer"):
            self.ids = self._tokens_of(batch, index)
        return self.ids

    def __call__(self) -> dict[str, float]:
        """Does one step; returns the seconds of its parts."""
        self._stages = stages = Stages(self.device)
        with stages("forward and backward"):
            with self.precision.autocast():
                loss, _ = self.objective(self.model, self.batch, 0)
            self.precision.backward(loss)
        stages.seconds["forward and backward"] -= stages.seconds["tokenizer"]
        with stages("optimizer"):
            self.precision.step(self.optimizer, self.model.parameters(), CLIP)
        return stages.seconds


def dall_e_tokenizer(
    sizes: Sizes, weights: dict[str, Tensor], dtype: torch.dtype, compiled: bool = False
) -> VisualTokenizer:
    """Returns our tokenizer over an encoder with these weights."""
    encoder = Encoder(sizes.encoder_width, sizes.encoder_blocks, vocab_size=sizes.vocabulary)
    encoder.load_state_dict(weights)
    return DallETokenizer(encoder, _no_decoder, dtype, compiled)


def _no_decoder() -> Any:
    raise AssertionError("a training step decodes nothing")


def random_weights(sizes: Sizes) -> dict[str, Tensor]:
    """Returns weights for the encoder."""
    torch.manual_seed(0)
    return Encoder(sizes.encoder_width, sizes.encoder_blocks, vocab_size=sizes.vocabulary).state_dict()


# -------------------------------------------------------------------------------------------------------- what counts
def contenders(args: argparse.Namespace, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Callable]:
    """Returns what is compared, yet to be built."""
    weights = random_weights(sizes)
    made: dict[str, Callable] = {
        "usual": partial(Usual, sizes, weights, dtype, device),
        "ours": partial(Ours, sizes, weights, dtype, device),
    }
    if args.compile:
        made[COMPILED] = partial(Ours, sizes, weights, dtype, device, compiled=True)
    return made


def operations(step: Step) -> int:
    """Returns the floating-point operations of an eager step, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def equal_ids(sizes: Sizes, dtypes: dict[str, torch.dtype], dvae: Path | None, device: torch.device) -> dict[str, Any]:
    """Returns the shares of ids on photographs that number formats leave as they are published, or in float32."""
    images = to_unit_range(photographs(sizes.image // 2)).to(device)
    weights = random_weights(sizes)
    encoder, map_pixels = openai_encoder(sizes, weights, device)
    with torch.no_grad():
        expected = encoder(map_pixels(images)).argmax(dim=1)
    shares: dict[str, Any] = {
        f"DALL-E, random weights, {name}": share(dall_e_tokenizer(sizes, weights, dtype).to(device), images, expected)
        for name, dtype in dtypes.items()
    }
    if dvae is None:
        return shares
    expected = load_tokenizer(dvae, "customized", device).encode(images)
    for name, dtype in dtypes.items():
        half = load_tokenizer(dvae, "customized", device, dtype)
        shares[f"trained dVAE of {half.vocab_size} tokens, {name}"] = share(half, images, expected)
    return shares


def share(tokenizer: VisualTokenizer, images: Tensor, expected: Tensor) -> float:
    """Returns how many of the ids are those expected."""
    return (tokenizer.encode(images) == expected).float().mean().item()


def memory_of(args: argparse.Namespace, name: str, precision: str) -> float:
    """Returns the most memory that a process of its own held in two steps of a contender, in GiB."""
    command = [sys.executable, __file__, "--model", args.model, "--precision", precision, "--memory_of", name]
    command += ["--batch_size", str(args.batch_size), "--input_size", str(args.input_size)]
    command += ["--threads", str(torch.get_num_threads())]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def report_memory(args: argparse.Namespace, sizes: Sizes, device: torch.device) -> None:
    """Does two steps of one contender and prints the most memory held; called in a process of its own."""
    step = contenders(args, sizes, DTYPES[args.precision[0]], device)[args.memory_of]()
    for _ in range(2):
        step()
    print(peak_memory(device) / 2**30)


def compare(args: argparse.Namespace, sizes: Sizes, precision: str, device: torch.device) -> dict[str, Any]:
    """Times all contenders in one number format and prints what was found."""
    dtype = DTYPES[precision]
    steps = {name: build() for name, build in contenders(args, sizes, dtype, device).items()}
    flops = {name: operations(step) for name, step in steps.items() if name != COMPILED}  # warms them up as well
    if COMPILED in steps:
        steps[COMPILED]()
        flops[COMPILED] = flops["ours"]
    peak = matrix_product_peak(dtype, device)
    times = interleave(steps, args.repeats, warmups=0, device=device)
    found = medians(times)
    same = {name: (step.ids == steps["usual"].ids).float().mean().item() for name, step in steps.items()}
    ratios = {name: found["usual"]["whole"] / found[name]["whole"] for name in steps if name != "usual"}
    eager, compiled = goal_of(GOALS, precision, device)
    for name, ratio in ratios.items():
        what = f"{name} against the usual composition, {precision}"
        headline(what, ratio, compiled if name == COMPILED else eager)
    weighed = ({"ours"} if args.quick else steps.keys() - {COMPILED}) if args.memory else ()
    memory = {name: memory_of(args, name, precision) for name in steps if name in weighed}
    rows = []
    for name, seconds in found.items():
        rate = flops[name] / seconds["whole"]
        parts = [f"{seconds[part]:.2f}" for part in ("tokenizer", "forward and backward", "optimizer", "whole")]
        images, tera, of_peak = sizes.batch / seconds["whole"], rate / 1e12, f"{rate / peak:.0%}"
        held = f"{memory[name]:.1f}" if name in memory else "-"
        rows.append((name, *parts, images, tera, of_peak, held, f"{same[name]:.2%}"))
    header = ("s/step", "tokenizer", "fwd+bwd", "optimizer", "whole", "images/s", "TFLOP/s", "of peak")
    show(f"{precision}, batch {sizes.batch}, {sizes.image} pixels", (*header, "GiB", "same ids"), rows)
    return {
        "ratio": ratios,
        "goal": {"ours": eager, COMPILED: compiled},
        "median_seconds": found,
        "seconds": times,
        "flops": flops,
        "matrix_product_peak_flops": peak,
        "peak_memory_gib": memory,
        "equal_ids_in_the_step": same,
    }


def main() -> None:
    """Runs the benchmark."""
    made = parser(__doc__)
    made.add_argument("--model", choices=[*MODELS], default="base")
    made.add_argument("--precision", nargs="+", choices=["float32", "bf16"], default=["float32", "bf16"])
    made.add_argument("--batch_size", type=int, default=0, help="images per step; 0 for 8 (2 with --quick)")
    made.add_argument("--input_size", type=int, default=0, help="side of the images, in pixels; 0 for 224")
    made.add_argument("--no_compile", dest="compile", action="store_false", help="leave the compiled contender out")
    made.add_argument("--no_memory", dest="memory", action="store_false", help="do not measure memory")
    made.add_argument("--memory_of", default="", help=argparse.SUPPRESS)
    made.add_argument("--dvae", type=Path, help="a trained customized tokenizer; demo/dvae where there is one")
    args = made.parse_args()
    prepare(args)
    if args.quick:
        args.model, args.compile = "small", False
    plain = MODELS[args.model]
    sizes = Sizes(**{**vars(plain), "batch": args.batch_size or plain.batch, "image": args.input_size or plain.image})
    device = default_device()
    if args.memory_of:
        return report_memory(args, sizes, device)
    if args.dvae is None and (Path("demo") / "dvae" / "pytorch_model.bin").is_file():
        args.dvae = Path("demo") / "dvae"

    facts = machine(device)
    announce(facts)
    results = {"sizes": vars(sizes), **{name: compare(args, sizes, name, device) for name in args.precision}}
    formats = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    shares = equal_ids(sizes, formats, args.dvae, device)
    show(
        "ids on photographs as in float32 as published",
        ("tokenizer", "equal"),
        [(n, f"{s:.2%}") for n, s in shares.items()],
    )
    print("Random weights say little here: few tokens win everywhere. OpenAI's trained weights: not measured.")
    if args.dvae is None:
        print("A trained tokenizer: not measured (--dvae FOLDER, such as the one that `make demo` trains).")
    if device.type != "cuda":
        print("CUDA: not measured.")
    write("pretrain_step", facts, {**results, "equal_ids_on_photographs": shares}, args)
    return None


if __name__ == "__main__":
    main()
