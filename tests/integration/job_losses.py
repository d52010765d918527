"""Trains 20 steps of every job on one thread: ``python -m tests.integration.job_losses OUT.json`` writes the losses.

A change that should not move numbers reproduces them bit for bit on the same machine. Elsewhere they agree to what
another order of sums does (test_job_losses.py).
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from beit.__main__ import main as beit
from semantic_segmentation.__main__ import main as segmentation

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS, IMAGES, PIXELS = 20, 8, 32
TINY = ("patch_size=8", "embed_dim=32", "depth=4", "num_heads=2")


def write_images(folder):
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        image = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((40, 36))
        labels = Image.fromarray(rng.integers(1, 4, (5, 5), dtype=np.uint8)).resize((40, 36), Image.Resampling.NEAREST)
        for path, picture in (
            (f"classes/train/class{number % 2}", image),
            (f"classes/val/class{number % 2}", image),
            ("scenes/images/training", image),
            ("scenes/annotations/training", labels),
        ):
            (folder / path).mkdir(parents=True, exist_ok=True)
            picture.save(folder / path / f"{number}.png")
    (folder / "scenes" / "classes.txt").write_text("one\ntwo\nthree\n")


def commands(folder):
    """Returns each job's command line, in the flags that every version has."""
    run = ("--device", "cpu", "--amp_dtype", "fp32", "--num_workers", 0, "--no_pin_mem", "--seed", 3)
    batch = ("--batch_size", IMAGES // 2, "--update_freq", 2, "--epochs", STEPS)  # an epoch is one step
    classes = folder / "classes"
    return {
        "pretraining": (beit, (
            "pretrain", "--model", "beit_base_patch16_224_8k_vocab", "--model_kwargs", *TINY, "--input_size", PIXELS,
            "--data_path", classes / "train", "--discrete_vae_weight_path", GOLDEN / "dalle_small",
            "--second_input_size", PIXELS, "--num_mask_patches", 6,
            "--min_mask_patches_per_block", 2, "--warmup_epochs", 2, "--lr", 1e-3, "--clip_grad", 3.0, *batch, *run,
        )),
        "finetuning": (beit, (
            "finetune", "--model", "beit_base_patch16_224", "--model_kwargs", *TINY, "--input_size", PIXELS,
            "--data_path", classes, "--warmup_epochs", 2, "--lr", 1e-3, "--layer_decay", 0.75, "--mixup", 0.8,
            "--cutmix", 1.0, "--model_ema", "--disable_eval_during_finetuning", *batch, *run,
        )),
        "linear_probe": (beit, (
            "probe", "--model_kwargs", *TINY[1:], "--patch_size", 8, "--input_size", PIXELS, "--data_path", classes,
            "--batch_size_per_gpu", IMAGES // 2, "--update_freq", 2, "--epochs", STEPS, "--lr", 0.1,
            "--val_freq", STEPS, "--output_dir", "", *run,
        )),
        "dvae_training": (beit, (
            "dvae", "--data_path", classes / "train", "--input_size", PIXELS, "--num_tokens", 16, "--codebook_dim", 8,
            "--hidden_dim", 16, "--warmup_steps", 2, "--lr", 1e-3, "--eval_freq", STEPS, *batch, *run,
            "--quantizer", "gumbel", "--opt", "adamw", "--amp_dtype", "fp32",
        )),
        "segmentation": (segmentation, (
            "train", "upernet_beit_tiny_64_slide_ade20k", "--model_kwargs", *TINY, "--crop_size", PIXELS,
            "--image_scale", 40, 36, "--data_root", folder / "scenes", "--samples_per_gpu", IMAGES // 2,
            "--update_freq", 2, "--max_iters", 2 * STEPS, "--warmup_iters", 4, "--lr", 1e-3, "--drop_path", 0.1,
            "--slide_stride", PIXELS, "--no_validate", "--work_dir", folder / "segmentation", *run,
        )),
    }  # fmt: skip


def losses():
    """Returns the loss of each step of each job, as TensorBoard has them: float32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_images(folder)
            return {job: _losses_of(run, arguments, folder / job) for job, (run, arguments) in commands(folder).items()}
    finally:
        torch.set_num_threads(threads)


def _losses_of(run, arguments, log_dir):
    status = run([str(argument) for argument in (*arguments, "--log_dir", log_dir)])
    assert status == 0, arguments
    events = EventAccumulator(str(log_dir))
    events.Reload()
    return [event.value for event in events.Scalars("loss/loss")]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(losses(), indent=1) + "\n")
