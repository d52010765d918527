"""The trainable discrete VAE (the "customized" tokenizer): model, two ways to train it, and files.

A strided convolutional encoder gives logits over ``num_tokens`` codes at every cell of a grid; a decoder turns the
codes' vectors back into the image. A token is the arg-max of the logits. How gradients pass the choice of a code:

- ``vq`` (:class:`QuantizedAutoencoder`): the code nearest to a vector, whose gradient is passed straight through.
- ``gumbel`` (:class:`RelaxedAutoencoder`), BEiT's and DALL-E's method: Gumbel noise relaxes the choice.

Source: BEiT, section 2.1 and appendix; the dVAE of DALL-E, arXiv 2102.12092, appendix A; vector quantisation: arXiv
1711.00937, its codebook of moving averages: appendix A.1 there. The loss per image of ``gumbel`` is

    reconstruction (mean over the C·H·W pixel values) + kl_weight · KL (sum over the grid, in nats) / (C·H·W),

the negative evidence lower bound per pixel value, as normalised in that paper: for 8-pixel patches of RGB images the KL
of one grid cell has weight ``kl_weight / 192``. The paper's weight of 6.6 belongs to its logit-Laplace likelihood;
squared errors of normalised pixels are much smaller and need about 0.3. Without KL few codes are used; from about 1 on
the posterior stays near the prior and the images stay blurred.
"""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.errors import InputError
from beit.storage import atomic_write, differences, load_checkpoint, read_json, require_file, save_checkpoint
from beit.tokenizers import codebook
from beit.tokenizers.base import LogitTokenizer

logger = logging.getLogger(__name__)

COLLAPSED_BELOW = 0.05  # codebook perplexity, as a share of the most it could be
OFFICIAL_SIZES = {"image_size": 112, "num_tokens": 8192, "codebook_dim": 512, "num_layers": 3, "hidden_dim": 256}
OFFICIAL_SIZES["in_chans"] = 3
ReconstructionKind = Literal["mse", "smooth_l1"]


def to_signed_range(images: Tensor) -> Tensor:
    """Maps images from [0, 1] to the model's range [-1, 1]."""
    return images * 2 - 1


def from_signed_range(images: Tensor) -> Tensor:
    """Maps images from the model's range [-1, 1] back to [0, 1], clamped."""
    return (images * 0.5 + 0.5).clamp(0, 1)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a 1×1 convolution around a skip connection; keeps the shape ``(B, channels, h, w)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, channels, h, w)`` to the same shape."""
        return x + self.net(x)


class DiscreteVAE(nn.Module):
    """A discrete VAE whose grid is ``2 ** num_layers`` times smaller than the image in each direction.

    Parameter names are those of the official "customized" checkpoints. Logits are always float32, also under autocast.

    Args:
        image_size: Side, or ``(H, W)``, of the training images, in pixels. The network is convolutional and takes any
            multiple of ``downsampling``.
        num_tokens: Size of the vocabulary.
        codebook_dim: Length of a code's vector.
        num_layers: Number of times the resolution is halved.
        hidden_dim: Channels inside the encoder and the decoder.
        in_chans: Channels of the images.

    Raises:
        InputError: A size is not positive, or an image side is not a multiple of ``2 ** num_layers``.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        num_tokens: int = 8192,
        codebook_dim: int = 512,
        num_layers: int = 3,
        hidden_dim: int = 256,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size = (height, width)
        self.num_tokens, self.codebook_dim = num_tokens, codebook_dim
        self.num_layers, self.hidden_dim, self.in_chans = num_layers, hidden_dim, in_chans
        self.downsampling = 2**num_layers
        if min(num_tokens, codebook_dim, num_layers, hidden_dim) < 1:
            raise InputError("num_tokens, codebook_dim, num_layers and hidden_dim of a dVAE must be at least 1")
        if min(self.image_size) < 1 or height % self.downsampling or width % self.downsampling:
            raise InputError(
                f"a dVAE of {num_layers} layers needs image sides that are multiples of "
                f"{self.downsampling}, not {height}×{width}"
            )
        self.codebook = nn.Embedding(num_tokens, codebook_dim)
        self.encoder = self._layers(nn.Conv2d, in_chans, num_tokens)
        self.decoder = self._layers(nn.ConvTranspose2d, codebook_dim, in_chans)
        self.apply(_initialise)
        # Long code vectors are noise to the decoder at first, which then collapses to a single code; and the first
        # posteriors must already depend on the image. So: short vectors, spread logits.
        nn.init.normal_(self.codebook.weight, std=0.1)
        nn.init.normal_(self.head.weight, std=3 / math.sqrt(hidden_dim))

    def _layers(self, resample: type[nn.Conv2d | nn.ConvTranspose2d], inputs: int, outputs: int) -> nn.Sequential:
        """Stacks the resolution steps, each a strided convolution and a residual block, and a 1×1 convolution."""
        layers: list[nn.Module] = []
        for channels in [inputs] + [self.hidden_dim] * (self.num_layers - 1):
            step = resample(channels, self.hidden_dim, 4, stride=2, padding=1)
            layers += [nn.Sequential(step, nn.ReLU()), ResidualBlock(self.hidden_dim)]
        return nn.Sequential(*layers, nn.Conv2d(self.hidden_dim, outputs, 1))

    @property
    def head(self) -> nn.Conv2d:
        """The last 1×1 convolution of the encoder, from features to logits."""
        head = self.encoder[-1]
        assert isinstance(head, nn.Conv2d)
        return head

    def sizes(self) -> dict[str, int | list[int]]:
        """The constructor's arguments, as they stand in the ``config.json`` beside the weights."""
        height, width = self.image_size
        sizes = {name: getattr(self, name) for name in OFFICIAL_SIZES}
        return sizes | {"image_size": height if height == width else [height, width]}

    def features(self, images: Tensor) -> Tensor:
        """Inputs of the head: ``(B, 3, H, W)`` in [-1, 1] → ``(B, hidden_dim, h, w)``."""
        return self.encoder[:-1](images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits over the codes: ``(B, 3, H, W)`` in [-1, 1] → float32 ``(B, num_tokens, h, w)``."""
        features = self.features(images)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float())

    def decode(self, ids: Tensor) -> Tensor:
        """Images of tokens: int64 ``(B, h, w)`` → ``(B, 3, H, W)``, about [-1, 1]."""
        return self.decoder(self.codebook(ids).permute(0, 3, 1, 2))

    def decode_relaxed(self, codes: Tensor) -> Tensor:
        """Images of mixtures of codes: weights ``(B, num_tokens, h, w)`` → ``(B, 3, H, W)``, about [-1, 1]."""
        return self.decoder(torch.einsum("bkhw,kd->bdhw", codes, self.codebook.weight))


def _initialise(module: nn.Module) -> None:
    """He initialisation; residual blocks start as the identity, with their last convolution at zero."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        # A transposed 4×4 convolution of stride 2 adds only 2×2 taps per output, and stores its inputs first.
        taps = 4 * module.in_channels if isinstance(module, nn.ConvTranspose2d) else module.weight[0].numel()
        nn.init.normal_(module.weight, std=math.sqrt(2 / taps))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, ResidualBlock):
        last = module.net[-1]  # visited before its parent, so these zeros stay
        assert isinstance(last, nn.Conv2d)
        nn.init.zeros_(last.weight)


def relaxed_codes(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Returns a Gumbel-softmax sample of codes: float32 weights ``(B, num_tokens, h, w)`` that sum to 1 over the codes.

    Source: arXiv 1611.01144; DALL-E anneals the temperature from 1 to 1/16. As there, training uses the relaxed sample
    in both passes; the arg-max is for inference. Towards a temperature of 0 the sample becomes one-hot.
    """
    with torch.autocast(logits.device.type, enabled=False):
        # -log(Exponential(1)) is Gumbel noise; exponential_ never draws 0, so it is finite.
        # In one layout whatever the logits', so that the same seed gives every cell and code the same noise.
        noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).exponential_(generator=generator)
        return ((logits.float() - noise.log()) / temperature).softmax(dim=1)


class Pass(NamedTuple):
    """A training pass through an autoencoder."""

    images: Tensor  # reconstructed, (B, 3, H, W), about [-1, 1]
    penalty: Tensor  # added to the reconstruction loss, a scalar
    metrics: dict[str, Tensor]  # further scalars to log


class RelaxedAutoencoder(nn.Module):
    """Image to relaxed codes to image: a training pass through a dVAE as one module, as data parallelism needs it."""

    def __init__(self, vae: DiscreteVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, temperature: float, kl_weight: float) -> Pass:
        """Passes images ``(B, 3, H, W)`` in [-1, 1]; the KL weight is that of the formula above, 0 leaves it out."""
        logits = self.vae(images)
        kl = kl_to_uniform(logits)
        decoded = self.vae.decode_relaxed(relaxed_codes(logits, temperature))
        metrics = {
            "kl": kl,
            "perplexity": batch_perplexity(logits.detach().argmax(dim=1), logits.shape[1]),
            # Filled in on the device: copying a number there would make the host wait.
            "temperature": torch.full((), temperature, device=images.device),
            "kl_weight": torch.full((), kl_weight, device=images.device),
        }
        return Pass(decoded, kl_weight / images[0].numel() * kl, metrics)

    def has_codes(self) -> bool:
        """Whether it is a tokenizer yet."""
        return True

    def tokenizer(self) -> DiscreteVAE:
        """Returns the dVAE."""
        return self.vae


class QuantizedAutoencoder(nn.Module):
    """Image to nearest codes to image; each code follows the mean of the vectors that it is the nearest to.

    The encoder's features are projected to ``codebook_dim``. Nothing but moving averages changes the codes, taken over
    the vectors of all processes. They start as the k-means of the vectors of one step, so the encoder should have
    learnt something before.

    Args:
        vae: The dVAE whose encoder and decoder are trained; its head and codebook are not used.
        decay: Decay of the codes' averages per step.
        commitment: Weight of the squared distance between a vector and its code.
    """

    DEAD = 1 / 20  # a code with fewer vectors, as a share of the mean, is of no use
    codes: Tensor  # (num_tokens, codebook_dim)
    counts: Tensor  # vectors per code and step, averaged, (num_tokens,)
    sums: Tensor  # the sums of these vectors, averaged
    started: Tensor  # whether there are codes, a bool scalar

    def __init__(self, vae: DiscreteVAE, decay: float = 0.95, commitment: float = 0.25) -> None:
        super().__init__()
        self.sizes, self.decay, self.commitment = vae.sizes(), decay, commitment
        self.encoder, self.decoder = vae.encoder[:-1], vae.decoder
        self.projection = nn.Conv2d(vae.hidden_dim, vae.codebook_dim, 1)
        self.register_buffer("codes", torch.zeros(vae.num_tokens, vae.codebook_dim))
        self.register_buffer("counts", torch.zeros(vae.num_tokens))
        self.register_buffer("sums", torch.zeros(vae.num_tokens, vae.codebook_dim))
        self.register_buffer("started", torch.tensor(False))
        self._started: bool | None = None  # the same, once known, without waiting for the device

    def forward(self, images: Tensor, quantized: bool = True, revive: bool = False) -> Pass:
        """Passes images ``(B, 3, H, W)`` in [-1, 1]; not ``quantized`` it is a plain autoencoder until there are codes.

        With ``revive`` the codes that are of no use move to vectors of this pass, drawn at random.
        """
        features = self.encoder(images)
        with torch.autocast(images.device.type, enabled=False):
            vectors = self.projection(features.float()).permute(0, 2, 3, 1)  # (B, h, w, D)
            penalty, unknown = vectors.new_zeros(()), vectors.new_full((), math.nan)
            metrics = {"quantization_error": unknown, "perplexity": unknown}
            if self._started is None:
                self._started = self.has_codes()
            if quantized or self._started:
                ids, codes = self._quantize(vectors.detach().flatten(0, 2), revive)
                distance = F.mse_loss(vectors, codes.view_as(vectors))
                vectors = vectors + (codes.view_as(vectors) - vectors).detach()  # the gradient passes straight through
                penalty = self.commitment * distance
                metrics = {"quantization_error": distance, "perplexity": batch_perplexity(ids, len(self.codes))}
        return Pass(self.decoder(vectors.permute(0, 3, 1, 2)), penalty, metrics)

    @torch.no_grad()
    def _quantize(self, vectors: Tensor, revive: bool) -> tuple[Tensor, Tensor]:
        """Returns ids ``(M,)`` and codes ``(M, D)`` of vectors, and in training moves the codebook afterwards."""
        if not self._started:
            self._start(vectors)
        ids = codebook.nearest(vectors, self.codes)
        chosen = self.codes[ids]
        if self.training:
            sums, counts = codebook.sums_by_code(vectors, ids, len(self.codes))
            self.sums.lerp_(sums, 1 - self.decay)
            self.counts.lerp_(counts, 1 - self.decay)
            if revive:
                self._revive(codebook.gather(vectors))
            used = self.counts.unsqueeze(1) > 0
            self.codes.copy_(torch.where(used, self.sums / self.counts.unsqueeze(1), self.codes))
        return ids, chosen

    def _start(self, vectors: Tensor) -> None:
        means, counts = codebook.kmeans(vectors, codebook.draw(codebook.gather(vectors), len(self.codes)))
        self.codes.copy_(means)
        self.counts.fill_(counts.mean())
        self.sums.copy_(means * counts.mean())
        self.started.fill_(True)
        self._started = True

    def _revive(self, vectors: Tensor) -> None:
        """Moves codes that few vectors choose to some of the vectors, with an average use to begin with."""
        mean = self.counts.mean()
        dead = self.counts < self.DEAD * mean
        drawn = codebook.draw(vectors, int(dead.sum()))
        self.counts[dead] = mean
        self.sums[dead] = drawn * mean

    def has_codes(self) -> bool:
        """Whether it is a tokenizer yet."""
        return bool(self.started)

    def tokenizer(self) -> DiscreteVAE:
        """Returns a dVAE whose arg-max is the nearest code, since −|v − e|² = 2 v·e − |e|² − |v|²."""
        with torch.device("meta"):
            vae = DiscreteVAE(**self.sizes)  # type: ignore[arg-type]
        weight, bias = self.projection.weight.detach(), self.projection.bias
        assert bias is not None
        parts = {"encoder": self.encoder, "decoder": self.decoder}
        weights = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
        head = f"encoder.{len(self.encoder)}"
        weights["codebook.weight"] = self.codes
        weights[f"{head}.weight"] = 2 * torch.einsum("kd,dcyx->kcyx", self.codes, weight)
        weights[f"{head}.bias"] = 2 * self.codes @ bias.detach() - self.codes.square().sum(dim=1)
        vae.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
        return vae.requires_grad_(False)


Autoencoder = RelaxedAutoencoder | QuantizedAutoencoder


def reconstruction_loss(images: Tensor, target: Tensor, kind: ReconstructionKind = "mse") -> Tensor:
    """Returns the mean error over all pixel values of decoded images ``(B, 3, H, W)``, about [-1, 1], in float32.

    ``smooth_l1`` is quadratic up to 1 and linear beyond.
    """
    losses = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}
    with torch.autocast(images.device.type, enabled=False):
        return losses[kind](images.float(), target.float())


def kl_to_uniform(logits: Tensor) -> Tensor:
    """Returns the KL divergence from the uniform prior to the posterior over codes, in nats, a float32 scalar.

    At each cell of the logits ``(B, num_tokens, h, w)`` it is ``log(num_tokens)`` minus the entropy of their softmax:
    never negative, zero for constant logits. It is summed over the grid and averaged over the batch.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_posterior = logits.float().log_softmax(dim=1)
        log_ratio = log_posterior + math.log(logits.shape[1])
        return (log_posterior.exp() * log_ratio).sum(dim=(1, 2, 3)).mean()


class CodebookStatistics(NamedTuple):
    """How evenly the codes are used."""

    perplexity: float  # exp of the entropy of the codes' frequencies, from 1 (one code) to the vocabulary's size
    used: int  # number of codes that occur
    dead: int  # number of codes that do not


def batch_perplexity(ids: Tensor, num_tokens: int) -> Tensor:
    """Returns exp of the entropy of the codes' shares, a scalar on the device that the host does not wait for."""
    ids = ids.flatten()  # bincount would make the host wait, to learn how many there are
    counts = torch.zeros(num_tokens, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))
    return torch.special.entr(counts / len(ids)).sum().exp()


def count_codes(ids: Tensor, num_tokens: int) -> Tensor:
    """Counts each code: int64 ids of any shape → int64 ``(num_tokens,)``, to be added up over batches."""
    return torch.bincount(ids.flatten(), minlength=num_tokens)


def codebook_statistics(counts: Tensor) -> CodebookStatistics:
    """Statistics from the counts of :func:`count_codes`, ``(num_tokens,)``; perplexity 0 when there are none."""
    used = int((counts > 0).sum())
    shares = counts[counts > 0].cpu().double() / counts.sum().item()  # MPS has no float64
    perplexity = math.exp(-(shares * shares.log()).sum().item()) if used else 0.0
    return CodebookStatistics(perplexity, used, counts.numel() - used)


def closest_codes(codes: Tensor) -> Tensor:
    """Returns the distance of each code ``(K, D)`` to the closest other one, ``(K,)``."""
    return torch.cat([torch.cdist(part, codes).topk(2, largest=False).values[:, 1] for part in codes.split(1024)])


def warn_of_collapse(results: Mapping[str, float]) -> None:
    """Warns when an evaluation shows that few codes carry everything, and says what to change."""
    vocabulary = results["used_codes"] + results["dead_codes"]
    if results["perplexity"] >= COLLAPSED_BELOW * min(vocabulary, results["tokens"]):
        return
    if "kl_per_token" not in results:
        remedy = "lower --lr, raise --quantize_from, or train with a larger batch or a smaller vocabulary"
    elif results["kl_per_token"] < 0.25 * math.log(vocabulary):
        remedy = "the encoder hardly decides between codes: lower --kl_weight or lengthen --kl_warmup_share"
    else:
        remedy = (
            "the encoder settled on few codes too early: raise --kl_weight, lower --lr or --clip_grad, or lengthen "
            "the annealing (--temperature_share)"
        )
    logger.warning(
        "the codebook has collapsed: perplexity %.1f of %d codes, %d in use; %s",
        *(results["perplexity"], vocabulary, results["used_codes"], remedy),
    )


class CustomizedTokenizer(LogitTokenizer):
    """A discrete VAE of our own (or of the official "customized" format) as a tokenizer; it is frozen."""

    def __init__(self, model: DiscreteVAE, dtype: torch.dtype = torch.float32, compiled: bool = False) -> None:
        super().__init__(model.num_tokens, model.downsampling, compiled, model.in_chans)
        self.dtype = dtype
        self.model = model.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train()

    def features(self, images: Tensor) -> Tensor:
        half = self.dtype != torch.float32
        with torch.autocast(images.device.type, dtype=self.dtype if half else None, enabled=half):
            return self.model.features(to_signed_range(images))

    def head(self) -> tuple[Tensor, Tensor]:
        head = self.model.head
        assert head.bias is not None
        return head.weight, head.bias

    def reconstruct(self, ids: Tensor) -> Tensor:
        return from_signed_range(self.model.decode(ids))


def open_customized(path: Path, dtype: torch.dtype, compiled: bool) -> CustomizedTokenizer:
    """Opens a VAE's folder or file as a tokenizer; see :func:`beit.load_tokenizer`."""
    return CustomizedTokenizer(load_dvae(path), dtype, compiled)


def load_dvae(path: str | os.PathLike[str]) -> DiscreteVAE:
    """Opens a discrete VAE, trainable and on the CPU, from a folder with ``pytorch_model.bin`` or from the file.

    Its sizes are those in ``config.json`` beside it, or the official ones if there is none. From a checkpoint of its
    training it is the moving average.

    Raises:
        InputError: The file is missing or something else, its weights have other sizes, or it has no codes yet.
    """
    file = Path(path)
    if file.is_dir():
        found = sorted(os.listdir(file))
        if "pytorch_model.bin" not in found:
            there = ", ".join(found[:8]) or "nothing"
            raise InputError(f"{file} has no pytorch_model.bin, which a dVAE's training writes (found: {there})")
        file = file / "pytorch_model.bin"
    require_file(file)
    if file.suffix == ".pkl":
        raise InputError(f"{file} looks like a part of the dall-e tokenizer: set the kind to dall-e")
    checkpoint = load_checkpoint(file)
    if isinstance(checkpoint, Mapping) and "quantizer" in checkpoint:
        return _average_of_run(checkpoint, file).requires_grad_(True)
    content = checkpoint.get("weights", checkpoint) if isinstance(checkpoint, dict) else {}
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if "codebook.weight" not in weights:
        raise InputError(f"{file} holds no discrete VAE: it has no codebook.weight")
    config = file.with_name("config.json")
    try:
        model = DiscreteVAE(**_read_sizes(config))
    except (TypeError, ValueError) as error:
        raise InputError(f"{config} does not describe a discrete VAE: {error}") from error
    own = model.state_dict()
    if odd := [n for n in {**own, **weights} if n not in own or n not in weights or own[n].shape != weights[n].shape]:
        source = str(config) if config.exists() else "the official sizes (there is no config.json beside it)"
        shapes = differences(odd, weights, own)
        raise InputError(f"{file} does not fit {source}: {shapes}; write the sizes of the model into config.json")
    model.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    return model.requires_grad_(True)


def _average_of_run(checkpoint: Mapping[str, Any], file: Path) -> DiscreteVAE:
    """Returns the tokenizer that a checkpoint of its training would publish."""
    try:
        args = checkpoint["args"]
        size = args["input_size"]
        sizes: dict[str, Any] = {name: args[name] for name in ("codebook_dim", "num_layers", "hidden_dim")}
        sizes |= {"num_tokens": args["codebook_size"], "in_chans": args.get("in_chans", 3)}
        vae = DiscreteVAE(tuple(size) if isinstance(size, list) else size, **sizes)
        average = RelaxedAutoencoder(vae) if checkpoint["quantizer"] == "gumbel" else QuantizedAutoencoder(vae)
        average.load_state_dict(checkpoint["model_ema"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{file} is no whole checkpoint of a discrete VAE: {' '.join(str(error).split())}") from error
    if not average.has_codes():
        raise InputError(f"{file} has no codes yet: take one from after --quantize_from of the run")
    return average.tokenizer()


def _read_sizes(config: Path) -> dict[str, Any]:
    """Returns the sizes in a ``config.json``; unknown keys, which other tools may write, are left out."""
    content = read_json(config) if config.exists() else {}
    sizes = {name: content.get(name, value) for name, value in OFFICIAL_SIZES.items()}
    if isinstance(sizes["image_size"], list):
        sizes["image_size"] = tuple(sizes["image_size"])
    return sizes


def save_dvae(folder: str | os.PathLike[str], model: DiscreteVAE) -> None:
    """Writes ``pytorch_model.bin`` and ``config.json`` so that :func:`beit.load_tokenizer` opens the folder.

    The folder is created if missing. Raises :class:`InputError` if it cannot be written.
    """
    folder = Path(folder)
    with atomic_write(folder / "config.json") as file:
        file.write((json.dumps(model.sizes(), indent=2) + "\n").encode())
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    save_checkpoint(folder / "pytorch_model.bin", {"weights": weights})
