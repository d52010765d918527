"""The tokenizer's training: schedules, objective, evaluation; a run that was killed, and one on two processes."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit.errors import InputError
from beit.tasks.base import run as run_task
from beit.tasks.dvae_training import (
    DvaeConfig,
    DvaeTraining,
    EvenlySpread,
    HardTokenEvaluation,
    Reconstruction,
    RelaxedAutoencoder,
    loss_schedules,
    main,
    side_by_side,
    warn_of_collapse,
)
from beit.tokenizers.base import load_tokenizer
from beit.tokenizers.dvae import DiscreteVAE, batch_perplexity
from beit.training.state import LoopSettings, Period
from tests.shell import run

CPU = torch.device("cpu")
SMALL = {"num_tokens": 16, "codebook_dim": 8, "num_layers": 2, "hidden_dim": 8}
SETTINGS = {"codebook_size" if name == "num_tokens" else name: size for name, size in SMALL.items()}


def small_vae() -> DiscreteVAE:
    torch.manual_seed(0)
    vae = DiscreteVAE(16, **SMALL)
    torch.nn.init.normal_(vae.head.weight)  # decided tokens, several of them
    return vae


def some_images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# Schedules


def settings_of(total_steps: int) -> LoopSettings:
    return LoopSettings(total_steps=total_steps, period=Period("epoch", total_steps))


def test_the_temperature_is_a_cosine_over_its_share_of_the_run_and_then_constant():
    temperature, _ = loss_schedules(DvaeConfig(temperature_share=0.5), settings_of(200))
    naive = [1 / 16 + (1 - 1 / 16) * (1 + math.cos(math.pi * min(step, 100) / 100)) / 2 for step in range(200)]
    assert [temperature(step) for step in range(200)] == pytest.approx(naive)
    assert temperature(0) == 1
    assert temperature(150) == 1 / 16


def test_the_kl_weight_grows_linearly_from_zero_and_stays():
    _, weight = loss_schedules(DvaeConfig(kl_weight=0.5, kl_warmup_share=0.1), settings_of(110))
    assert weight(0) == 0  # a weight from the first step on closes codes before they mean anything
    assert [weight(step) for step in range(11)] == pytest.approx([0.05 * step for step in range(11)])
    assert {weight(step) for step in range(11, 110)} == {0.5}


def test_durations_in_steps_win_over_shares():
    config = DvaeConfig(temperature_steps=10, kl_warmup_steps=0, kl_weight=0.5)
    temperature, weight = loss_schedules(config, settings_of(1000))
    assert temperature(10) == 1 / 16
    assert weight(0) == 0.5


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ({"data_path": ""}, "--data_path"),
        ({"temperature_end": 0.0}, "--temperature_end"),
        ({"temperature_end": 2.0}, "--temperature_end"),
        ({"kl_weight": -1.0}, "--kl_weight"),
        ({"temperature_share": 1.5}, "--temperature_share"),
        ({"ema_decay": 1.0}, "--ema_decay"),
        ({"min_crop": 0.0}, "--min_crop"),
        ({"epochs": 0}, "--epochs"),
        ({"codebook_size": 1}, "--codebook_size"),
        ({"input_size": 4}, "--input_size"),
    ],
)
def test_settings_that_cannot_work_are_named(setting, flag):
    with pytest.raises(InputError, match=flag):
        run_task(DvaeTraining(DvaeConfig(**{"data_path": "images", "device": "cpu", **setting})))


# The objective


def test_the_loss_is_reconstruction_plus_kl_both_per_pixel_value():
    model, images = RelaxedAutoencoder(small_vae()), some_images(3)
    objective = Reconstruction(lambda step: {"temperature": 0.5 + step, "kl_weight": 0.25}, "mse")
    torch.manual_seed(5)
    loss, metrics = objective(model, {"image": images}, 1)

    torch.manual_seed(5)
    target = images.double() / 255 * 2 - 1
    logits = model.vae(target.float())
    noise = -torch.empty_like(logits).exponential_().log()
    codes = ((logits + noise) / 1.5).softmax(dim=1)
    output = model.vae.decoder(torch.einsum("bkhw,kd->bdhw", codes, model.vae.codebook.weight))
    reconstruction = (output.double() - target).square().mean()
    share = logits.double().softmax(dim=1)
    kl = (share * (share * 16).log()).sum(dim=(1, 2, 3)).mean()
    assert loss.item() == pytest.approx((reconstruction + 0.25 * kl / (3 * 16 * 16)).item(), rel=1e-5)
    assert metrics["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert metrics["temperature"].item() == 1.5
    assert metrics["kl_weight"].item() == 0.25


def test_every_parameter_gets_a_gradient():
    model = RelaxedAutoencoder(small_vae())
    loss, _ = Reconstruction(lambda _: {"temperature": 1.0, "kl_weight": 0.1}, "mse")(
        model, {"image": some_images(2)}, 0
    )
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # data parallelism waits for all


def test_logits_and_losses_are_float32_under_autocast():
    model = RelaxedAutoencoder(small_vae())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, metrics = Reconstruction(lambda _: {"temperature": 1.0, "kl_weight": 0.1}, "mse")(
            model, {"image": some_images(2)}, 0
        )
    assert loss.dtype == metrics["kl"].dtype == metrics["reconstruction_loss"].dtype == torch.float32


def test_batch_perplexity_counts_effective_codes():
    ids = torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]])
    assert batch_perplexity(ids, 10).item() == pytest.approx(4)
    assert batch_perplexity(torch.zeros(5, dtype=torch.int64), 10).item() == pytest.approx(1)
    skewed = torch.tensor([0] * 6 + [7] * 2)
    assert batch_perplexity(skewed, 8).item() == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )


# The evaluation


class FakeLoader:
    """Two full batches and one that is not."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def epoch(self, epoch: int):
        assert epoch == 0  # the same images each time
        for part in self.images.split(4):
            yield {"image": part}


def test_the_evaluation_weighs_every_image_alike():
    images, vae = some_images(10), small_vae()
    evaluation = HardTokenEvaluation(RelaxedAutoencoder(vae), FakeLoader(images), "mse", 20, CPU)
    results = evaluation(None, 0)

    with torch.no_grad():
        target = images.float() / 127.5 - 1
        logits = vae(target)
        ids = logits.argmax(dim=1)
        loss = (vae.decode(ids) - target).square().mean().item()
        share = logits.softmax(dim=1)
    counts = np.bincount(ids.flatten(), minlength=16)
    used = counts[counts > 0] / counts.sum()
    assert results["loss"] == pytest.approx(loss, rel=1e-5)
    assert results["perplexity"] == pytest.approx(math.exp(-(used * np.log(used)).sum()), rel=1e-6)
    assert results["used_codes"] == (counts > 0).sum() > 1
    assert results["dead_codes"] == (counts == 0).sum()
    assert results["kl_per_token"] == pytest.approx((share * (share * 16).log()).sum(dim=1).mean().item(), rel=1e-4)


def test_the_picture_shows_images_above_their_reconstructions():
    images, reconstructed = torch.zeros(20, 3, 4, 4), torch.full((20, 3, 4, 4), 0.5)
    picture = side_by_side(images, reconstructed)
    assert picture.shape == (3, 4 * 6 + 2, 8 * 6 + 2)  # 2 rows of 8 images, 2 of reconstructions, 2 pixels between
    assert [picture[0, 3 + 6 * row, 3].item() for row in range(4)] == [0, 0.5, 0, 0.5]
    assert side_by_side(images[:3], reconstructed[:3]).shape == (3, 2 * 6 + 2, 3 * 6 + 2)


def test_evenly_spread_samples_reach_every_class():
    class Numbers:
        def __len__(self):
            return 10

        def __getitem__(self, key):
            return {"key": key}

        def name(self, index):
            return f"image {index}"

    chosen = EvenlySpread(Numbers(), 4)
    assert [chosen[3, position]["key"] for position in range(len(chosen))] == [(3, 0), (3, 2), (3, 5), (3, 7)]
    assert chosen.name(2) == "image 2"  # by the number in the data set, as samples say what could not be read


def results_with(perplexity: float, vocabulary: int, tokens: int, kl_per_token: float) -> dict[str, float]:
    counts = {"used_codes": 80, "dead_codes": vocabulary - 80, "tokens": tokens}
    return {"perplexity": perplexity, "kl_per_token": kl_per_token, **counts}


@pytest.mark.parametrize(
    ("perplexity", "kl_per_token", "advice"),
    [(3.0, 0.1, "lower --kl_weight"), (3.0, 3.0, "raise --kl_weight"), (20.0, 3.0, None)],
)
def test_a_collapsed_codebook_is_said_with_what_to_change(caplog, perplexity, kl_per_token, advice):
    with caplog.at_level(logging.WARNING):
        warn_of_collapse(results_with(perplexity, 256, 10_000, kl_per_token))
    assert (advice in caplog.text) if advice else not caplog.text


def test_few_evaluated_tokens_are_no_collapse(caplog):
    # 100 tokens cannot have a perplexity of 5 % of 8192.
    warn_of_collapse(results_with(80.0, 8192, 100, 3.0))
    assert not caplog.text


# Whole runs


def write_images(folder: Path, count: int = 24) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        coarse.resize((24, 20), Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")


def run_config(images: Path, output: Path, **changes) -> DvaeConfig:
    settings = {
        "data_path": str(images), "output_dir": str(output), "device": "cpu", "num_workers": 0, "input_size": 16,
        "batch_size": 8, "epochs": 2, "warmup_steps": 2, "eval_images": 10, "save_ckpt_steps": 1, **SETTINGS,
    }  # fmt: skip
    return DvaeConfig(**{**settings, **changes})


@pytest.mark.parametrize("quantizer", ["vq", "gumbel"])
def test_a_run_leaves_a_tokenizer_that_pretraining_can_load(tmp_path, quantizer):
    images = tmp_path / "images"
    images.mkdir()
    write_images(images)
    main(run_config(images, tmp_path / "run", quantizer=quantizer))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [0, 1]
    names = ("train_reconstruction_loss", "train_perplexity", "test_loss", "test_psnr", "test_ssim", "test_perplexity")
    own = {"vq": {"train_quantization_error"}, "gumbel": {"train_kl", "train_temperature", "test_kl_per_token"}}
    assert {*names, "test_used_codes", "test_dead_codes", "test_code_distance"} | own[quantizer] <= log[0].keys()

    tokenizer = load_tokenizer(str(tmp_path / "run"), "customized", CPU)
    assert tokenizer.vocab_size == 16
    checkpoint = torch.load(tmp_path / "run" / "checkpoint-1.pth", weights_only=True)
    weights = torch.load(tmp_path / "run" / "pytorch_model.bin", weights_only=True)["weights"]
    average, last, prefix = checkpoint["model_ema"], checkpoint["model"], "vae." if quantizer == "gumbel" else ""
    parts = [name for name in weights if f"{prefix}{name}" in average]
    assert len(parts) >= 10
    assert all(torch.equal(weights[name], average[f"{prefix}{name}"]) for name in parts)  # not the last step's
    assert any(not torch.equal(weights[name], last[f"{prefix}{name}"]) for name in parts)
    same = load_tokenizer(tmp_path / "run" / "checkpoint-1.pth")
    assert same.fingerprint() == tokenizer.fingerprint()
    assert same.model.sizes() == tokenizer.model.sizes()
    main(run_config(images, tmp_path / "run", quantizer=quantizer, input_size=24))  # nothing is left to train
    assert load_tokenizer(str(tmp_path / "run")).model.image_size == (16, 16)
    with Image.open(tmp_path / "run" / "reconstructions.png") as picture:
        assert np.asarray(picture).std() > 10


@pytest.mark.slow
def test_a_few_images_are_learnt_by_heart(tmp_path):
    # A sign error anywhere between the images and the written weights would show here.
    images = tmp_path / "images"
    images.mkdir()
    write_images(images, 16)
    once = {"epochs": 30, "eval_freq": 30, "save_ckpt_freq": 30, "save_ckpt_steps": 0}
    main(run_config(images, tmp_path / "run", lr=1e-2, ema_decay=0.9, min_crop=1.0, **once))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert log[-1]["test_loss"] < 0.75 * log[0]["train_reconstruction_loss"]
    assert log[-1]["test_perplexity"] > 3


KILL = """
import os, signal, sys
from beit import launch
from beit.tasks import dvae_training as dvae
original = dvae.Reconstruction.__call__
def call(self, model, batch, step):
    if step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, model, batch, step)
dvae.Reconstruction.__call__ = call
publish, seen = dvae.DvaeTraining.publish, []
def killed_publish(*arguments):
    seen.append(1)
    if len(seen) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    publish(*arguments)
dvae.DvaeTraining.publish = killed_publish
sys.exit(launch.launch(dvae.DvaeConfig, dvae.main, "", sys.argv[3:]))
"""


def flags_of(config: DvaeConfig) -> list[str]:
    names = ("data_path", "output_dir", "device", "num_workers", "input_size", "batch_size", "epochs", "warmup_steps")
    names = (*names, "eval_images", "save_ckpt_steps", "lr", "min_lr", "quantizer", "quantize_from", *SETTINGS)
    return [text for name in names for text in (f"--{name}", str(getattr(config, name)))]


@pytest.mark.slow
def test_killed_at_a_step_and_before_publishing_it_ends_with_the_same_bits(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    write_images(images)
    # In a process of its own, like the others: another number of threads adds up in another order.
    run("run_dvae_training.py", *flags_of(run_config(images, tmp_path / "undisturbed")))
    flags = flags_of(run_config(images, tmp_path / "killed"))
    never = "99"
    for step, publish in (("2", never), ("4", never), (never, "1")):  # 3 steps an epoch, 6 in all
        killed = run("-c", KILL, step, publish, *flags, check=False)
        assert killed.returncode == -9, killed.stderr
    run("run_dvae_training.py", *flags)

    for name in ("checkpoint-1.pth", "pytorch_model.bin"):
        ours, theirs = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("killed", "undisturbed"))
        for part in ("weights",) if "weights" in theirs else ("model", "model_ema"):
            assert all(torch.equal(tensor, theirs[part][key]) for key, tensor in ours[part].items())
    logs = [(tmp_path / folder / "log.txt").read_text().splitlines() for folder in ("killed", "undisturbed")]
    for ours, theirs in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        same = [name for name in theirs if name.startswith(("train_", "test_"))]
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["vq", "gumbel"])
def test_two_processes_evaluate_what_one_evaluates(tmp_path, quantizer):
    images = tmp_path / "images"
    images.mkdir()
    write_images(images)
    # No steps that matter: with lr 0 both evaluate the same weights, split differently over processes.
    # The codes of vq start from the vectors of both, and follow them.
    still = {"epochs": 1, "lr": 0.0, "min_lr": 0.0, "quantizer": quantizer, "quantize_from": 0.0}
    main(run_config(images, tmp_path / "1", **still))
    flags = flags_of(run_config(images, tmp_path / "2", batch_size=4, **still))
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run_dvae_training.py", *flags)
    logs = [json.loads((tmp_path / processes / "log.txt").read_text()) for processes in ("1", "2")]
    for name in logs[0].keys() & {f"test_{name}" for name in ("loss", "psnr", "ssim", "perplexity", "kl_per_token")}:
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5), name


def test_gumbel_noise_does_not_reach_the_evaluation():
    evaluation = HardTokenEvaluation(RelaxedAutoencoder(small_vae()), FakeLoader(some_images(4)), "mse", 20, CPU)
    assert evaluation(None, 0) == evaluation(None, 1)


def test_a_run_is_not_resumed_with_another_quantizer(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    write_images(images, 8)
    main(run_config(images, tmp_path / "run", quantizer="gumbel", opt="adamw", epochs=1))
    file = tmp_path / "run" / "checkpoint-0.pth"
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["quantizer"]  # version 0.1 had no other
    torch.save(checkpoint, file)
    (tmp_path / "run" / "checkpoint-last.pth").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"gumbel there, vq here.*--quantizer"):
        main(run_config(images, tmp_path / "run"))
    main(run_config(images, tmp_path / "run", quantizer="gumbel", opt="adamw"))
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == 2
