"""VQ-KD, the tokenizer of BEiT v2: patch features, each replaced by a code, from which a decoder predicts a teacher's.

    images -> encoder -> head -> unit vectors -> nearest codes -> decoder -> head -> the teacher's features

Encoder and decoder are the library's own backbone, and state-dict names are those of the official release, both ways.

Source: arXiv 2208.06366, section 3.1; microsoft/unilm, folder beit2. Deviations: the codebook is the same on all
processes, from its k-means start on (official: each process has its own); a code that no vector chose stays bit for bit
(official: rounding moves it by less than 1e-6); evaluating counts nothing in the buffer ``quantize.cluster_size``.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import trunc_normal_
from torch import Tensor, nn

from beit.checkpoints.read import Metadata, architecture_of, read_weights
from beit.data.preprocessing import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from beit.errors import InputError, did_you_mean, listed
from beit.modeling import VisionTransformer
from beit.storage import beit_home, differences, download, load_checkpoint, sha256_of, weights_fingerprint
from beit.tokenizers.base import VisualTokenizer
from beit.tokenizers.codebook import draw, gather, kmeans, nearest, sums_by_code
from beit.tokenizers.dvae import DiscreteVAE, from_signed_range, load_dvae

CLIP, DINO = "vit_base_patch16_clip_quickgelu_224.openai", "vit_base_patch16_224.dino"  # names of timm's
MODELS: dict[str, tuple[int, str]] = {  # name -> blocks of the decoder, teacher; all else is the constructor's default
    "vqkd_encoder_base_decoder_3x768x12_clip": (3, CLIP),
    "vqkd_encoder_base_decoder_1x768x12_clip": (1, CLIP),
    "vqkd_encoder_base_decoder_1x768x12_dino": (1, DINO),
}
_RELEASES = "https://github.com/addf400/files/releases/download/BEiT-v2"
DOWNLOADS = {  # name -> address; eight digits at the end of a file's name begin its SHA-256
    name: f"{_RELEASES}/{name}-{digest}.pth"
    for name, digest in zip(MODELS, ("d5036aa7", "d93179da", "663c55d7"), strict=True)
} | {"vqkd_encoder": "https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt/vqkd_encoder.pth"}
PREPARATIONS = {  # --process_type -> mean and standard deviation of the encoder's images, for values in [0, 1]
    "default": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet_norm": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "dall-e": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # the images as they are, as official
}
NO_PART = ("loss", "teacher", "scaling")  # beginnings of names that are no part of a tokenizer, as official


class Quantized(NamedTuple):
    """What :class:`Quantizer` makes of vectors ``(B, N, d)``."""

    codes: Tensor  # the nearest, (B, N, d); their gradient passes to the vectors as it is
    commitment: Tensor  # mean squared distance of the unit vectors from their codes, over all numbers; a scalar
    ids: Tensor  # int64 (B, N)
    vectors: Tensor  # at length 1, without gradient


class Quantizer(nn.Module):
    """Replaces vectors by the nearest of ``size`` codes of length 1; no gradient moves these, but :meth:`update`.

    Args:
        size: Number of codes, ``K``.
        dim: Length of a code's vector, ``d``.
        decay: Share of a code that stays at an update.
        kmeans_start: Take the codes from the first vectors that come, those of all processes, by k-means.
    """

    cluster_size: Tensor

    def __init__(self, size: int, dim: int, *, decay: float = 0.99, kmeans_start: bool = False) -> None:
        super().__init__()
        self.decay, self._started = decay, not kmeans_start
        codes = torch.zeros(size, dim) if kmeans_start else F.normalize(torch.randn(size, dim), dim=1)
        # How often each code is chosen, an average over updates; a run sets it to 0 at the beginning of each epoch.
        self.register_buffer("cluster_size", torch.zeros(size))
        self.embedding = nn.Module()  # whose cluster_size are the counts of k-means; nothing reads its embed_avg
        book = {"weight": codes, "cluster_size": torch.zeros(size), "embed_avg": codes.clone()}
        for name, buffer in {**book, "initted": torch.tensor([float(not kmeans_start)])}.items():
            self.embedding.register_buffer(name, buffer)

    @property
    def codes(self) -> Tensor:
        """The codes, ``(K, d)``."""
        return self.embedding.get_buffer("weight")

    def forward(self, z: Tensor) -> Quantized:
        """Quantizes vectors ``(B, N, d)`` of any length; autocast changes nothing."""
        vectors = F.normalize(z, dim=-1)
        flat = vectors.detach().flatten(0, 1)
        if not self._started:
            self._start(flat)
        ids = nearest(flat, self.codes)
        codes = self.codes[ids].view_as(vectors)
        straight_through = vectors + (codes - vectors).detach()
        return Quantized(straight_through, F.mse_loss(vectors, codes), ids.view(z.shape[:2]), vectors.detach())

    def _start(self, vectors: Tensor) -> None:
        if not self.embedding.get_buffer("initted").item():
            means, counts = kmeans(vectors, draw(gather(vectors), len(self.codes)), cosine=True)
            for name, value in {"weight": means, "cluster_size": counts, "initted": torch.ones(1)}.items():
                self.embedding.get_buffer(name).copy_(value)
        self._started = True  # so that the host does not wait for the buffer again

    @torch.no_grad()
    def update(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """Moves each code towards the mean of the unit vectors ``(M, d)`` that chose it, over all processes.

        Returns how many did, ``(K,)``. A code that none chose stays.
        """
        sums, counts = sums_by_code(vectors, ids, len(self.cluster_size))
        moved = F.normalize(self.decay * self.codes + (1 - self.decay) * F.normalize(sums, dim=1), dim=1)
        self.codes.copy_(torch.where(counts.unsqueeze(1) > 0, moved, self.codes))
        self.cluster_size.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        return counts


class VQKD(nn.Module):
    """Encoder, codebook and decoder.

    Args:
        codebook_size: Number of codes.
        codebook_dim: Length of a code's vector.
        decoder_depth: Blocks of the decoder; 0 for no decoder, as a frozen tokenizer needs none.
        decoder_out_dim: Channels of the teacher's features.
        ema_decay: Share of a code that stays at a step.
        kmeans_start: Start from the k-means of the first batch's vectors.
        process_type: How the encoder's images are prepared, a key of :data:`PREPARATIONS`.
        **encoder: Keywords of :class:`beit.modeling.Backbone`, by default those of a ViT-B/16; the decoder shares them.
    """

    loss_idle: Tensor

    def __init__(
        self,
        *,
        codebook_size: int = 8192,
        codebook_dim: int = 32,
        decoder_depth: int = 3,
        decoder_out_dim: int = 512,
        ema_decay: float = 0.99,
        kmeans_start: bool = False,
        process_type: str = "default",
        **encoder: Any,
    ) -> None:
        super().__init__()
        self.encoder = VisionTransformer(num_classes=0, **encoder)
        width, self.grid = self.encoder.embed_dim, self.encoder.patch_embed.grid_size
        sizes = {"img_size": self.grid, "patch_size": 1, "in_chans": codebook_dim, "depth": decoder_depth}
        self.decoder = VisionTransformer(num_classes=0, **{**encoder, **sizes}) if decoder_depth else None
        self.quantize = Quantizer(codebook_size, codebook_dim, decay=ema_decay, kmeans_start=kmeans_start)
        self.encode_task_layer = _head(width, codebook_dim)
        self.decode_task_layer = _head(width, decoder_out_dim) if decoder_depth else None
        # Steps since each code was chosen. Official loaders drop names that begin with "loss".
        self.register_buffer("loss_idle", torch.zeros(codebook_size, dtype=torch.int64))
        self._mean, self._std = PREPARATIONS[process_type]

    def encode(self, images: Tensor) -> Tensor:
        """Returns the vectors to quantize, ``(B, N, d)``, of images ``(B, 3, H, W)`` in [0, 1] of any size.

        The head computes in the format of its weights, whatever autocast is on.
        """
        encoder = self.encoder
        # With numbers, not tensors: copying these to a GPU would make the host wait.
        channels = zip(images.unbind(1), self._mean, self._std, strict=True)
        patches = encoder.patch_embed.proj(torch.stack([(x - mean) / std for x, mean, std in channels], 1))
        grid, cls_tokens = (patches.shape[2], patches.shape[3]), encoder.cls_token.expand(len(images), -1, -1)
        tokens = torch.cat((cls_tokens, rearrange(patches, "b d h w -> b (h w) d")), dim=1)
        assert encoder.pos_embed is not None
        positions = interpolate_positions(encoder.pos_embed, self.grid, grid)
        features = encoder.fc_norm(encoder.forward_blocks(tokens + positions)[0][:, 1:])  # type: ignore[misc]
        with torch.autocast(images.device.type, enabled=False):
            return self.encode_task_layer(features.to(self.encode_task_layer[0].weight.dtype))

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Returns the predicted features ``(B, N, D)`` of images ``(B, 3, H, W)`` in [0, 1], and their codes."""
        quantized = self.quantize(self.encode(images))
        assert self.decoder is not None
        assert self.decode_task_layer is not None
        codes = rearrange(quantized.codes, "b (h w) d -> b d h w", h=self.grid[0])
        return self.decode_task_layer(self.decoder.patch_features(codes)), quantized

    @torch.no_grad()
    def update(self, vectors: Tensor, ids: Tensor, revive_after: int = 0) -> None:
        """Moves the codes after a step that gave unit vectors ``(M, d)`` the codes ``(M,)`` on this process.

        With ``revive_after``, codes that were not chosen for as many steps become random vectors of this one.
        """
        counts = self.quantize.update(vectors, ids)
        self.loss_idle.add_(1).mul_(counts == 0)
        if revive_after and (dead := self.loss_idle >= revive_after).any():
            self.quantize.codes[dead] = draw(gather(vectors), int(dead.sum()))
            self.quantize.cluster_size[dead] = 0.0
            self.loss_idle[dead] = 0

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters exempt from weight decay besides 1-D ones."""
        return {f"{half}.{name}" for half in ("encoder", "decoder") for name in self.encoder.no_weight_decay()}


def _head(width: int, outputs: int) -> nn.Sequential:
    linear = nn.Linear(width, width), nn.Linear(width, outputs)
    for layer in linear:
        trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(linear[0], nn.Tanh(), linear[1])


def interpolate_positions(pos_embed: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Returns a position embedding ``(1, 1 + h * w, D)`` of the grid ``source`` for that of ``target``, as official.

    The table stays as it is for as many patches, whatever their grid. Otherwise the sampling points are set by the
    factor ``(n + 0.1) / n0`` itself, so the result is not that of a resize to a size.
    """
    if target[0] * target[1] == pos_embed.shape[1] - 1:
        return pos_embed
    patches = rearrange(pos_embed[:, 1:], "one (h w) d -> one d h w", h=source[0])
    factors = [(new + 0.1) / old for new, old in zip(target, source, strict=True)]
    resized = F.interpolate(patches, scale_factor=factors, mode="bicubic")
    return torch.cat((pos_embed[:, :1], rearrange(resized, "one d h w -> one (h w) d")), dim=1)


class VqkdTokenizer(VisualTokenizer):
    """A trained VQ-KD as a tokenizer.

    Args:
        model: VQ-KD; it is frozen, and its decoder, which gives features and no images, is left out.
        path: Its file; :meth:`decode` needs the decoder that ``run_vqkd_training.py --pixels_of`` trains, beside it.
        dtype: See :func:`beit.load_tokenizer`, also for ``compiled``.
    """

    def __init__(self, model: VQKD, path: Path, dtype: torch.dtype = torch.float32, compiled: bool = False) -> None:
        super().__init__(len(model.quantize.cluster_size), model.encoder.patch_embed.patch_size[0], compiled)
        self.dtype, self.codebook_dim = dtype, model.quantize.codes.shape[1]
        self.pixels_folder = path.with_name(f"{path.stem}-pixels")
        self.pixels: DiscreteVAE | None = None
        model.decoder = model.decode_task_layer = None
        self.model = model.requires_grad_(False)
        self.train()

    def features(self, images: Tensor) -> Tensor:
        half = self.dtype != torch.float32
        with torch.autocast(images.device.type, dtype=self.dtype if half else None, enabled=half):
            vectors = self.model.encode(images)
        return rearrange(vectors, "b (h w) d -> b d h w", h=images.shape[2] // self.downsampling)

    def quantise(self, features: Tensor) -> Tensor:
        return nearest(F.normalize(features, dim=-1), self.model.quantize.codes)

    def fingerprint(self) -> str:
        """Returns a hash of what decides on tokens: the encoder's weights and the codes."""
        parts = nn.ModuleList([self.model.encoder, self.model.encode_task_layer])
        parts.register_buffer("codes", self.model.quantize.codes)
        return weights_fingerprint(parts)

    def reconstruct(self, ids: Tensor) -> Tensor:
        codes, folder = self.model.quantize.codes, self.pixels_folder
        if self.pixels is None:
            if not folder.is_dir():
                raise InputError(f"VQ-KD draws no images by itself: `run_vqkd_training.py --pixels_of` makes {folder}")
            self.pixels = load_dvae(folder).requires_grad_(False).eval().to(codes.device)
        if not torch.equal(self.pixels.codebook.weight, codes):
            raise InputError(f"{folder} draws the codes of another tokenizer: train it anew")
        return from_signed_range(self.pixels.decode(ids))


def open_vqkd(path: Path, dtype: torch.dtype, compiled: bool, num_heads: int | None = None) -> VqkdTokenizer:
    """Opens VQ-KD's file, or downloads one of :data:`DOWNLOADS`, as a tokenizer; see :func:`beit.load_tokenizer`."""
    if not path.exists():
        if path.name not in DOWNLOADS:
            hint = did_you_mean(path.name, DOWNLOADS) or f": give a file, or one of {', '.join(DOWNLOADS)}"
            raise InputError(f"there is no released tokenizer {path.name}{hint}")
        url, place = DOWNLOADS[path.name], beit_home() / "tokenizers" / f"{path.name}.pth"
        path = download(url, place, verify=partial(_check_digest, url))
    return VqkdTokenizer(load_vqkd(path, num_heads), path, dtype, compiled)


def load_vqkd(path: Path, num_heads: int | None = None) -> VQKD:
    """Opens VQ-KD from a file of a run of ours, of the official code or, its encoder alone, of mmpretrain.

    Args:
        path: The file.
        num_heads: Attention heads per block; by default as recorded, or else guessed from the width with a warning.

    Raises:
        InputError: It cannot be read or is something else, its weights do not belong together, or it has no codes yet.
    """
    encoder, metadata = read_weights(path, "model|state_dict", "encoder.", num_heads=num_heads)
    content = load_checkpoint(path, mmap=True)
    state = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), Mapping)), content)
    weights = {n: t.clone() for n, t in state.items() if n == "loss_idle" or not n.startswith((*NO_PART, "encoder."))}
    if metadata["dialect"] == "mmpretrain":
        encoder = {re.sub("^norm", "fc_norm", name): tensor for name, tensor in encoder.items()}
    model = _model_of(encoder, weights, metadata)
    own = model.state_dict()
    idle = torch.zeros(len(own["loss_idle"]), dtype=torch.int64)
    weights = {"loss_idle": idle, **{f"encoder.{name}": tensor for name, tensor in encoder.items()}, **weights}
    if odd := [n for n in {**own, **weights} if n not in own or n not in weights or own[n].shape != weights[n].shape]:
        raise InputError(f"{path} is no whole VQ-KD: {len(odd)} tensors differ ({differences(odd, weights, own)})")
    if not weights["quantize.embedding.initted"].item():
        raise InputError(f"{path} has no codes yet: it was saved before its first training step")
    model.load_state_dict({name: t.to(own[name].dtype) for name, t in weights.items()}, assign=True)
    return model


def _model_of(encoder: Mapping[str, Tensor], weights: Mapping[str, Tensor], metadata: Metadata) -> VQKD:
    """Builds the model of an encoder's weights and of the others, without memory for its own."""
    source = metadata["source"]
    needed = ("cls_token", "pos_embed", "quantize.embedding.weight", "encode_task_layer.2.weight")
    if lacks := [name for name in needed if name not in encoder and name not in weights]:
        raise InputError(f"{source} holds no VQ-KD tokenizer: it lacks {listed(lacks)}")
    side = math.isqrt(encoder["pos_embed"].shape[1] - 1)
    metadata.setdefault("window", (side, side))  # official grids are squares
    arguments = architecture_of(encoder, metadata).arguments
    for name in ("num_classes", "use_mean_pooling"):
        del arguments[name]
    size, dim = weights["quantize.embedding.weight"].shape
    process = metadata.get("args", {}).get("process_type")
    with torch.device("meta"):
        return VQKD(
            codebook_size=size,
            codebook_dim=dim,
            decoder_depth=len({name.split(".")[2] for name in weights if name.startswith("decoder.blocks.")}),
            decoder_out_dim=len(weights.get("decode_task_layer.2.weight", ())),
            process_type=process if process in PREPARATIONS else "default",
            **arguments,
        )


def _check_digest(url: str, file: Path) -> None:
    """Compares the hash of a file with the digits at the end of its address, if there are any."""
    digits = re.search(r"-([0-9a-f]{8})\.pth$", url)
    if digits and not sha256_of(file).startswith(digits[1]):
        raise InputError(f"{url} is not the released file: its sha256 does not begin with {digits[1]}")
