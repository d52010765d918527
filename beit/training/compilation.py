"""Compiling a model for training: one graph of fixed shapes. All else runs as it is written."""

import importlib
import logging
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)
_starts: list[float] = []  # of the compilation that is going on, in seconds


def compile_for_training(model: nn.Module, *, recomputes: bool = False) -> None:
    """Compiles forward and backward into one graph at the first call, which takes minutes; a graph break is an error.

    Names and checkpoints do not change. The seconds of both passes are logged. ``recomputes``: whether the backward
    pass recomputes activations.
    """
    callbacks: Any = importlib.import_module("torch._dynamo.callback").callback_handler
    if _tell_seconds not in callbacks.end_callbacks:  # once a process
        callbacks.register_start_callback(_note_start)
        callbacks.register_end_callback(_tell_seconds)
    if recomputes:
        # Several processes get the graph in pieces, to exchange gradients as they come. Older PyTorch cannot cut one
        # that recomputes.
        dynamo: Any = importlib.import_module("torch._dynamo.config")
        dynamo.optimize_ddp = False
    model.compile(dynamic=False, fullgraph=True)


def _note_start(*_: object) -> None:
    _starts.append(time.perf_counter())


def _tell_seconds(*_: object) -> None:
    logger.info("compiled in %.0f s", time.perf_counter() - _starts.pop())


def uncompiled() -> AbstractContextManager[object]:
    """Runs a model compiled for training eagerly, as other shapes would recompile; does not import the compiler."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
