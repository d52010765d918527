"""The training loop with FSDP2: weights, gradients and optimizer state are sharded over the processes.

Weights are gathered layer by layer, and gradients averaged, in float32; autocast picks the number format of the
products. So a step computes the same numbers as ``DistributedDataParallel``; gathering in bfloat16 would halve the
traffic, but also round the LayerNorms, LayerScale and bias tables. Autocast keeps its rounded weights for the backward
pass, 2 bytes per weight of the whole model, unless blocks are recomputed. Gradients are exchanged once per step: with
``update_freq`` > 1 each process accumulates them whole, 4 bytes per weight.

Source: ZeRO, arXiv 1910.02054 (stage 3); PyTorch FSDP, arXiv 2304.11277.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from beit.checkpoints.pieces import OPTIMIZER, STATE_FILE, WEIGHTS, read_optimizer, split_optimizer, write_pieces
from beit.errors import InputError
from beit.storage import Checkpoint, save_checkpoint
from beit.training import distributed
from beit.training.checkpoint import PIECES, folder_beside, load_exactly
from beit.training.sharded import ShardedTrainer
from beit.training.state import Batch


@dataclass(kw_only=True)
class FullyShardedTrainer(ShardedTrainer):
    """A trainer that shards weights, gradients and optimizer state equally over the processes.

    Args:
        layers: Returns a module's layers, each gathered as a unit; all else stays gathered while the module runs.

    Raises:
        InputError: The device or PyTorch has no support for it.
    """

    layers: Callable[[nn.Module], Iterable[nn.Module]] = nn.Module.children
    names_folder: ClassVar[str] = PIECES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._device.type not in ("cuda", "cpu"):
            raise InputError(f"--shard fsdp needs --device cuda or cpu; this run is on {self._device.type}")
        if not hasattr(FSDPModule, "set_reshard_after_forward"):
            raise InputError(f"--shard fsdp needs PyTorch 2.8 or newer; this is {torch.__version__}")
        self._mesh = init_device_mesh(self._device.type, (distributed.world_size(),))
        whole = {parameter: name for name, parameter in self.model.named_parameters()}
        self._split(self.model)
        if self.ema is not None:
            self._split(self.ema.module)
        parts = dict(self.model.named_parameters())
        for group in self.optimizer.param_groups:  # it has no state yet
            group["params"] = [parts[whole[parameter]] for parameter in group["params"]]

    def _split(self, module: nn.Module) -> None:
        for layer in self.layers(module):
            fully_shard(layer, mesh=self._mesh, reshard_after_forward=True)
        fully_shard(module, mesh=self._mesh, reshard_after_forward=False)

    def _distribute(self) -> nn.Module:
        return self.model

    def _backward(
        self, model: nn.Module, batch: Batch, global_step: int, last: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(last)
        return super()._backward(model, batch, global_step, last)

    def _update(self) -> Tensor:
        norm = super()._update()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _evaluate(self, module: nn.Module, number: int) -> dict[str, float]:
        with _gathered(module):
            return super()._evaluate(module, number)

    @property
    def _makes_checkpoints(self) -> bool:
        return bool(self._root)  # all processes have a part of the weights

    def _weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Gathers the weights one by one on the host of the process with the run folder; returns none elsewhere."""
        weights = {}
        for name, tensor in module.state_dict().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.folder is not None:
                weights[name] = whole.cpu()
        return weights

    def _training_state(self) -> dict[str, object]:
        return {"optimizer_class": type(self.optimizer).__name__, "scaler": self.precision.state_dict()}

    def _write_pieces(self, folder: Path, state: Checkpoint) -> None:
        tensors, rest = split_optimizer(self.optimizer.state_dict())
        modules = {"model": self.model, **({"model_ema": self.ema.module} if self.ema is not None else {})}
        for key, module in modules.items():
            tensors |= {f"{key}.{name}": tensor for name, tensor in module.state_dict().items()}
        small = {key: value for key, value in state.items() if key not in WEIGHTS} | {OPTIMIZER: rest}
        distributed.on_main(lambda: save_checkpoint(folder / STATE_FILE, small))  # if it cannot, none goes on
        write_pieces(folder, tensors)

    def _load_weights(self, module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
        own = module.state_dict()
        load_exactly(module, {name: _part_of(tensor, own.get(name)) for name, tensor in weights.items()}, source)

    def _optimizer_state(self, checkpoint: Checkpoint, source: str) -> Checkpoint:
        """Returns this process's part of the optimizer's state, from pieces or from a plain checkpoint."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

        def room(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
            match = re.match(rf"{OPTIMIZER}\.(\d+)\.", name)
            index = int(match[1]) if match else len(parameters)
            fits = index < len(parameters) and parameters[index].shape == size
            return torch.zeros_like(parameters[index], dtype=dtype) if fits else torch.zeros(size, dtype=dtype)

        if PIECES in checkpoint:
            return read_optimizer(folder_beside(source, checkpoint[PIECES]), room)
        state = checkpoint["optimizer"]
        parts = {
            index: {key: _part_of(value, parameters[index]) for key, value in entry.items()}
            for index, entry in state["state"].items()
            if index < len(parameters)
        }
        return {**state, "state": parts}


def _part_of(whole: Any, like: Any) -> Any:
    """Returns this process's part of a tensor that all of them have; what has another shape stays as it is."""
    if not (isinstance(whole, Tensor) and isinstance(like, DTensor) and whole.shape == like.shape):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


@contextlib.contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """Gathers all weights everywhere for a while: in an evaluation one process may have more batches than another."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not module, recurse=False)
            part.reshard()
