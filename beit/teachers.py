"""Frozen models that teach: what they see in each patch of an image is what another model learns to predict.

teacher = load_teacher("vit_base_patch16_224.dino")
teacher(images)  # (B, 3, H, W) in [0, 1] -> (B, 14, 14, 768)
"""

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from beit.checkpoints.read import preparation_of
from beit.checkpoints.released import CHECKPOINT_SUFFIXES, CONFIG, RELEASED, released_at
from beit.errors import InputError, did_you_mean
from beit.storage import read_json
from beit.zoo import MODELS, open_model

MOST_PREFIX_TOKENS = 64  # class and register tokens, in front of the patches
OURS = ("beit", "data2vec-vision")  # model types of Hugging Face folders that this library reads itself


class Teacher(nn.Module):
    """A frozen model as a function from images to features of their patches; always in evaluation mode.

    Images of another size than the model's own are resized to it, so that no positions need to be.

    Args:
        name: What to call it.
        model: The model; it is frozen.
        tokens: Its tokens ``(B, T, D)``, the patches' the last ``h * w``, of normalised images ``(B, 3, H, W)``.
        img_size: Height and width of its images, in pixels.
        grid: Its patches ``(h, w)``.
        mean: Mean of its images per channel, for values in [0, 1].
        std: Standard deviation of its images per channel.

    Attributes:
        dim: Channels of a feature, ``D``.

    Raises:
        InputError: The model gives no patch tokens.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokens: Callable[[Tensor], Tensor],
        *,
        img_size: Sequence[int],
        grid: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.name, self.model, self._tokens = name, model.requires_grad_(False), tokens
        self.img_size, self.grid = tuple(img_size), grid
        for key, values in (("mean", mean), ("std", std)):
            self.register_buffer(key, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.train()
        with torch.no_grad():
            shape = tokens(torch.zeros(1, 3, *img_size)).shape
        if len(shape) != 3 or not 0 <= shape[1] - grid[0] * grid[1] <= MOST_PREFIX_TOKENS:
            raise _no_patches(name, f"its features have shape {tuple(shape)}")
        self.dim = shape[2]

    def train(self, mode: bool = True) -> "Teacher":  # noqa: ARG002
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Returns the features of images ``(B, 3, H, W)`` in [0, 1], float32 ``(B, h, w, D)``.

        They are computed in the number format of autocast, and interpolated if ``grid`` is not the teacher's own.
        """
        if tuple(images.shape[2:]) != self.img_size:
            images = F.interpolate(images, self.img_size, mode="bicubic", antialias=True).clamp(0, 1)
        h, w = self.grid
        tokens = self._tokens((images - self.mean) / self.std)[:, -h * w :].float()
        features = rearrange(tokens, "b (h w) d -> b d h w", h=h)
        if grid not in (None, self.grid):
            features = F.interpolate(features, grid, mode="bilinear", antialias=True)
        return rearrange(features, "b d h w -> b h w d")


def load_teacher(name: str | os.PathLike[str]) -> Teacher:
    """Opens a teacher, on the CPU.

    Its features are the patch tokens after the last norm; for CLIP they are projected as its class token is.

    Args:
        name: A model of timm's with pre-trained weights; a checkpoint of this library's, or a released name; a folder
            as timm or transformers write it; or ``owner/model`` on the Hugging Face hub.

    Raises:
        InputError: There is no such model, it cannot be opened, or it has no token per patch.
    """
    if not os.fspath(name):
        raise InputError("--teacher is missing: give a model of timm's, a folder, a checkpoint or a hub id")
    name, path = os.fspath(name), Path(name).expanduser()
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if "architecture" in config:
        return _from_timm(name, f"local-dir:{path}")
    if name.startswith(("hf-hub:", "timm/")):
        return _from_timm(name, f"hf-hub:{name.removeprefix('hf-hub:')}")
    if config.get("model_type", "beit") not in OURS:
        return _from_transformers(name, path)
    is_file = path.exists() or path.suffix in CHECKPOINT_SUFFIXES or "://" in name
    if is_file or name in MODELS or released_at(name):
        model, metadata = open_model(name)
        if model.patch_embed.proj.in_channels != 3:
            raise InputError(f"{name} cannot teach: it is a model of other images than colour ones")
        look = preparation_of(metadata, model.img_size)
        sizes: dict[str, Any] = {"img_size": model.img_size, "grid": model.patch_embed.grid_size}
        return Teacher(name, model, model.patch_features, **sizes, mean=look["mean"], std=look["std"])
    if timm.is_model(name.partition(".")[0]):
        return _from_timm(name, name)
    if name.count("/") == 1 and not path.parent.is_dir():
        return _from_transformers(name, name)
    near = did_you_mean(name, [*timm.list_models(pretrained=True), *RELEASED])
    raise InputError(f"no teacher {name!r}{near}: give a model of timm's, a checkpoint, a folder or a hub id")


def _from_timm(name: str, source: str) -> Teacher:
    model: Any = _opened(name, lambda: timm.create_model(source, pretrained=True))
    patches: Any = getattr(model, "patch_embed", None)
    if not hasattr(patches, "grid_size"):
        raise _no_patches(name)
    known = model.pretrained_cfg
    # A CLIP tower has its projection in the place of the head, unless it was fine-tuned to classify.
    projects = "_clip_" in known["architecture"] and "_ft_" not in (known.get("tag") or "")
    head = model.head if projects else nn.Identity()
    look = {"mean": known["mean"], "std": known["std"]}
    tokens = lambda images: head(model.forward_features(images))  # noqa: E731
    return Teacher(name, model, tokens, img_size=patches.img_size, grid=patches.grid_size, **look)


def _from_transformers(name: str, source: str | Path) -> Teacher:
    transformers = _opened(name, lambda: import_module("transformers"))
    config = _opened(name, lambda: transformers.AutoConfig.from_pretrained(source))
    is_clip = config.model_type in ("clip", "clip_vision_model")
    opens = transformers.CLIPVisionModelWithProjection if is_clip else transformers.AutoModel
    model: Any = _opened(name, lambda: opens.from_pretrained(source))
    images = _opened(name, lambda: transformers.AutoImageProcessor.from_pretrained(source))
    seen = getattr(model, "vision_model", model)

    def tokens(normalised: Tensor) -> Tensor:
        states = seen(pixel_values=normalised).last_hidden_state
        return model.visual_projection(seen.post_layernorm(states)) if is_clip else states

    size, patch = (getattr(seen.config, key, 0) for key in ("image_size", "patch_size"))
    if not isinstance(size, int) or not isinstance(patch, int) or not patch:
        raise _no_patches(name)
    look = {"mean": images.image_mean, "std": images.image_std}
    return Teacher(name, model, tokens, img_size=(size, size), grid=(size // patch, size // patch), **look)


def _opened(name: str, opens: Callable[[], Any]) -> Any:
    """Opens a model of another library's, which raises errors of all kinds where it cannot."""
    try:
        return opens()
    except Exception as error:
        raise InputError(f"the teacher {name} cannot be opened: {' '.join(str(error).split())[:300]}") from error


def _no_patches(name: str, why: str = "it has no grid of patches") -> InputError:
    return InputError(f"{name} cannot teach: {why}; choose a vision transformer, which has a token per patch")
