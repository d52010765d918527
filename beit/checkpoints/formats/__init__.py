"""State-dict dialects: what other libraries call the same parameters, in both directions. Pure functions on dicts."""

from collections.abc import Mapping

from torch import Tensor

from beit.checkpoints.formats import huggingface, mmseg, timm, unilm
from beit.checkpoints.formats.relatives import RELATIVES, Relative, relative_of
from beit.errors import InputError, did_you_mean

DIALECTS = ("unilm", "huggingface", "timm", "mmsegmentation", "mmpretrain")
UNKNOWN = "unknown"

__all__ = ["DIALECTS", "RELATIVES", "UNKNOWN", "Relative", "from_official", "recognise", "relative", "to_official"]


def recognise(state_dict: Mapping[str, Tensor]) -> str:
    """Names the dialect of a state dict.

    Returns:
        One of :data:`DIALECTS` (``unilm`` also stands for timm, whose names are the same), or the name of a relative in
        :data:`RELATIVES`, or :data:`UNKNOWN`.
    """
    names = frozenset(unilm.bare(name) for name in state_dict)
    found = relative_of(names, state_dict)
    if found is not None:
        return found.name
    if any("embeddings.patch_embeddings.projection." in name or "encoder.layer.0." in name for name in names):
        return "huggingface"
    if any(name.startswith("layers.0.") and ".ln1." in name for name in names):
        return "mmsegmentation" if any(name.startswith("decode_head.") for name in names) else "mmpretrain"
    if any(name.startswith("blocks.0.attn.qkv.") for name in names):
        return "unilm"
    return UNKNOWN


def relative(name: str) -> Relative | None:
    """Returns the relative of this name, or None for a dialect of BEiT itself."""
    return next((relative for relative in RELATIVES if relative.name == name), None)


def to_official(state_dict: Mapping[str, Tensor], dialect: str) -> dict[str, Tensor]:
    """Translates a state dict to official names, without index buffers.

    Args:
        state_dict: The parameters.
        dialect: What :func:`recognise` said.

    Raises:
        InputError: The dialect is unknown or of a model that is not BEiT.
    """
    model = relative(dialect)
    if dialect in ("unilm", "timm") or (model is not None and model.loads):
        return unilm.to_official(state_dict)
    if dialect == "huggingface":
        return huggingface.to_official(state_dict)
    if dialect in ("mmsegmentation", "mmpretrain"):
        return mmseg.to_official(state_dict)
    raise _no_such(dialect)


def from_official(
    weights: Mapping[str, Tensor], dialect: str, *, position_index: Tensor | None = None
) -> dict[str, Tensor]:
    """Translates weights in official names to a dialect.

    Args:
        weights: The parameters.
        dialect: One of :data:`DIALECTS`.
        position_index: Rows of the bias tables, int64 ``(N + 1, N + 1)``, for the dialects whose files hold them.

    Raises:
        InputError: There is no such dialect, or the other library has no such model.
    """
    if dialect == "unilm":
        return unilm.from_official(weights, position_index)
    if dialect == "timm":
        return timm.from_official(weights)
    if dialect == "huggingface":
        return huggingface.from_official(weights)
    if dialect == "mmsegmentation":
        return mmseg.to_mmsegmentation(weights, position_index)
    if dialect == "mmpretrain":
        return mmseg.to_mmpretrain(weights, position_index)
    raise _no_such(dialect)


def _no_such(dialect: str) -> InputError:
    return InputError(f"no dialect {dialect!r}{did_you_mean(dialect, DIALECTS)}; there are {', '.join(DIALECTS)}")
