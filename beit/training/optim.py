"""Parameter groups (weight decay, layer-wise learning rates) and optimizers by name."""

import importlib.util
import logging
from collections.abc import Callable, Collection, Sequence
from inspect import signature
from typing import Any

import timm.optim
import torch
from torch import nn

from beit.errors import InputError, did_you_mean
from beit.storage import Checkpoint

Group = dict[str, Any]  # of parameters, as optimizers take them

logger = logging.getLogger(__name__)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    no_decay: Collection[str] = (),
    layer_id: Callable[[str], int] | None = None,
    num_layers: int = 0,
    layer_decay: float = 1.0,
) -> list[Group]:
    """Sorts the trainable parameters into groups that share a learning-rate scale and a weight decay.

    1-D parameters, ``*.bias`` and the names in ``no_decay`` get no weight decay. With ``layer_id`` the learning rate of
    layer ``i`` is scaled by ``layer_decay ** (num_layers + 1 - i)``.

    ``layer_id`` maps a parameter name to its layer, from 0 (embeddings) to ``num_layers + 1`` (heads).

    Returns groups with ``params``, ``lr_scale``, ``weight_decay`` and ``decays``: whether a schedule changes the decay.

    Source: BEiT (arXiv 2106.08254), section 3.1 and appendix; the official scripts' grouping.
    """
    groups: dict[tuple[float, bool], Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in no_decay
        scale = layer_decay ** (num_layers + 1 - layer_id(name)) if layer_id else 1.0
        fresh = {"params": [], "lr_scale": scale, "weight_decay": weight_decay * decays, "decays": decays}
        groups.setdefault((scale, decays), fresh)["params"].append(parameter)
    return list(groups.values())


def create_optimizer(
    name: str,
    groups: Sequence[Group],
    *,
    lr: float,
    eps: float | None = None,
    betas: Sequence[float] | None = None,
    momentum: float = 0.9,
    fused: bool = False,
    in_parts: bool = False,
) -> torch.optim.Optimizer:
    """Builds any optimizer that timm knows by name; ``fused*`` is NVIDIA apex, or torch's fused kernels without it.

    The groups are those of :func:`parameter_groups`; ``lr`` is in force until a schedule sets another, ``eps`` and
    ``betas`` are the optimizer's default if None. ``fused`` is whether torch's fused kernels may be used, on CUDA and
    the CPU (there 4 times faster than the loop); ``in_parts`` whether parameters are sharded over processes, which
    neither apex nor torch's fused SGD supports.

    Raises:
        InputError: No optimizer has that name, or it cannot be built here.
    """
    name = name.lower().removeprefix("fused") if in_parts else name.lower()
    if name.startswith("fused") and importlib.util.find_spec("apex") is None:
        logger.warning("--opt %s: NVIDIA apex is not installed; using torch's fused %s instead", name, name[5:])
        name = name[len("fused") :]
    # adahessian needs second derivatives, which the training loop does not compute.
    known = [str(known) for known in timm.optim.list_optimizers(exclude_filters=["adahessian"])]
    if name not in known:
        raise InputError(f"unknown optimizer {name!r}{did_you_mean(name, known)}: choose adamw, sgd or another of timm")
    arguments: dict[str, Any] = {} if eps is None else {"eps": eps}
    arguments |= {"betas": tuple(betas)} if betas else {}
    if fused and name in (("adamw", "adam") if in_parts else ("adamw", "adam", "sgd")):
        arguments["fused"] = True
    try:
        return timm.optim.create_optimizer_v2(
            list(groups), opt=name, lr=lr, weight_decay=0.0, momentum=momentum, **arguments
        )
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise InputError(f"--opt {name} cannot be used: {' '.join(str(error).split())}") from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: Checkpoint, class_name: str | None, source: str) -> None:
    """Restores an optimizer's state from a checkpoint; its settings (betas, weight decay, …) stay this run's.

    State is per parameter, and for some optimizers per group (LAMB's step count): a group's entry is a setting if it is
    an argument of the optimizer or set by :func:`parameter_groups`.

    Raises:
        InputError: It was another optimizer (``class_name``; None if not recorded), or over other parameters.
    """
    own = type(optimizer).__name__
    if class_name not in (None, own):
        raise InputError(f"{source} holds the state of {class_name}, and this run's --opt is {own}: choose the same")
    groups, given = optimizer.state_dict()["param_groups"], state.get("param_groups", [])
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in given]:
        raise InputError(
            f"{source}: its optimizer has other parameter groups than this run; check --weight_decay, --layer_decay "
            "and what is frozen"
        )
    settings = {*signature(type(optimizer).__init__).parameters, "lr_scale", "decays"}
    renewed = [
        {**group, **{name: value for name, value in other.items() if name not in settings}}
        for group, other in zip(groups, given, strict=True)
    ]
    optimizer.load_state_dict({"state": state["state"], "param_groups": renewed})


def apply_schedules(
    optimizer: torch.optim.Optimizer, step: int, lr: Callable[[int], float], weight_decay: Callable[[int], float] | None
) -> None:
    """Sets every group's learning rate (times its scale) and weight decay for an optimizer step."""
    for group in optimizer.param_groups:
        group["lr"] = lr(step) * group.get("lr_scale", 1.0)
        if weight_decay is not None and group.get("decays"):
            group["weight_decay"] = weight_decay(step)
