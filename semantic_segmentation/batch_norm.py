"""Batch normalisation synchronised over all processes: torch's on GPUs, our own on CPUs, where torch has none."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from beit.training.distributed import sum_over_ranks, world_size

Model = TypeVar("Model", bound=nn.Module)


def synchronise_batch_norm(model: Model) -> Model:
    """Makes every batch norm of a model, in place, compute its statistics over all processes.

    Parameters and buffers stay the same objects under the same names, so optimizers and checkpoints are not affected.
    Without a process group, and in evaluation mode, nothing changes. The model must be on the device it will be
    trained on: torch's layer is used if its first parameter is on a GPU.
    """
    if next(model.parameters()).device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CPUSyncBatchNorm  # which adds no state
    return model


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """``nn.SyncBatchNorm`` in plain operations: the same result as one process over the whole batch.

    Not a subclass of torch's, which ``DistributedDataParallel`` refuses on a CPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalises ``(B, C, h, w)``; processes may have different numbers of images and positions."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        # float16 and bfloat16 are too coarse for sums over a batch.
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        own_count = values.new_tensor([values.numel() // values.shape[1]])
        totals = _SumOverProcesses.apply(torch.cat((values.sum(dim=(0, 2, 3)), own_count)))
        count = totals[-1]
        mean = totals[:-1] / count
        centred = values - mean[:, None, None]
        variance = _SumOverProcesses.apply(centred.square().sum(dim=(0, 2, 3))) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            unbiased = (variance * (count / (count - 1))).detach()
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), share)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        normal = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            normal = normal * self.weight[:, None, None] + self.bias[:, None, None]
        return normal.to(input.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """Sums a tensor over all processes; as every process's loss depends on it, so the gradient is summed too."""

    @staticmethod
    def forward(_ctx: Any, tensor: Tensor) -> Tensor:
        return _all_reduced(tensor)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return _all_reduced(gradients[0])


def _all_reduced(tensor: Tensor) -> Tensor:
    # An alias: gloo's thread may hold the sum a little longer, and if it were the one to free a graph of Python nodes
    # while the interpreter shuts down, the process would abort.
    return sum_over_ranks(tensor.clone()).detach()
