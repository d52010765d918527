"""State-dict dialects: other libraries' names for the same parameters, in both directions. Functions on dicts.

Formats are listed in :data:`beit.registry.FORMATS`; a dialect is a :class:`~beit.checkpoints.formats.dialect.Dialect`.
"""

from torch import Tensor

from beit.checkpoints.formats.dialect import Dialect, Weights
from beit.checkpoints.formats.relatives import RELATIVES, Relative
from beit.checkpoints.formats.unilm import bare
from beit.registry import FORMATS, locate, resolve

UNKNOWN = "unknown"


def dialects() -> dict[str, Dialect]:
    """Returns the formats that can also be read."""
    found = {name: locate(entry) for name, entry in FORMATS.items()}
    return {name: dialect for name, dialect in found.items() if isinstance(dialect, Dialect)}


def recognise(state_dict: Weights) -> str:
    """Returns a dialect (``unilm`` for timm's files too), the name of one of :data:`RELATIVES`, or :data:`UNKNOWN`."""
    names = frozenset(bare(name) for name in state_dict)
    kin = next((relative.name for relative in RELATIVES if relative.matches(names, state_dict)), None)
    return kin or next((name for name, dialect in dialects().items() if dialect.matches(names)), UNKNOWN)


def relative(name: str) -> Relative | None:
    """Returns the relative of this name, or None for a dialect of BEiT itself."""
    return next((relative for relative in RELATIVES if relative.name == name), None)


def to_official(state_dict: Weights, dialect: str) -> dict[str, Tensor]:
    """Translates a state dict of a dialect from :func:`recognise` to official names, without index buffers.

    Raises :class:`InputError` if the dialect is unknown or of a model other than BEiT.
    """
    if (model := relative(dialect)) and model.to_official:
        return model.to_official(state_dict)
    return resolve(dialects(), dialect, "dialect").to_official(state_dict)
