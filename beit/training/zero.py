"""The training loop on DeepSpeed: the optimizer's state (stage 1) and the gradients (stage 2) split over processes.

Source: ZeRO, arXiv 1910.02054.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from beit.errors import InputError, counted
from beit.storage import Checkpoint
from beit.training import distributed
from beit.training.checkpoint import BEST, folder_beside, load_exactly, numbered_file
from beit.training.sharded import ShardedTrainer
from beit.training.state import Batch

CONFIG_FILE = "deepspeed_config.json"
NO_CLIPPING = 1e9  # a limit that no norm reaches: without any, DeepSpeed does not measure the norm
# What DeepSpeed's own files may build when they are opened; anything else in them is refused before it runs.
ALLOWED_GLOBALS = {
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
}


@dataclass(kw_only=True)
class DeepSpeedTrainer(ShardedTrainer):
    """A trainer on DeepSpeed's engine, whose checkpoints are DeepSpeed's folders.

    Args:
        zero_stage: 0 shards nothing, 1 the optimizer's state, 2 the gradients too.

    Raises:
        InputError: DeepSpeed is not installed, or does not support these settings.
    """

    zero_stage: int = 0
    names_folder: ClassVar[str] = "deepspeed"

    def __post_init__(self) -> None:
        super().__post_init__()
        deepspeed = _import_deepspeed(self._device.type)
        self._norm: Tensor | None = None  # of stage 0, which does not keep it
        settings = self.deepspeed_config()
        self.records[CONFIG_FILE] = (json.dumps(settings, indent=2) + "\n").encode()
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=settings, dist_init_required=False
        )

    def deepspeed_config(self) -> dict[str, object]:
        """Returns DeepSpeed's settings, which are also written to ``deepspeed_config.json``."""
        settings: dict[str, object] = {
            "train_batch_size": self.images_per_step,
            "train_micro_batch_size_per_gpu": self.loader.batch_size,
            "gradient_accumulation_steps": self.settings.update_freq,
            "gradient_clipping": self.settings.clip_grad or NO_CLIPPING,
            "zero_optimization": {"stage": self.zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        if self.precision.dtype != torch.float32:
            dtype = str(self.precision.dtype).removeprefix("torch.")
            settings["torch_autocast"] = {"enabled": True, "dtype": dtype}
        return settings

    def _distribute(self) -> nn.Module:
        return self._engine

    def _backward(
        self, model: nn.Module, batch: Batch, global_step: int, last: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.step(model, batch, global_step)
        self._engine.backward(loss)  # divides by the number of batches itself
        if last and self.zero_stage == 0:
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients) / self._loss_scale()
        self._engine.step()  # acts on the last batch only
        return loss, metrics

    def _update(self) -> Tensor:
        """Returns the norm of the gradients of the update that :meth:`_backward` has made."""
        norm = self._norm if self.zero_stage == 0 else self._engine.get_global_grad_norm()
        return torch.as_tensor(float("nan") if norm is None else norm, device=self._device)

    def _loss_scale(self) -> float:
        if self.precision.dtype != torch.float16:
            return 1.0
        scaler = self._engine.torch_autocast_z0_gradscaler
        return float(scaler.get_scale() if scaler else getattr(self.optimizer, "cur_scale", 1.0))

    def _training_state(self) -> dict[str, object]:
        return {}  # it lies in DeepSpeed's folder

    def _write_pieces(self, folder: Path, _state: Checkpoint) -> None:
        self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def _take_over(self, checkpoint: Checkpoint, source: str) -> None:
        """Restores a checkpoint that DeepSpeed wrote for as many processes; :class:`InputError` for any other."""
        if "deepspeed" not in checkpoint:
            kept = Path(source).with_name(numbered_file(checkpoint.get("epoch", 0)))
            remedy = (
                f"the best checkpoint holds no state of the optimizer: resume {kept if kept.exists() else 'another'}"
                if Path(source).name == BEST
                else "it was not written by DeepSpeed: leave --enable_deepspeed out"
            )
            raise InputError(
                f"{source} cannot be resumed; {remedy}, or start from its weights with --finetune or --init_from"
            )
        load_exactly(self.model, checkpoint["model"], source)
        folder = folder_beside(source, checkpoint["deepspeed"])
        self._check_files(folder)
        loaded, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
        if loaded is None:
            raise InputError(f"{folder} holds no DeepSpeed checkpoint; choose another --resume")

    def _check_files(self, folder: Path) -> None:
        """Makes sure that the files are for this number of processes, and run no code when opened."""
        pieces = len(list(folder.glob("*_optim_states.pt")))
        if self.zero_stage > 0 and pieces != distributed.world_size():
            raise InputError(
                f"{folder} was written by {counted(pieces, 'process')} with --zero_stage 1 or 2 and can be resumed by "
                f"as many, not by {distributed.world_size()}"
            )
        for file in sorted(folder.glob("*.pt")):
            try:
                foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - ALLOWED_GLOBALS
            except (RuntimeError, ValueError) as error:
                raise InputError(f"{file} cannot be read: {error}") from error
            if foreign:
                raise InputError(f"{file} would run {', '.join(sorted(foreign))} when opened: refused")


def _import_deepspeed(device_type: str) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device_type)  # else it takes the GPU of a run that was sent to the CPU
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(
            "--enable_deepspeed needs DeepSpeed: pip install deepspeed, or leave the flag out; "
            "--update_freq and --grad_checkpointing save memory without it"
        ) from error
    if device_type == "cpu":  # else a first run compiles C++ for a minute, or fails for want of a compiler: gloo does
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
