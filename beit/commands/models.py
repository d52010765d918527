"""``beit models``: the models with their sizes, and the released checkpoints."""

import sys
from fnmatch import fnmatchcase

import torch
from torch.utils.flop_counter import FlopCounterMode

from beit.checkpoints.released import RELEASED
from beit.commands.settings import ModelsConfig
from beit.errors import InputError, did_you_mean
from beit.zoo import create_model, list_models


def main(config: ModelsConfig) -> None:
    """Lists models with their cost per image, then released checkpoints; raises InputError if no name matches."""
    names = list_models(config.pattern)
    released = [row for name, row in RELEASED.items() if fnmatchcase(name, config.pattern)]
    if not names and not released:
        known = [*list_models(), *RELEASED]
        raise InputError(f"no model matches {config.pattern!r}{did_you_mean(config.pattern, known)}")
    width = max(len(name) for name in (*names, *(row.name for row in released)))
    for name in names:
        parameters, flops = measure(name)
        sys.stdout.write(f"{name:<{width}}  {parameters:>13,} parameters  {flops / 1e9:6.1f} GFLOPs\n")
    if released:
        sys.stdout.write("\nreleased checkpoints (for --init_from, --checkpoint, pretrained=, beit convert, ...):\n")
    for row in released:
        kind = "pre-trained" if row.num_classes is None else f"{row.num_classes:,} classes"
        sys.stdout.write(f"{row.name:<{width}}  {kind:>14}, {row.input_size} px, of {row.model}\n")


def measure(name: str) -> tuple[int, int]:
    """Returns a model's parameters and its backbone's multiply-adds (FLOPs) per image, measured on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = create_model(name)
        model.forward_features(torch.empty(1, 3, *model.img_size))  # type: ignore[operator]
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2
