"""Batch normalisation over the batches of all processes, on a GPU by torch, on a CPU, where torch has none, here."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def synchronise_batch_norm(model: Model) -> Model:
    """Makes every batch normalisation of a model take its statistics over all processes.

    Parameters and buffers stay the same objects under the same names, so that an optimizer goes on and checkpoints do
    not tell the difference. Outside of a process group, and in evaluation mode, nothing changes.

    Args:
        model: Where it will be trained: torch's layer is taken if its first parameter is on a GPU, ours otherwise.

    Returns:
        The model, changed in place.
    """
    if next(model.parameters()).device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, _with_tensors_of(child))
    return model


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """What ``nn.SyncBatchNorm`` is on a GPU, in plain operations: the same numbers as one process over the whole batch.

    It is no subclass of torch's, which ``DistributedDataParallel`` refuses on a CPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalises ``(B, C, h, w)``; processes may have different numbers of images and positions."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        # float16 and bfloat16 have too few digits for sums over a batch.
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        own_count = values.new_tensor([values.numel() // values.shape[1]])
        totals = _sum_over_processes(torch.cat((values.sum(dim=(0, 2, 3)), own_count)))
        count = totals[-1]
        mean = totals[:-1] / count
        centred = values - _channelwise(mean)
        variance = _sum_over_processes(centred.square().sum(dim=(0, 2, 3))) / count
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        normal = centred * _channelwise((variance + self.eps).rsqrt())
        if self.affine:
            normal = normal * _channelwise(self.weight) + _channelwise(self.bias)
        return normal.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), share)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes. Each one's loss depends on it, hence so does the gradient's sum."""

    @staticmethod
    def forward(_ctx: Any, tensor: Tensor) -> Tensor:
        return _all_reduced(tensor)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return _all_reduced(gradients[0])


def _all_reduced(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    # An alias: gloo's thread may hold `total` a little longer, and must not be the one to free a graph of Python nodes,
    # which ends the process with an abort if the interpreter is on its way out.
    return total.detach()


def _sum_over_processes(tensor: Tensor) -> Tensor:
    return _SumOverProcesses.apply(tensor)


def _channelwise(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _with_tensors_of(norm: nn.BatchNorm2d) -> CPUSyncBatchNorm:
    synchronised = CPUSyncBatchNorm(
        norm.num_features, norm.eps, norm.momentum, affine=norm.affine, track_running_stats=norm.track_running_stats
    )
    for name, parameter in norm.named_parameters():
        setattr(synchronised, name, parameter)
    for name, buffer in norm.named_buffers():
        setattr(synchronised, name, buffer)
    return synchronised.train(norm.training)
