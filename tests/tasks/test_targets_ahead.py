"""Targets that are found one batch ahead: the same batches, the same targets, the same run."""

import json

import numpy as np
import pytest
import torch
from beit.tasks.targets_ahead import TargetsAhead
from PIL import Image

from beit.config import read_command_line
from beit.storage import load_checkpoint
from beit.targets import PredictionTarget
from beit.tasks.pretraining import PretrainingConfig, main
from beit.tokenizers.dvae import DiscreteVAE, save_dvae
from beit.training.precision import Precision

CPU = torch.device("cpu")


class Doubled(PredictionTarget):
    """The double of what a batch holds; writes down which batches were asked for."""

    name, output_size = "the double", 1

    def __init__(self):
        self.asked = []

    def compute(self, batch, index):
        self.asked.append(int(batch["value"]))
        return 2 * batch["value"][index]

    def loss(self, outputs, targets, reduction="mean"):
        raise NotImplementedError


class Counting:
    """Batches 0, 1, 2, ... of an epoch of five; knows whether it was closed."""

    batch_size, batches_per_epoch, closed = 1, 5, False

    def epoch(self, epoch, first_batch=0):
        try:
            for number in range(first_batch, 5):
                yield {"value": torch.tensor([10 * epoch + number])}
        finally:
            self.closed = True


@pytest.fixture
def ahead():
    def prepare(batch):
        return {**batch, "patch_index": torch.zeros(1, dtype=torch.int64)}

    return TargetsAhead(Counting(), Doubled(), prepare, Precision(torch.float32, CPU))


@pytest.mark.parametrize("first", [0, 3, 5])
def test_every_batch_comes_once_with_its_own_targets(ahead, first):
    # Breaks when a batch gets another's targets, the last is lost, or a run that goes on in an epoch begins anew.
    batches = list(ahead.epoch(2, first))
    assert [int(batch["value"]) for batch in batches] == [20 + number for number in range(first, 5)]
    assert [int(batch["targets"]) for batch in batches] == [2 * (20 + number) for number in range(first, 5)]


def test_the_next_batch_is_asked_for_before_this_one_is_handed_over(ahead):
    # Breaks when targets are found only once their batch is needed: nothing would run beside the training step.
    batches = ahead.epoch(0)
    next(batches)
    assert ahead.target.asked == [0, 1]
    next(batches)
    assert ahead.target.asked == [0, 1, 2]


def test_a_run_that_stops_within_an_epoch_ends_the_loader(ahead):
    # Breaks when worker processes are left behind by a run that was told to stop.
    batches = ahead.epoch(0)
    next(batches)
    batches.close()
    assert ahead.loader.closed


@pytest.mark.parametrize("target", ["tokens", "pixels"])
def test_a_run_with_targets_ahead_is_the_same_to_the_bit(tmp_path, target):
    # Breaks when targets belong to other patches or images, or number formats differ.
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(10):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{number}.png")
    save_dvae(tmp_path / "dvae", DiscreteVAE(image_size=32, num_tokens=16, codebook_dim=8, num_layers=3, hidden_dim=8))
    flags = f"""
        --model beit_tiny_patch16_224_8k_vocab --input_size 32 --second_input_size 32 --num_mask_patches 6
        --min_mask_patches_per_block 2 --model_kwargs patch_size=8 embed_dim=32 depth=2 num_heads=2 --batch_size 2
        --epochs 2 --warmup_epochs 0 --num_workers 0 --amp_dtype bf16 --update_freq 2 --device cpu --target {target}
        --discrete_vae_type customized
    """.split()
    folders = {"--data_path": tmp_path / "images", "--discrete_vae_weight_path": tmp_path / "dvae"}
    flags += [str(word) for pair in folders.items() for word in pair]
    runs = {}
    for name, more in (("plain", []), ("ahead", ["--tokenizer_stream"])):
        words = [*flags, "--output_dir", str(tmp_path / name), *more]
        main(read_command_line(PretrainingConfig, words, "prog", ""))
        lines = (tmp_path / name / "log.txt").read_text().splitlines()
        weights = load_checkpoint(tmp_path / name / "checkpoint-1.pth")["model"]
        runs[name] = [json.loads(line)["train_loss"] for line in lines], weights
    assert runs["ahead"][0] == runs["plain"][0]
    assert all(torch.equal(value, runs["plain"][1][key]) for key, value in runs["ahead"][1].items())
