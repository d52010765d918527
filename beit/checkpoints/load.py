"""Loading any checkpoint into a model: weights are resized where the image size differs, and a report lists them all.

report = load_pretrained(model, "beit_base_patch16_224_pt22k")
print(report.summary())
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.layers import resample_patch_embed
from torch import Tensor, nn

from beit.checkpoints.formats.dialect import Weights
from beit.checkpoints.formats.relatives import PLAIN_VIT
from beit.checkpoints.formats.segmentation import is_segmentor
from beit.checkpoints.formats.unilm import SHARED_TABLE, TABLE
from beit.checkpoints.heads import match_classes
from beit.checkpoints.read import Metadata, architecture_of, read_weights, window_of
from beit.errors import InputError, counted, listed
from beit.modeling import Backbone
from beit.relative_position import relative_position_index, resize_position_embedding, resize_table
from beit.storage import differences

logger = logging.getLogger(__name__)

# What is left out of models that do not have it, by the beginning or the end of its names.
LEFT_OUT = {
    "decoder": "of MAE's pre-training",
    "mask_token": "of pre-training",
    "lm_head.": "of pre-training",
    "norm.": "the final norm of another task",
    "fc_norm.": "of classification",
    "head.": "of classification",
    "cls_pt_": "of BEiT v2's pre-training",
    "neck.": "of pre-training",
    "pooler.": "of a pooling that BEiT does not have",
    "attn.k_bias": "a bias of the keys cancels in the softmax",
    "decode_head.": "of segmentation",
    "auxiliary_head.": "of segmentation",
    "fpn": "of segmentation",
    "roi_heads.": "of detection",
    "proposal_generator.": "of detection",
}
HEADS = ("head.", "lm_head.", "cls_pt_lm_head.")
PATCHES = "patch_embed.proj.weight"


@dataclass(frozen=True)
class KeyReport:
    """What happened to every tensor, under official names."""

    source: str  # the checkpoint
    loaded: tuple[str, ...]  # tensors of the model, including resized ones
    resized: dict[str, str]  # tables, position embeddings and patch embeddings -> from which size to which
    expanded: int  # blocks that got a copy of the shared bias table; 0 without one, or if it stayed shared
    dropped: dict[str, str]  # tensors of the checkpoint that were left out on purpose -> why
    missing: tuple[str, ...]  # tensors of the model that are not in the checkpoint; they keep their initial values
    unexpected: tuple[str, ...]  # tensors of the checkpoint that the model has no place for

    def log(self) -> None:
        """Logs the summary: a warning if a tensor has no place, or more is missing than the head for another task."""
        other_task = any(reason.startswith(("of ", "the head ")) for reason in self.dropped.values())
        new = ("head.", "fc_norm.", "lm_head.") if other_task else ()
        surprising = self.unexpected or any(n not in self.dropped and not n.startswith(new) for n in self.missing)
        (logger.warning if surprising else logger.info)("%s", self.summary())

    def summary(self) -> str:
        """Returns the report as one line."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(name)
        parts = {
            f"{counted(len(self.loaded), 'tensor')} loaded from {self.source}": True,
            f"its shared bias table copied into {counted(self.expanded, 'block')}": self.expanded,
            f"{len(self.resized)} resized ({', '.join(sorted(set(self.resized.values())))})": self.resized,
            **{f"dropped ({reason}): {listed(names)}": True for reason, names in reasons.items()},
            f"not in the checkpoint: {listed(self.missing)}": self.missing,
            f"no place in the model: {listed(self.unexpected)}": self.unexpected,
        }
        return "; ".join(part for part, applies in parts.items() if applies)


def load_pretrained(
    model: Backbone,
    source: str | Path,
    *,
    model_key: str = "",
    prefix: str = "",
    drop_head: bool = False,
    classes: Sequence[str] = (),
) -> KeyReport:
    """Loads a checkpoint of any dialect into a model.

    Bias tables and position embeddings are resized to the model's patch grid. A shared bias table is copied into every
    block if the model has one per block. A head of another size is left out, as are parts of other tasks: mask token,
    token head and final norm of a pre-training checkpoint (the norm does not become ``fc_norm``, as in the official
    code). ``model.metadata`` is set to what the checkpoint records, without ``labels`` if its head was not loaded.

    Args:
        model: The model to load into.
        source: A file, folder, released name, address or hub id; see :func:`beit.checkpoints.released.resolve`.
        model_key: Where in the file the weights are, alternatives separated by ``|``; by default a usual key.
        prefix: Take only names that begin with this prefix, and remove it.
        drop_head: Leave the head out even if it fits.
        classes: The model's classes; the rows of a head that fits are matched by name if the checkpoint names its own.

    Raises:
        InputError: There is no such checkpoint, or it is of another model.
    """
    weights, metadata = read_weights(source, model_key, prefix)
    if len(weights.get("head.weight", ())) == len(classes) and not drop_head:
        weights, metadata, _ = match_classes(weights, metadata, model.state_dict(), classes)
    report = load_weights(model, weights, metadata, drop_head=drop_head)
    report.log()
    return report


def open_checkpoint(
    source: str | Path, model_key: str = "", prefix: str = "", num_heads: int | None = None
) -> tuple[Backbone, Metadata]:
    """Opens a checkpoint, given as for :func:`read_weights`; see :func:`beit.zoo.open_model`."""
    weights, metadata = read_weights(source, model_key, prefix, num_heads=num_heads)
    if metadata.get("segmentation"):
        logger.info("%s is a segmentor: only its backbone is loaded, without the heads", metadata["source"])
    architecture = architecture_of(weights, metadata, images=True)
    with torch.device("meta"):  # to draw initial values would take longer than to read a checkpoint
        model = architecture.build()
    model.to_empty(device=torch.get_default_device())
    if model.relative_position_index is not None:
        model.relative_position_index.copy_(relative_position_index(model.patch_embed.grid_size))
    report = load_weights(model, weights, metadata)
    if report.missing:  # what no checkpoint replaces keeps its initial values
        model = architecture.build()
        report = load_weights(model, weights, metadata)
    (logger.warning if report.missing or report.unexpected else logger.info)("%s", report.summary())
    return model.eval(), metadata


def load_weights(model: Backbone, weights: Weights, metadata: Metadata, *, drop_head: bool = False) -> KeyReport:
    """Loads what :func:`read_weights` returns into a model, as :func:`load_pretrained` does.

    With ``drop_head`` the head is left out even if it fits. Raises :class:`InputError` for weights of another model.
    """
    source = metadata.get("source", "the weights")
    own = model.state_dict()
    given, expanded = _expand_shared_table(weights, own)
    _check_backbone(given, own, source, metadata)
    _check_recorded(model, given, source, metadata)
    given, resized = _resize(given, own, model.patch_embed.grid_size, metadata)
    given, dropped = _drop(given, own, metadata, drop_head)

    taken = {name: tensor for name, tensor in given.items() if name in own}
    if odd := [name for name, tensor in taken.items() if tensor.shape != own[name].shape]:
        raise _another_model(source, odd, taken, own)
    model.load_state_dict(taken, strict=False)
    # A new head has other classes than those the file names.
    model.metadata = {key: known for key, known in metadata.items() if key != "labels" or "head.weight" in taken}
    return KeyReport(
        source=source,
        loaded=tuple(taken),
        resized=resized,
        expanded=expanded,
        dropped=dropped,
        missing=tuple(name for name in own if name not in taken),
        unexpected=tuple(name for name in given if name not in own),
    )


def _expand_shared_table(weights: Weights, own: Weights) -> tuple[dict[str, Tensor], int]:
    """Copies a shared bias table into every block that both have, unless the model shares it too."""
    given = dict(weights)
    tables = [name for name in own if name.endswith(TABLE) and name.replace(TABLE, "proj.weight") in given]
    if SHARED_TABLE not in given or SHARED_TABLE in own or not tables:
        return given, 0
    shared = given.pop(SHARED_TABLE)
    return given | {name: shared + given[name] if name in given else shared for name in tables}, len(tables)


def _check_backbone(given: Weights, own: Weights, source: str, metadata: Metadata) -> None:
    """Raises an :class:`InputError` unless the whole backbone is there in the right shapes, resizable tensors aside."""
    backbone = (name for name in own if name.startswith(("cls_token", "patch_embed.", "blocks.")))
    needed = [name for name in backbone if not name.endswith(TABLE)]
    odd = [name for name in needed if name not in given or given[name].shape != own[name].shape]
    if metadata.get("dialect") == PLAIN_VIT:
        if "pos_embed" not in own:
            raise InputError(
                f"{source} is {PLAIN_VIT}, with absolute positions and no bias tables: build the model with "
                "use_abs_pos_emb=True, use_rel_pos_bias=False (--abs_pos_emb --disable_rel_pos_bias)"
            )
        if PATCHES in given and given[PATCHES].shape[:2] == own[PATCHES].shape[:2]:
            odd = [name for name in odd if name != PATCHES]  # of another size, to be resized
    if 2 * len(odd) > len(needed):
        fit = f"{len(needed) - len(odd)} of {len(needed)} tensors of the backbone fit"
        raise InputError(f"{source} is of another model: {fit}; it looks like {describe(given, metadata)}")
    scales = {name for name in (*needed, *given) if ".gamma_" in name}
    if scales and all((name in own) != (name in given) for name in scales):
        has, other, value = ("no", "one", 0) if any(name in own for name in scales) else ("a", "none", 0.1)
        settled = f"init_values={value} (--layer_scale_init_value {value})"
        raise InputError(f"{source} has {has} LayerScale and the model has {other}: build it with {settled}")
    odd += [n for n in given if n.startswith("blocks.") and n not in own and not n.endswith((TABLE, "k_bias"))]
    if odd:
        raise _another_model(source, odd, given, own)


def _check_recorded(model: Backbone, given: Weights, source: str, metadata: Metadata) -> None:
    """Compares the attention heads (columns of bias tables) and takes over eps: no shape shows them."""
    heads = metadata.get("num_heads", model.num_heads)
    if heads != model.num_heads and not any(name.endswith(TABLE) for name in given):
        problem = f"{source} is of another model, of {heads} heads and not {model.num_heads}"
        raise InputError(f"{problem}: build it with num_heads={heads}")
    for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        norm.eps = metadata.get("layer_norm_eps", norm.eps)


def _another_model(source: str, odd: list[str], given: Weights, own: Weights) -> InputError:
    return InputError(
        f"{source} is a checkpoint of another model: it differs in {counted(len(odd), 'tensor')} "
        f"({differences(odd, given, own)}); check the model's name and options"
    )


def describe(weights: Weights, metadata: Metadata) -> str:
    """Returns the model of weights in official names in a few words."""
    try:
        found = architecture_of(weights, metadata)
    except (InputError, KeyError, ValueError):
        return f"a part of a model, such as {listed(weights)}"
    a = found.arguments
    kind = "pre-trained BEiT" if found.masked else "BEiT segmentor" if is_segmentor(weights) else "BEiT classifier"
    return (
        f"a {kind} with {counted(a['depth'], 'block')}, {a['embed_dim']} channels, patches of {a['patch_size'][0]} x "
        f"{a['patch_size'][1]} pixels, {counted(a['in_chans'], 'colour channel')}"
    )


def _resize(
    given: dict[str, Tensor], own: Weights, target: tuple[int, int], metadata: Metadata
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Resizes tables and positions to the model's patch grid, copies of a shared table as one, and a ViT's patches."""
    resizable = [name for name in given if name in own and (name.endswith(TABLE) or name == "pos_embed")]
    window = window_of({name: given[name] for name in (*resizable, PATCHES)}, metadata, target)
    resized: dict[str, str] = {}
    if (size := given[PATCHES].shape[2:]) != (wanted := own[PATCHES].shape[2:]):
        given[PATCHES] = resample_patch_embed(given[PATCHES], list(wanted))
        resized[PATCHES] = f"patches of {size[0]} x {size[1]} to {wanted[0]} x {wanted[1]} pixels"
    if window is None or window == target:
        return given, resized
    cache: dict[int, Tensor] = {}
    for name in resizable:
        tensor = given[name]
        if id(tensor) not in cache:
            resize = resize_position_embedding if name == "pos_embed" else resize_table
            half = tensor.dtype in (torch.float16, torch.bfloat16)
            cache[id(tensor)] = resize(tensor.float() if half else tensor, window, target)
        given[name] = cache[id(tensor)]
    note = f"{window[0]} x {window[1]} to {target[0]} x {target[1]} patches"
    return given, resized | dict.fromkeys(resizable, note)


def _drop(
    given: dict[str, Tensor], own: Weights, metadata: Metadata, drop_head: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Drops heads that do not fit or are not wanted, and parts of other tasks."""
    dropped: dict[str, str] = {}
    predicts_twice = any(name.startswith("cls_pt_") for name in own)
    if "fc_norm.weight" in own and "fc_norm.weight" not in given and "norm.weight" in given and "head.weight" in given:
        pooled = "its head was trained on the class token: build the model with use_mean_pooling=False to keep it"
        dropped |= {name: pooled for name in given if name.startswith("head.")}
    for head in HEADS:
        names = [name for name in given if name.startswith(head) and name not in dropped]
        different = [name for name in names if name in own and given[name].shape != own[name].shape]
        if names and drop_head:
            dropped |= dict.fromkeys(names, "the head was not wanted")
        elif different:
            sizes = len(given[different[0]]), len(own[different[0]])
            dropped |= dict.fromkeys(names, f"the head has {sizes[0]} outputs, the model {sizes[1]}")
        elif head == "lm_head." and metadata.get("dialect") in ("BEiT v2", "EVA") and not predicts_twice:
            dropped |= dict.fromkeys(names, f"{metadata['dialect']} predicts something else")
    for name in given:
        if name not in own and name not in dropped:
            reason = next((why for part, why in LEFT_OUT.items() if name.startswith(part) or name.endswith(part)), None)
            if reason == "of pre-training" and "target" in metadata:
                reason = f"of pre-training on {metadata['target']}"
            if reason:
                dropped[name] = reason
    return {name: tensor for name, tensor in given.items() if name not in dropped}, dropped
