"""VQ-KD's training: the official command, what a run logs and leaves, its alarm, and a run that was stopped."""

import json
import logging
import math
import shlex
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import beit
from beit.config import read_command_line
from beit.data.datasets import ImageDataset, index_images
from beit.data.transforms import CenterCropTransform
from beit.errors import InputError
from beit.modeling import VisionTransformerForMaskedImageModeling
from beit.storage import load_checkpoint, save_checkpoint
from beit.tasks import vqkd_training
from beit.tasks.settings import VqkdConfig
from beit.tasks.vqkd_training import VqkdTraining, main
from beit.teachers import load_teacher
from beit.tokenizers.vqkd import CLIP, DINO, VQKD
from tests.shell import run

OFFICIAL = """
    --data_set image_folder
    --data_path /path/to/imagenet-1k/train
    --eval_data_path /path/to/imagenet-1k/eval
    --output_dir /path/to/save/your_model
    --log_dir /path/to/save/your_model
    --process_type default
    --train_interpolation bicubic
    --min_crop_scale 0.08
    --model vqkd_encoder_base_decoder_3x768x12_clip
    --teacher_input_size 224
    --codebook_n_emd 8192
    --codebook_emd_dim 32
    --quantize_kmeans_init
    --rec_loss_type cosine
    --batch_size 64
    --opt adamw
    --opt_betas 0.9 0.99
    --weight_decay 1e-4
    --warmup_epochs 10
    --epochs 100
    --save_ckpt_freq 20"""
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_depth": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(32):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint of a random BEiT whose patches see something of each other."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in TINY.items() if name != "decoder_depth"}
    model = VisionTransformerForMaskedImageModeling(img_size=32, vocab_size=4, **sizes)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    save_checkpoint(path, {"model": model.state_dict(), "args": {"model_kwargs": {"num_heads": 2}}})
    return path


@pytest.fixture
def config(images, teacher, tmp_path):
    return VqkdConfig(
        data_path=str(images), teacher=str(teacher), output_dir=str(tmp_path / "run"), device="cpu", num_workers=0,
        input_size=32, model_kwargs=TINY, codebook_size=24, codebook_dim=8, quantize_kmeans_init=True, batch_size=16,
        lr=1e-2, warmup_epochs=1, epochs=2, save_ckpt_freq=1, eval_images=8,
    )  # fmt: skip


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


# Settings


OFFICIAL_DEFAULTS = {  # and of the official names that are aliases here
    "batch_size": 64, "epochs": 100, "save_ckpt_freq": 20, "model": "vqkd_encoder_base_decoder_3x768x12_clip",
    "rec_loss_type": "cosine", "codebook_n_emd": 8192, "codebook_emd_dim": 32, "ema_decay": 0.99,
    "quantize_kmeans_init": False, "process_type": "default", "input_size": 224, "teacher_model_type": "clip",
    "teacher_input_size": 224, "opt": "adamw", "opt_eps": 1e-8, "opt_betas": None, "clip_grad": None,
    "weight_decay": 1e-4, "weight_decay_end": None, "lr": 5e-5, "warmup_lr": 1e-6, "min_lr": 1e-5, "warmup_epochs": 5,
    "warmup_steps": -1, "color_jitter": 0.0, "train_interpolation": "bicubic", "min_crop_scale": 0.08,
    "data_set": "image_folder", "imagenet_default_mean_and_std": False, "output_dir": "", "log_dir": None,
    "device": "cuda", "seed": 0, "resume": "", "auto_resume": True, "dist_eval": True, "disable_eval": False,
    "eval": False, "calculate_codebook_usage": False, "start_epoch": 0, "num_workers": 10, "pin_mem": True,
    "world_size": 1, "local_rank": -1, "dist_on_itp": False, "dist_url": "env://",
}  # fmt: skip


def test_every_official_flag_has_its_official_default():
    names = {
        alias: field.name for field in fields(VqkdConfig) for alias in (field.name, *field.metadata.get("aliases", ()))
    }
    assert {flag: getattr(VqkdConfig, names[flag]) for flag in OFFICIAL_DEFAULTS} == OFFICIAL_DEFAULTS


def test_the_official_command_means_the_published_run(golden, caplog):
    with caplog.at_level(logging.WARNING):
        config = read_command_line(VqkdConfig, shlex.split(OFFICIAL), "run_vqkd_training.py", "")
    assert not caplog.text
    published = {
        "codebook_size": 8192, "codebook_dim": 32, "quantize_kmeans_init": True, "ema_decay": 0.99, "min_crop": 0.08,
        "opt_betas": (0.9, 0.99), "opt_eps": 1e-8, "weight_decay": 1e-4, "lr": 5e-5, "min_lr": 1e-5, "epochs": 100,
        "warmup_epochs": 10, "clip_grad": None, "color_jitter": 0.0, "input_size": 224, "revive_codes": 0, "seed": 0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in published} == published
    for case in json.loads((golden / "v2" / "vqkd_training.json").read_text())["lr_rule"]:
        task = VqkdTraining(replace(config, batch_size=case["batch_size"], lr=case["lr_flag"]))
        task.session = SimpleNamespace(world_size=case["world_size"])
        assert task.peak_lr() == pytest.approx(case["lr"])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, CLIP),
        ({"model": "vqkd_encoder_base_decoder_1x768x12_dino"}, DINO),
        ({"teacher_model_type": "dino"}, CLIP),  # as official, with a warning
        ({"teacher": "mine.pth", "model": "vqkd_encoder_base_decoder_1x768x12_dino"}, "mine.pth"),
    ],
)
def test_the_end_of_the_models_name_decides_on_the_teacher(config, changes, name, monkeypatch, caplog):
    class Found(Exception):
        pass

    def asked(given):
        raise Found(given)

    monkeypatch.setattr(vqkd_training, "load_teacher", asked)
    with pytest.raises(Found, match=name):
        main(replace(config, **{"teacher": "", **changes}))
    assert ("--teacher_model_type dino has no effect" in caplog.text) == ("teacher_model_type" in changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "vqkd_encoder_base_decoder_3x768x12_klip"},
            "did you mean 'vqkd_encoder_base_decoder_3x768x12_clip'",
        ),
        ({"model_kwargs": {"depht": 2}}, "cannot be built: .*depht"),
        ({"model_kwargs": {"img_size": 32}}, "--model_kwargs img_size"),
        ({"input_size": 30}, "cannot be cut into patches"),
        ({"teacher": "nowhere.pth"}, "there is no checkpoint nowhere.pth"),
        ({"codebook_size": 1}, "--codebook_size 1: must be at least 2"),
        ({"eval": True, "output_dir": ""}, "--eval needs a checkpoint"),
    ],
)
def test_mistakes_end_in_one_line(config, changes, message):
    with pytest.raises(InputError, match=message):
        main(replace(config, **changes))


def test_the_official_parameter_groups(golden):
    groups = json.loads((golden / "v2" / "vqkd_training.json").read_text())["groups"]
    task = VqkdTraining(VqkdConfig())
    task.model = VQKD(img_size=64, embed_dim=48, depth=2, num_heads=4, decoder_depth=1, decoder_out_dim=24)
    names = {parameter: name for name, parameter in task.model.named_parameters()}
    ours = [
        {"weight_decay": group["weight_decay"], "names": [names[parameter] for parameter in group["params"]]}
        for group in task.parameter_groups()
    ]
    assert ours == groups


# The objective


@pytest.fixture
def task(config, monkeypatch):
    """A task without images, of steps on any batch."""

    def task(img_size=32, steps=10, **changes):
        torch.manual_seed(0)
        made = VqkdTraining(replace(config, input_size=img_size, quantize_kmeans_init=False, **changes))
        made.teacher, made.session = load_teacher(config.teacher), SimpleNamespace(world_size=1)
        made.model = made.build_model()
        monkeypatch.setattr(made, "steps_per_epoch", lambda: steps)
        made.build_objective()
        return made

    return task


def some_images(count, side=32):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_the_loss_is_the_distance_from_the_teacher_and_from_the_codes(task):
    task = task(48)  # the teacher's own grid is 4 x 4
    model, images = task.model, some_images(4, 48)
    codes = model.quantize.codes.clone()
    loss, metrics = task.step(model, {"image": images}, 5)

    images = images / 255
    targets = task.teacher(images).permute(0, 3, 1, 2)
    targets = F.interpolate(targets, (6, 6), mode="bilinear", antialias=True).flatten(2).mT
    vectors = F.normalize(model.encode(images), dim=-1)
    chosen = codes[(vectors @ codes.T).argmax(dim=-1)]
    features = model.decode_task_layer(model.decoder.patch_features(chosen.mT.unflatten(2, (6, 6))))
    cosines = (features * targets).sum(dim=-1) / (features.norm(dim=-1) * targets.norm(dim=-1))
    assert metrics["rec_loss"].item() == pytest.approx(1 - cosines.mean().item(), abs=1e-5)
    assert metrics["quant_loss"].item() == pytest.approx((vectors - chosen).square().mean().item(), rel=1e-4)
    assert loss.item() == pytest.approx((metrics["rec_loss"] + metrics["quant_loss"]).item())


def test_batches_of_one_step_move_the_codes_together(task):
    # Breaks if each batch of --update_freq moves them.
    books = []
    for parts in (1, 2):
        made = task(update_freq=parts)
        for part in some_images(4).chunk(parts):
            made.step(made.model, {"image": part}, 0)
        books.append(made.model.quantize.state_dict())
    for name, value in books[0].items():
        torch.testing.assert_close(books[1][name], value)


def test_codes_are_counted_anew_in_each_epoch(task):
    task = task(steps=2)
    counts = []
    for step in range(3):
        task.step(task.model, {"image": some_images(4)}, step)
        counts.append(task.model.quantize.cluster_size.sum().item())
    assert counts == pytest.approx([0.01 * 64, 0.01 * 64 * 1.99, 0.01 * 64])


@pytest.mark.parametrize(("used", "size", "fires"), [(11, 24, True), (13, 24, False), (100, 2000, True)])
def test_the_alarm_compares_with_what_was_possible(task, used, size, fires, caplog):
    task = task(steps=1, codebook_size=size)  # 256 vectors
    task.model.quantize.cluster_size[:used] = 1.0
    assert task.usage() == {"train_Unused_code": size - used, "train_used_codes": used, "train_longest_dead": 0}
    assert (f"has collapsed: this epoch used {used} of {size} codes" in caplog.text) == fires


# Whole runs


def test_a_run_learns_logs_and_leaves_tokenizers(config, caplog):
    config = replace(config, epochs=12, save_ckpt_freq=12)
    with caplog.at_level(logging.INFO):
        main(config)
    assert "lr 0.00125 = --lr 0.01 x 16 images per step / 128" in caplog.text
    assert "has collapsed" not in caplog.text
    run_folder = Path(config.output_dir)
    log = log_of(run_folder)
    parts = ("loss", "rec_loss", "quant_loss", "total_loss")
    names = {f"{prefix}_{part}" for prefix in ("train", "test") for part in parts}
    counted = {"train_Unused_code", "test_unused_code", "train_perplexity", "train_used_codes", "train_longest_dead"}
    assert names | counted | {"train_lr", "epoch"} <= log[0].keys()
    assert log[-1]["train_rec_loss"] < 0.5 * log[0]["train_rec_loss"]
    assert log[-1]["train_used_codes"] + log[-1]["train_Unused_code"] == 24
    assert log[-1]["train_used_codes"] > 0.8 * 24

    path = run_folder / "checkpoint-11.pth"
    assert torch.load(path, weights_only=True)["num_heads"] == 2
    tokenizer = beit.load_tokenizer(path)  # the heads and the size are recorded
    assert (tokenizer.vocab_size, tokenizer.downsampling) == (24, 8)
    assert tokenizer.encode(torch.rand(2, 3, 32, 40)).shape == (2, 4, 5)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        main(replace(config, eval=True))
    for name in ("rec_loss", "quant_loss", "total_loss", "unused_code", "used_codes", "perplexity"):
        assert f"{name} {log[-1][f'test_{name}']:.5g}" in caplog.text
    with pytest.raises(InputError, match=r"is a checkpoint of another model: .*pos_embed"):
        main(replace(config, eval=True, input_size=64))


@pytest.mark.slow
@pytest.mark.parametrize("collapses", [True, False])
def test_the_alarm_fires_in_a_run_built_to_collapse_and_not_in_a_good_one(config, collapses, caplog):
    codebook = {"codebook_dim": 1024, "quantize_kmeans_init": False} if collapses else {"revive_codes": 2}
    main(replace(config, codebook_size=128, epochs=6, disable_eval=True, **codebook))
    assert "test_loss" not in log_of(Path(config.output_dir))[0]
    assert ("the codebook has collapsed" in caplog.text) == collapses
    assert ("--quantize_kmeans_init, a --codebook_dim of 32 or less" in caplog.text) == collapses


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_bits(config, tmp_path):
    # Breaks with anything of the codebook that a checkpoint lacks, such as how long codes have been unused.
    config = replace(config, epochs=3, revive_codes=2, codebook_size=64)
    main(config)
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "run" / "checkpoint-0.pth", tmp_path / "again")
    main(replace(config, output_dir=str(tmp_path / "again")))
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoint-2.pth", weights_only=True)["model"] for name in ("again", "run")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert theirs["loss_idle"].max() > 0
    other = torch.load(config.teacher, weights_only=True)
    other["model"]["norm.bias"] += 1
    save_checkpoint(tmp_path / "other.pth", other)
    with pytest.raises(InputError, match="another teacher: resume with the same --teacher"):
        main(replace(config, epochs=4, teacher=str(tmp_path / "other.pth")))


@pytest.mark.slow
def test_codes_are_drawn_after_training_a_decoder_into_pixels(config, tmp_path):
    main(replace(config, epochs=1))
    path = tmp_path / "run" / "checkpoint-0.pth"
    drawing = {"pixels_of": str(path), "output_dir": str(tmp_path / "drawing"), "epochs": 4, "lr": 4e-3}
    main(replace(config, **drawing, hidden_dim=32))
    log = log_of(tmp_path / "drawing")
    assert log[-1]["train_loss"] < 0.9 * log[0]["train_loss"]
    tokenizer = beit.load_tokenizer(path)
    images = some_images(2) / 255
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape
    assert tokenizer.pixels.hidden_dim == 32
    index = index_images(config.data_path)
    data = ImageDataset(index, CenterCropTransform(32, interpolation="bicubic", crop_fraction=0.875), 0)
    held_out = torch.stack([data[0, number]["image"] for number in range(0, 32, 4)]) / 255  # eval_images
    drawn = tokenizer.pixels.decode(tokenizer.encode(held_out))
    assert log[-1]["test_loss"] == pytest.approx(F.mse_loss(drawn, held_out * 2 - 1).item(), rel=1e-3)
    assert log[-1]["test_psnr"] == pytest.approx(-10 * math.log10(log[-1]["test_loss"] / 4))

    other = load_checkpoint(path)
    other["model"]["quantize.embedding.weight"] = other["model"]["quantize.embedding.weight"].flip(0)
    save_checkpoint(tmp_path / "other.pth", other)
    with pytest.raises(InputError, match="another tokenizer"):  # its codes are not those that were drawn
        main(replace(config, pixels_of=str(tmp_path / "other.pth"), epochs=4, output_dir=str(tmp_path / "drawing")))


def flags_of(config):
    values = {
        name: getattr(config, name)
        for name in (field.name for field in fields(VqkdConfig))
        if getattr(config, name) != getattr(VqkdConfig, name)
    }
    kwargs = [f"{name}={value}" for name, value in values.pop("model_kwargs").items()]
    flags = [word for name, value in values.items() for word in (f"--{name}", *([] if value is True else [str(value)]))]
    return [*flags, "--model_kwargs", *kwargs]


@pytest.mark.slow
def test_two_processes_train_what_one_trains(config, tmp_path):
    config = replace(config, quantize_kmeans_init=False, epochs=2)
    main(config)
    two = replace(config, batch_size=8, output_dir=str(tmp_path / "two"))
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run_vqkd_training.py", *flags_of(two))
    for one, both in zip(log_of(tmp_path / "run"), log_of(tmp_path / "two"), strict=True):
        for name in ("train_loss", "test_loss", "test_perplexity", "train_Unused_code", "train_lr"):
            assert both[name] == pytest.approx(one[name], rel=1e-3), name


KILL = """
import os, signal, sys
from beit import launch
from beit.tasks import vqkd_training
original = vqkd_training.VqkdTraining.step
def call(self, model, batch, step):
    if step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, model, batch, step)
vqkd_training.VqkdTraining.step = call
sys.exit(launch.launch(vqkd_training.VqkdConfig, vqkd_training.main, "", sys.argv[2:]))
"""


@pytest.mark.slow
def test_killed_at_steps_it_ends_with_the_same_bits(config, tmp_path):
    config = replace(config, revive_codes=2, save_ckpt_steps=1)
    run("run_vqkd_training.py", *flags_of(config))
    flags = flags_of(replace(config, output_dir=str(tmp_path / "killed")))
    for step in ("1", "3"):  # 2 steps an epoch
        killed = run("-c", KILL, step, *flags, check=False)
        assert killed.returncode == -9, killed.stderr
    run("run_vqkd_training.py", *flags)
    ours, theirs = (torch.load(tmp_path / name / "checkpoint-1.pth", weights_only=True) for name in ("killed", "run"))
    assert all(torch.equal(tensor, theirs["model"][name]) for name, tensor in ours["model"].items())
