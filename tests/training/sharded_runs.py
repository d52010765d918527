"""Small runs whose training state is split over processes, and the same runs without; used by test_fsdp.py.

Under torchrun with two processes: ``sharded_runs.py FOLDER`` trains every one of CASES both ways, goes on with the runs
that one process has left in FOLDER/one and FOLDER/plain, and leaves one in FOLDER/two.
"""

import sys
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch.distributed.tensor import DTensor

from beit.launch import end_at_once
from beit.modeling import VisionTransformerForMaskedImageModeling
from beit.storage import load_checkpoint, save_checkpoint
from beit.tasks.settings import SHARDABLE_OPTIMIZERS
from beit.training import distributed
from beit.training.checkpoint import RunFolder
from beit.training.fsdp import FullyShardedTrainer
from beit.training.loop import Trainer
from beit.training.optim import create_optimizer, parameter_groups
from beit.training.precision import Precision
from beit.training.session import open_session
from beit.training.state import LoopSettings, Period

CPU = torch.device("cpu")
EPOCHS, STEPS, IMAGES = 3, 3, 8
LR = 1e-2
CASES = {
    "adamw": {},
    "accumulated": {"update_freq": 2},
    "bf16": {"dtype": torch.bfloat16},
    "overflow": {"dtype": torch.float16, "overflow_at": 4},
    "checkpointed": {"grad_checkpointing": True},
    **{name: {"opt": name, "epochs": 1} for name in SHARDABLE_OPTIMIZERS[1:]},
}


class Images:
    """In every epoch other images, which all processes share out."""

    def __init__(self, update_freq=1):
        self.batch_size = IMAGES // update_freq // distributed.world_size()
        self.batches_per_epoch = STEPS * update_freq

    def epoch(self, epoch, first_batch=0):
        generator = torch.Generator().manual_seed(epoch)
        images = torch.randn(STEPS, IMAGES, 3, 16, 16, generator=generator).flatten(0, 1)
        for batch in range(first_batch, self.batches_per_epoch):
            start = (batch * distributed.world_size() + distributed.rank()) * self.batch_size
            yield {"image": images[start : start + self.batch_size]}


def network(grad_checkpointing=False):
    torch.manual_seed(0)
    model = VisionTransformerForMaskedImageModeling(
        img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=3, vocab_size=7, init_values=0.1,
        use_shared_rel_pos_bias=True, use_abs_pos_emb=False,
    )  # fmt: skip
    torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table, std=0.1)
    model.set_grad_checkpointing(grad_checkpointing)
    return model


def make_step(overflow_at=None):
    def step(model, batch, global_step):
        images = batch["image"]
        mask = torch.zeros(len(images), 4, 4, dtype=torch.bool)
        mask[:, 1, 1:3] = True
        logits = model(images, mask, masked_index=mask.flatten().nonzero().flatten())
        targets = (images[:, 0, 4, 4:12:4] > 0).long().flatten()  # a pixel of each masked patch
        loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        if global_step == overflow_at and distributed.rank() == distributed.world_size() - 1:
            # On one process alone: the gradients are infinite there, the loss is what it was.
            loss = loss + (loss * 1e38 - (loss * 1e38).detach())
        return loss, {}

    return step


def evaluate(model, _epoch):
    """On the main process only: the others have no images."""
    model.eval()
    total = torch.zeros(())
    if distributed.is_main():
        with torch.no_grad():
            outputs = model(next(Images().epoch(99))["image"][:2], torch.ones(2, 4, 4, dtype=torch.bool))
        total = outputs.square().mean()
    return {"score": distributed.sum_over_ranks(total).item()}


def make_trainer(
    sharded, folder, *, opt="adamw", update_freq=1, dtype=torch.float32, epochs=EPOCHS, overflow_at=None, **options
):
    model = network(**options)
    optimizer = create_optimizer(opt, parameter_groups(model, 0.05), lr=LR, fused=True, in_parts=sharded)
    settings = LoopSettings(
        total_steps=epochs * STEPS, period=Period("epoch", STEPS), update_freq=update_freq, clip_grad=1.0,
        save_every=STEPS, evaluate_every=STEPS, evaluate_average=True, best_metric="score",
    )  # fmt: skip
    precision = Precision(dtype, CPU)
    layers = {"layers": lambda model: model.blocks} if sharded else {}
    return (FullyShardedTrainer if sharded else Trainer)(
        model=model, step=make_step(overflow_at), loader=Images(update_freq), optimizer=optimizer,
        precision=precision, settings=settings, lr=lambda _: LR, folder=folder, ema=ModelEmaV3(model, decay=0.5),
        evaluate=evaluate, **layers,
    )  # fmt: skip


def go_on(trainer, folder, name="checkpoint-1.pth"):
    trainer.resume(load_checkpoint(folder / name), str(folder / name))
    trainer.fit()


def main(folder: Path) -> None:
    def run(name, sharded, resumed=False, **options):
        run_folder = RunFolder(folder / name) if distributed.is_main() else None
        trainer = make_trainer(sharded, run_folder, **options)
        go_on(trainer, folder / name) if resumed else trainer.fit()
        parameters = list(trainer.model.parameters())
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
        whole = sum(p.numel() for p in parameters)
        save_checkpoint(folder / name / f"held-by-{distributed.rank()}.pth", {"held": held, "whole": whole})
        distributed.barrier()

    with open_session(device="cpu", output_dir=None, settings="", seed=0):
        for name, options in CASES.items():
            for kind in ("ddp", "fsdp"):
                run(f"{name}-{kind}", kind == "fsdp", **options)
        run("two", True, epochs=2)
        for name in ("one", "plain"):
            run(name, True, resumed=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_at_once(0)  # as `launch` does
