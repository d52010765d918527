"""Compiling a model for training: one graph of fixed shapes. All else runs as it is written."""

import importlib
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def compile_for_training(model: nn.Module, *, recomputes: bool = False) -> None:
    """Makes a model's forward and backward pass one compiled graph, from the first call on, which takes minutes.

    A graph that would break is an error. Names and checkpoints stay what they are.

    Args:
        model: The model.
        recomputes: Whether it computes activations anew in the backward pass.
    """
    if recomputes:
        # Several processes get the graph in pieces, to exchange gradients as they come. Older PyTorch cannot cut one
        # that recomputes.
        dynamo: Any = importlib.import_module("torch._dynamo.config")
        dynamo.optimize_ddp = False
    model.compile(dynamic=False, fullgraph=True)


def uncompiled() -> AbstractContextManager[object]:
    """Runs what is compiled for training as it is written: other shapes would be compiled for minutes, to be used once.

    What no one has compiled anything with is left alone: it takes seconds to import.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
