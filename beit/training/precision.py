"""Number formats: which one a run computes in, and the loss scaling that float16 needs."""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from beit.errors import InputError

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_amp_dtype(name: str, device: torch.device, *, bf16_cpu: bool = False) -> torch.dtype:
    """Turns ``auto``, ``bf16``, ``fp16`` or ``fp32`` into the dtype of the forward pass on a device.

    ``auto`` is bf16 on GPUs that compute in it, float16 on older ones (V100), float32 elsewhere; with ``bf16_cpu`` bf16
    on CPUs that multiply in it (AMX, AVX-512 BF16) too. Raises :class:`InputError` for float16 where gradients cannot
    be scaled.
    """
    if name != "auto":
        if name == "fp16" and device.type != "cuda":
            raise InputError(f"--amp_dtype fp16 needs a CUDA device, this run is on {device.type}: use bf16 or fp32")
        return AMP_DTYPES[name]
    if device.type != "cuda":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # if this torch can tell
        multiplies = any(capabilities.get(unit) for unit in ("amx_bf16", "avx512_bf16"))
        return torch.bfloat16 if bf16_cpu and device.type == "cpu" and multiplies else torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


class Precision:
    """Runs forward, backward and the optimizer step on a device in float32, bfloat16 or float16 (with loss scaling)."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Returns the context in which the forward pass and the loss run."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss, scaled where the format needs it."""
        self.scaler.scale(loss).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], max_norm: float | None
    ) -> Tensor:
        """Clips the gradients, updates the parameters and clears the gradients, without waiting for the device.

        Returns the norm before clipping, on the device; if it is not finite (float16 overflow), nothing is updated.
        """
        self.scaler.unscale_(optimizer)
        if max_norm is None:
            norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        else:
            norm = clip_grad_norm_(parameters, max_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    @property
    def loss_scale(self) -> float:
        """The current factor on the loss: 1 except in float16."""
        return self.scaler.get_scale()

    def state_dict(self) -> dict[str, object]:
        """Returns the scaler's state; empty except in float16."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restores the scaler's state; a state from a run in another format is left aside."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)
