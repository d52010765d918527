"""Compiling a model for training: one graph of fixed shapes. All else runs as it is written."""

import importlib
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def compile_for_training(model: nn.Module, *, recomputes: bool = False) -> None:
    """Compiles forward and backward into one graph at the first call, which takes minutes; a graph break is an error.

    Names and checkpoints do not change. ``recomputes``: whether the backward pass recomputes activations.
    """
    if recomputes:
        # Several processes get the graph in pieces, to exchange gradients as they come. Older PyTorch cannot cut one
        # that recomputes.
        dynamo: Any = importlib.import_module("torch._dynamo.config")
        dynamo.optimize_ddp = False
    model.compile(dynamic=False, fullgraph=True)


def uncompiled() -> AbstractContextManager[object]:
    """Runs a model compiled for training eagerly, as other shapes would recompile; does not import the compiler."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
