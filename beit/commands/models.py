"""``beit models``: models with sizes, released checkpoints; ``inspect``: what a file holds; ``download tokenizer``."""

import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from beit.checkpoints.formats.recorded import RECORDED
from beit.checkpoints.formats.segmentation import PARTS
from beit.checkpoints.load import describe
from beit.checkpoints.read import Metadata, architecture_of, read_weights
from beit.checkpoints.released import RELEASED
from beit.commands.settings import DownloadTokenizerConfig, InspectConfig, ModelsConfig
from beit.errors import InputError, counted, did_you_mean, listed
from beit.modeling import Backbone
from beit.tokenizers.base import VisualTokenizer, detect_kind, load_tokenizer
from beit.tokenizers.dalle import download_tokenizer
from beit.tokenizers.vqkd import DOWNLOADS, VqkdTokenizer
from beit.zoo import create_model, list_models


def main(config: ModelsConfig) -> None:
    """Lists models with their cost per image, then released checkpoints; raises InputError if no name matches."""
    names = list_models(config.pattern)
    released = [row for name, row in RELEASED.items() if fnmatchcase(name, config.pattern)]
    tokenizers = [name for name in DOWNLOADS if fnmatchcase(name, config.pattern)]
    if not names and not released and not tokenizers:
        known = [*list_models(), *RELEASED, *DOWNLOADS]
        raise InputError(f"no model matches {config.pattern!r}{did_you_mean(config.pattern, known)}")
    width = max(len(name) for name in (*names, *(row.name for row in released), *tokenizers))
    for name in names:
        parameters, flops = measure(name)
        sys.stdout.write(f"{name:<{width}}  {parameters:>13,} parameters  {flops / 1e9:6.1f} GFLOPs\n")
    if released:
        sys.stdout.write("\nreleased checkpoints (for --init_from, --checkpoint, pretrained=, beit convert, ...):\n")
    for row in released:
        kind = "pre-trained" if row.num_classes is None else f"{row.num_classes:,} classes"
        sys.stdout.write(f"{row.name:<{width}}  {kind:>14}, {row.input_size} px, of {row.model}\n")
    if tokenizers:
        head = "\nreleased tokenizers (for --tokenizer_weight, load_tokenizer):"
        sys.stdout.write("\n".join((head, *tokenizers, "")))


def download(config: DownloadTokenizerConfig) -> None:
    """Downloads OpenAI's tokenizer into a folder that serves as ``--discrete_vae_weight_path``."""
    download_tokenizer(config.output_dir)


def measure(name: str) -> tuple[int, int]:
    """Returns a model's parameters and its backbone's multiply-adds (FLOPs) per image, measured on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = create_model(name)
        model.forward_features(torch.empty(1, 3, *model.img_size))  # type: ignore[operator]
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def inspect(config: InspectConfig) -> None:
    """Writes what a checkpoint or tokenizer holds, records and leaves open; InputError if it cannot be opened."""
    try:
        weights, metadata = read_weights(config.checkpoint, **config.weights)
    except InputError as problem:
        try:
            tokenizer = load_tokenizer(config.checkpoint, num_heads=config.num_heads)
        except InputError:
            raise problem from None
        lines = _of_tokenizer(tokenizer, detect_kind(Path(config.checkpoint).expanduser()))
    else:
        lines = _of_model(weights, metadata)
    sys.stdout.write("".join(f"{name + ':':<26}{text}\n" for name, text in lines.items() if text))


def _of_model(weights: Mapping[str, Tensor], metadata: Metadata) -> dict[str, str]:
    architecture = architecture_of(weights, metadata, images=True)
    with torch.device("meta"):
        model = architecture.build()
    own, second = model.state_dict(), ""
    if further := architecture.arguments.get("head_layers"):
        head = "the same" if architecture.arguments["shared_lm_head"] else "an own"
        second = f"{counted(further, 'block')} on the patches of block {model.early_layers}, with {head} head"
    apart = (*PARTS, "norm.", "fc_norm.") if metadata.get("segmentation") else ()  # as segmentors have no such norms
    return {
        "dialect": metadata["dialect"],
        "model": f"{describe(weights, metadata)}, {_shape(model)}",
        "second prediction": second,
        "parameters": _parameters(weights),
        **{f"recorded {key}": _shown(metadata[key]) for key in RECORDED if key in metadata},
        "assumed": "; ".join(metadata.get("guessed", ())),
        "missing": listed(name for name in own if name not in weights and not name.startswith(apart)),
        "other tensors": listed(name for name in weights if name not in own and not name.startswith(apart)),
    }


def _of_tokenizer(tokenizer: VisualTokenizer, kind: str) -> dict[str, str]:
    side, encoder = tokenizer.downsampling, ""
    if isinstance(tokenizer, VqkdTokenizer):
        vit = tokenizer.model.encoder
        encoder = f"{counted(vit.get_num_layers(), 'block')}, {vit.embed_dim} channels, {_shape(vit)}"
    return {
        "tokenizer": kind,
        "tokens": f"{tokenizer.vocab_size:,}, each of {side} x {side} pixels",
        "encoder": encoder,
        "parameters": _parameters(tokenizer.state_dict()),
    }


def _shape(model: Backbone) -> str:
    return f"{model.num_heads} heads, for images of {model.img_size[0]} x {model.img_size[1]} pixels"


def _parameters(weights: Mapping[str, Tensor]) -> str:
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}))
    return f"{sum(t.numel() for t in weights.values()):,} in {len(weights)} tensors of {dtypes}"


def _shown(value: object) -> str:
    return f"{len(value)}: {listed(map(str, value))}" if isinstance(value, tuple) and len(value) > 4 else str(value)
