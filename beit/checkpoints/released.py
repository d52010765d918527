"""The officially released checkpoints, and how a name, an address or a hub id becomes a file on this machine."""

import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from beit.data.preprocessing import default_crop_pct, normalization
from beit.errors import InputError, did_you_mean
from beit.storage import beit_home, check_form, download, load_checkpoint, offline, position_of, read_json

logger = logging.getLogger(__name__)

RELEASES = "https://github.com/addf400/files/releases/download"
# Where the files used to be: many command lines still have these addresses, with or without an access token.
DEAD_HOSTS = ("unilm.blob.core.windows.net", "conversationhub.blob.core.windows.net")

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt")
FOLDER_WEIGHTS = tuple(
    f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
)
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"  # beside them
PIECES_INDEX = ".metadata"  # in a folder written with --shard fsdp; see beit/checkpoints/pieces.py

# Parts of a query that sign an address (Azure, S3, Google, CloudFront): they change while the file does not.
ACCESS_TOKEN = re.compile(r"(?i)s[vepr]|st|spr|sig|token|expires|signature|policy|key-pair-id|x-(amz|goog)-.*")
_HUB_ID = re.compile(r"(?:hf-hub:|hf://|https://huggingface\.co/)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """A published checkpoint."""

    name: str  # of the file, without .pth
    model: str  # in :mod:`beit.zoo`
    urls: tuple[str, ...]  # tried in this order; later ones may have the same weights in another dialect
    num_classes: int | None  # None for a pre-training model
    input_size: int  # side of the images in pixels
    mean: tuple[float, ...]  # per channel, for values in [0, 1]
    std: tuple[float, ...]
    crop_pct: float  # side of the images divided by the shorter side they are resized to
    interpolation: str = "bicubic"
    overrides: Mapping[str, object] = field(default_factory=dict)  # of the model's published configuration


def _released(
    name: str, model: str, num_classes: int | None, hub: str | None = None, imagenet: bool = False, **overrides: Any
) -> ReleasedCheckpoint:
    mirror = [f"https://huggingface.co/microsoft/{hub}/resolve/main/pytorch_model.bin"] if hub else []
    size, (mean, std) = overrides.get("img_size") or int(re.findall(r"_(\d{3})", name)[0]), normalization(imagenet)
    folder = "BEiT-v2" if name.startswith("beitv2_") else "v1.0"
    urls, crop_pct = (f"{RELEASES}/{folder}/{name}.pth", *mirror), default_crop_pct((size, size))
    return ReleasedCheckpoint(name, model, urls, num_classes, size, mean, std, crop_pct, overrides=overrides)


def _table() -> dict[str, ReleasedCheckpoint]:
    rows = []
    for size in ("base", "large"):
        model, hub = f"beit_{size}_patch16_224", f"beit-{size}-patch16-224"
        rows.append(_released(f"{model}_pt22k", f"{model}_8k_vocab", None, f"{hub}-pt22k"))
        rows.append(_released(f"{model}_pt22k_ft22k", model, 21841, f"{hub}-pt22k-ft22k"))
        rows.append(_released(f"{model}_pt22k_ft1k", model, 1000))
        for pixels in (224, 384, 512)[: 2 if size == "base" else 3]:
            model = f"beit_{size}_patch16_{pixels}"
            rows.append(_released(f"{model}_pt22k_ft22kto1k", model, 1000, f"beit-{size}-patch16-{pixels}"))
        # A segmentor. The hub's copy taps other blocks, so it is no mirror.
        name = f"beit_{size}_patch16_640_pt22k_ft22ktoade20k"
        rows.append(_released(name, f"beit_{size}_patch16_224", 150, imagenet=True, img_size=640))
        name, model = f"beitv2_{size}_patch16_224_pt1k", f"beit_{size}_patch16_224"
        for epochs in ("_300e", ""):  # 300 and 1600
            rows.append(_released(f"{name}{epochs}", f"{model}_8k_vocab_cls_pt", None, imagenet=True))
            rows.append(_released(f"{name}{epochs}_ft1k", model, 1000, imagenet=True))
        rows.append(_released(f"{name}_ft21k", model, 21841, imagenet=True))
        rows.append(_released(f"{name}_ft21kto1k", model, 1000, imagenet=True))
        for start in ("ft", "ft21kto"):
            rows.append(_released(f"{name}_{start}ade20k", model, 150, imagenet=True, img_size=512))
    name, model = "beit_base_patch16_224_pt1k_800ep", "beit_base_patch16_224_8k_vocab"
    other = _released(
        name, model, None, imagenet=True, use_shared_rel_pos_bias=False, use_abs_pos_emb=True, init_values=0.0
    )
    return {row.name: row for row in (*rows, other)}


RELEASED: dict[str, ReleasedCheckpoint] = _table()


def released_for(model: str) -> ReleasedCheckpoint:
    """Returns the checkpoint for ``create_model(model, pretrained=True)``, or raises :class:`InputError`."""
    stem = model.partition("_8k_vocab")[0]
    for name in (f"{stem}_pt22k_ft22kto1k", f"{stem}_pt22k", f"{stem.replace('beit', 'beitv2')}_pt1k"):
        if name in RELEASED and RELEASED[name].model == model:
            return RELEASED[name]
    known = sorted({row.model for row in RELEASED.values()})
    raise InputError(f"no checkpoint of {model} was released; pretrained= takes a file. Released: {', '.join(known)}")


def released_at(path: str | os.PathLike[str]) -> ReleasedCheckpoint | None:
    """Returns the released checkpoint of that file name, or None."""
    return RELEASED.get(Path(path).name.removesuffix(".pth"))


def resolve(source: str | os.PathLike[str]) -> Path:
    """Returns the file or folder a source stands for, downloading it if necessary.

    Args:
        source: A file; a folder, such as a run's, for its best checkpoint or, without one, the newest; the name of a
            released checkpoint, with or without ``.pth``; an address (old dead ones still work); or a model on the
            Hugging Face hub, ``owner/name`` or ``hf-hub:owner/name``, of a branch, tag or commit after ``@``.

    Raises:
        InputError: There is no such source, or it cannot be downloaded (``BEIT_OFFLINE=1`` may be set).
    """
    text = os.fspath(source)
    if not text:
        raise InputError("no checkpoint is given: a file, a folder, a released name, an address or a hub id is needed")
    if "://" in text and not _HUB_ID.fullmatch(text):
        return _fetch(text)
    path = Path(text).expanduser()
    if path.exists():
        return max(_checkpoints_in(path), key=_progress, default=path)
    if (row := released_at(text)) is not None and path.parent == Path():
        return download(row.urls, beit_home() / "checkpoints" / f"{row.name}.pth", verify=check_form)
    is_path = path.suffix in CHECKPOINT_SUFFIXES or path.parent.is_dir()
    if (match := _HUB_ID.fullmatch(text)) and (":" in text or not is_path):
        return _fetch_from_hub(match[1], match[2])
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    near = [entry.name for entry in beside if entry.suffix in CHECKPOINT_SUFFIXES or _checkpoints_in(entry)]
    hint = did_you_mean(path.name, [*near, *RELEASED])
    raise InputError(f"there is no checkpoint {text}{hint}; `beit models` lists the released names")


def _checkpoints_in(folder: Path) -> Sequence[Path]:
    """Returns the folder itself if it is a checkpoint, or those that may stand for a run: the best one, else all."""
    if not os.path.isdir(folder):
        return ()
    if any(os.path.isfile(folder / name) for name in (*FOLDER_WEIGHTS, PIECES_INDEX)):
        return (folder,)
    if os.path.isfile(best := folder / "checkpoint-best.pth"):
        return (best,)
    return [file for file in sorted(folder.glob("checkpoint-*.pth")) if os.path.isfile(file)]


def _progress(path: Path) -> tuple[int, int]:
    """Returns the epoch and the step at which a checkpoint was written, the first if it is damaged."""
    if path.name == "checkpoint-best.pth" or path.is_dir():
        return 0, 0  # the only one
    try:
        return position_of(load_checkpoint(path, mmap=True))
    except (InputError, AttributeError) as error:
        logger.warning("%s is passed over: %s", path.name, error)
        return -1, 0


def _fetch(url: str) -> Path:
    """Downloads an address; for a dead one, from where the file is now."""
    try:
        parts = urlsplit(url)
        name = Path(unquote(parts.path)).name
    except ValueError as error:
        raise InputError(f"{url!r} is no address: {error}") from error
    if name in ("", "..") or not name.isprintable():
        raise InputError(f"{url!r} names no file")
    row = RELEASED.get(name.removesuffix(".pth"))
    if parts.hostname in DEAD_HOSTS or url.startswith(RELEASES):
        moved = f"{RELEASES}/{'BEiT-v2' if '/beitv2/' in parts.path else 'v1.0'}/{name}"
        urls = row.urls if row else (url if url.startswith(RELEASES) else moved,)
        return download(urls, beit_home() / "checkpoints" / name, verify=check_form)
    # Files of one name are at many addresses, and "?id=2" is another file than "?id=1".
    query = [pair for pair in parse_qsl(parts.query, keep_blank_values=True) if not ACCESS_TOKEN.fullmatch(pair[0])]
    address = f"{parts.scheme}://{parts.netloc}{parts.path}{'?' if query else ''}{urlencode(sorted(query))}"
    place = hashlib.sha256(address.encode()).hexdigest()[:12]
    return download(url, beit_home() / "urls" / place / name, verify=check_form)


def _fetch_from_hub(repository: str, revision: str | None) -> Path:
    """Downloads weights and configs of a hub model, into the library's cache or below ``$BEIT_HOME``."""
    try:
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        advice = "models of the Hugging Face hub need huggingface_hub: pip install huggingface_hub"
        raise InputError(f"{repository} is no file here; {advice}") from error
    cache = beit_home() / "hub" if os.environ.get("BEIT_HOME") else None
    where: dict[str, Any] = {"cache_dir": cache, "revision": revision}

    def fetch(name: str) -> Path | None:
        """Returns a file, or None if the repository has none of that name: what is out of reach is another matter."""
        try:
            return Path(hf_hub_download(repository, name, local_files_only=offline(), **where))
        except LocalEntryNotFoundError as error:  # not in the cache, and the hub is out of reach or offline is set
            known = try_to_load_from_cache(repository, name, **where) is _CACHED_NO_EXIST
            if known or (offline() and name != CONFIG):
                return None
            reason = f"BEIT_OFFLINE is set and its {name} is not in the cache" if offline() else str(error)
        except EntryNotFoundError:
            return None
        except Exception as error:  # the library's own, httpx's, and OSErrors
            reason = str(error) or type(error).__name__
        raise InputError(f"{repository} was not downloaded from the Hugging Face hub: {' '.join(reason.split())}")

    weights = next(filter(None, map(fetch, FOLDER_WEIGHTS)), None)
    if weights is None:
        reason = "BEIT_OFFLINE is set and it is not in the cache" if offline() else "it has no weights"
        raise InputError(f"{repository} is no file here and was not downloaded from the Hugging Face hub: {reason}")
    for file in shards_of(weights) if weights.suffix == ".json" else ():
        fetch(file.name)
    for name in (CONFIG, PREPROCESSOR):
        fetch(name)
    return weights.parent


def shards_of(index: Path) -> list[Path]:
    """Returns the files that a ``….index.json`` lists, which lie beside it; :class:`InputError` if it lists others."""
    found = read_json(index).get("weight_map")
    names = list(found.values()) if isinstance(found, dict) else []
    files = {name for name in names if isinstance(name, str) and name and Path(name).name == name}
    if not files or not files.issuperset(map(str, names)):
        raise InputError(f"{index} has no weight_map of tensors to files beside it")
    return [index.with_name(name) for name in sorted(files)]
