"""The settings of segmentation: the published rows, the official commands word for word, and what is refused."""

import dataclasses
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from beit.config import dump_yaml, from_plain, to_plain
from beit.errors import InputError
from beit.tasks.base import resolve_batch
from semantic_segmentation.__main__ import COMMANDS, main
from semantic_segmentation.config import (
    SETTINGS,
    SegmentationConfig,
    TestConfig,
    TrainConfig,
    check,
    completed,
    label_map_folder,
    segmentor_arguments,
)
from semantic_segmentation.modeling import build_segmentor
from semantic_segmentation.official_keys import KEYS, KEYS_WITHOUT_EFFECT
from tests.command_lines import read_test, read_train

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "semantic_segmentation" / "tools"
NAMES = sorted(path.stem for path in SETTINGS.folder.glob("[!_]*.yaml"))
TINY, SETR = "upernet_beit_tiny_64_slide_ade20k", "setr_pup_beit_base_12_512_slide_160k_ade20k"
FACTS = {"source", "data", "gpus", "hardware", "time", "quoted", "command"}
BLOB = "https://unilm.blob.core.windows.net/beit"

# The published table, row by row: crop, images per GPU, update interval, iterations, lr, layer decay, warm-up,
# stochastic depth, LayerScale, taps, channels of the head, stride of the windows, shortest evaluation interval.
TABLE = """
base_12_512_pt    512 2 1 160000 7e-4 0.65 1500 0.1 0.1  3-5-7-11   768  341 16000
base_12_512_pt2ft 512 2 1 160000 3e-5 0.9  1500 0.1 0.1  3-5-7-11   768  341 16000
base_12_640_pt2ft 640 2 1 160000 3e-5 0.9  1500 0.1 0.1  3-5-7-11   768  426 16000
large_24_512_pt2ft 512 2 1 160000 2e-5 0.95 1500 0.2 1e-6 7-11-15-23 1024 341 16000
large_24_640_pt2ft 640 1 2 320000 2e-5 0.95 3000 0.2 1e-6 7-11-15-23 1024 426 32000
"""
# What all of them share.
SHARED = {
    "weight_decay": 0.05,
    "opt": "adamw",
    "opt_betas": (0.9, 0.999),
    "power": 1.0,
    "min_lr": 0.0,
    "warmup_ratio": 1e-6,
    "clip_grad": None,
    "loss_average": "all",
    "total_batch_size": 16,
    "decode_head": "uper",
    "head_dropout": 0.1,
    "auxiliary_channels": 256,
    "auxiliary_index": 2,
    "auxiliary_weight": 0.4,
    "rel_pos_bias": True,
    "abs_pos_emb": False,
    "ratio_range": (0.5, 2.0),
    "cat_max_ratio": 0.75,
    "flip": 0.5,
    "photometric_distortion": True,
    "reduce_zero_label": True,
    "train_images": "images/training",
    "train_annotations": "annotations/training",
    "val_images": "images/validation",
    "val_annotations": "annotations/validation",
    "test_mode": "slide",
}
ONE_SCALE = {"test_ratios": (1.0,), "test_flip": False, "test_short_at_least_crop": False}
SIX_SCALES = {
    "test_ratios": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
    "test_flip": True,
    "test_short_at_least_crop": True,
}


def published_row(line):
    words = line.split()
    model, depth, crop, start = words[0].split("_")
    images, interval, iterations = map(int, words[2:5])
    lr, decay, warmup, drop_path, layer_scale = map(float, words[5:10])
    taps, channels, stride, evaluation = words[10:]
    assert words[1] == crop
    return f"upernet_beit_{model}_{depth}_{crop}_slide_160k_ade20k_{start}", {
        **SHARED,
        **ONE_SCALE,
        "model": f"beit_{model}_patch16_224",
        "crop_size": int(crop),
        "image_scale": {"512": (2048, 512), "640": (2560, 640)}[crop],
        "batch_size": images,
        "update_freq": 1,  # follows from the total batch
        "max_steps": iterations // interval,
        "lr": lr,
        "layer_decay": decay,
        "warmup_steps": warmup // interval,
        "drop_path": drop_path,
        "layer_scale_init_value": layer_scale,
        "out_indices": tuple(map(int, taps.split("-"))),
        "head_channels": int(channels),
        "slide_stride": int(stride),
        "eval_freq": int(evaluation) // interval,
        "save_ckpt_freq": int(evaluation) // interval,
    }


PUBLISHED = dict(published_row(line) for line in TABLE.strip().splitlines())
PUBLISHED |= {
    name.replace("_pt2ft", "_ms"): {**row, **SIX_SCALES} for name, row in PUBLISHED.items() if name.endswith("_pt2ft")
}
# BEiT v2's: lr, layer decay and stochastic depth differ from BEiT's at 512 pixels.
V2 = {
    "base_12_512_slide_160k_ade20k": ("_pt", 5e-5, 0.75, 0.15),
    "base_12_512_slide_160k_21ktoade20k": ("_pt", 5e-5, 0.85, 0.15),
    "large_24_512_slide_160k_ade20k": ("_pt2ft", 4e-5, 0.9, 0.2),
    "large_24_512_slide_160k_21ktoade20k": ("_pt2ft", 3e-5, 0.9, 0.2),
}
PUBLISHED |= {
    f"upernet_beit_{name}": PUBLISHED[f"upernet_beit_{name.replace('21kto', '')}{like}"]
    | {"lr": lr, "layer_decay": decay, "drop_path": drop}
    for name, (like, lr, decay, drop) in V2.items()
}
# What is quoted, from the official README where nothing else is said.
QUOTED = {
    "upernet_beit_base_12_640_slide_160k_ade20k_pt2ft": {"mIoU": 53.61, "mAcc": 64.82, "aAcc": 84.62},
    "upernet_beit_base_12_640_slide_160k_ade20k_ms": {"mIoU": 54.26, "mAcc": 65.28, "aAcc": 84.9},
    "upernet_beit_large_24_640_slide_160k_ade20k_pt2ft": {"mIoU": 56.7},
    "upernet_beit_large_24_640_slide_160k_ade20k_ms": {"mIoU": 57.0},
    "upernet_beit_base_12_512_slide_160k_ade20k": {"mIoU": 53.1},
    "upernet_beit_base_12_512_slide_160k_21ktoade20k": {"mIoU": 53.5},
    "upernet_beit_large_24_512_slide_160k_ade20k": {"mIoU": 56.7},
    "upernet_beit_large_24_512_slide_160k_21ktoade20k": {"mIoU": 57.54, "mAcc": 68.78, "aAcc": 86.22},
    SETR: {"mIoU": 45.6, "after intermediate fine-tuning on ImageNet-1k": {"mIoU": 47.7}},  # the paper, table 3
}


def facts_of(name):
    return yaml.safe_load((SETTINGS.folder / f"{name}.yaml").read_text(encoding="utf-8"))["recipe"]


def test_every_official_config_is_there():
    assert set(NAMES) == {*PUBLISHED, TINY, SETR}
    assert len(PUBLISHED) == 13


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_is_the_published_row(name):
    # Broken by any changed default, or value of a file, that the published run depends on.
    settings = vars(read_train([f"configs/beit/upernet/{name}.py"]))
    assert {key: settings[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    shared = resolve_batch(read_train([name]), 8)
    interval = int(
        next(line for line in TABLE.splitlines() if line.startswith(name[13:].split("_slide")[0])).split()[3]
    )
    assert (shared.batch_size, shared.update_freq) == (settings["batch_size"], interval)


@pytest.mark.parametrize("name", NAMES)
class TestEveryConfig:
    def test_is_usable_as_it_stands(self, name):
        check(read_train([name]))
        check(read_test([name, "checkpoint.pth"]))

    def test_builds(self, name):
        # On the meta device, so without the memory; broken by sizes that do not fit each other.
        import torch

        config = read_train([name])
        with torch.device("meta"):
            segmentor = build_segmentor(**segmentor_arguments(config, 150))
        assert segmentor.num_classes == 150
        assert segmentor.get_num_layers() == {"b": 12, "l": 24, "t": 4}[name.split("_beit_")[1][0]]

    def test_says_where_it_is_from_what_it_reached_and_how_it_is_run(self, name):
        facts = facts_of(name)
        assert set(facts) == FACTS
        assert QUOTED.get(name, {}).items() <= facts["quoted"].items()
        assert name in QUOTED or facts["quoted"]["mIoU"] == "none in the source"

    def test_its_command_runs_it(self, name):
        words = shlex.split(facts_of(name)["command"].replace("\\\n", " "))
        script = Path(words[1])
        assert (ROOT / script).is_file()
        flags = [word for word in words[2:] if word != "8"]
        config = (read_test if script.name == "dist_test.sh" else read_train)(flags)
        assert Path(config.config).stem == name
        given = {"config", "checkpoint", "data_path", "init_from", "output_dir", "deterministic", "eval", "device"}
        expected = vars(read_train([name]))
        settings = {key: value for key, value in vars(config).items() if key in expected}
        assert {key for key, value in settings.items() if value != expected[key]} <= given
        assert ("8" in words) == (facts_of(name)["gpus"] == 8)
        if name in PUBLISHED and not name.endswith("_ms"):
            start = "pt22k_ft22k" if name.endswith("_pt2ft") else "pt22k"
            backbone = f"{config.model}_{start}"
            if name.removeprefix("upernet_beit_") in V2:
                backbone = f"{config.model.replace('beit', 'beitv2')}_pt1k{'_ft21k' if '21k' in name else ''}"
            assert config.init_from == backbone


def test_setr_pup_is_the_papers_run():
    # Table 14 of the paper; the plain ViT of its table 5; the head's channels are SETR's.
    paper = {
        "decode_head": "setr_pup",
        "head_channels": 256,
        "lr": 1e-3,
        "max_steps": 160000,
        "opt_eps": 1e-8,
        "opt_betas": (0.9, 0.999),
        "layer_decay": 0.65,
        "min_lr": 0.0,
        "power": 1.0,
        "warmup_steps": 1500,
        "drop_path": 0.1,
        "weight_decay": 0.05,
        "crop_size": 512,
        "total_batch_size": 16,
        "batch_size": 2,
        "rel_pos_bias": False,
        "abs_pos_emb": True,
        "layer_scale_init_value": 0.0,
    }
    config = vars(read_train([SETR]))
    assert {key: config[key] for key in paper} == paper
    row = PUBLISHED["upernet_beit_base_12_512_slide_160k_ade20k_pt"]
    assert {key for key in row if config[key] != row[key]} <= paper.keys()
    assert "pretrained=beit_base_patch16_224_pt1k_800ep" in facts_of(SETR)["command"]


PRETRAINED = f"{BLOB}/beit_base_patch16_224_pt22k_ft22k.pth"
CONFIG = "configs/beit/upernet/upernet_beit_base_12_640_slide_160k_ade20k_pt2ft.py"
LARGE = "configs/beit/upernet/upernet_beit_large_24_640_slide_160k_ade20k_pt2ft.py"
SEGMENTOR = f"{BLOB}/beit_base_patch16_640_pt22k_ft22ktoade20k.pth"


def test_the_official_training_command():
    # Broken by an official flag or key that is spelled otherwise here, or read into another setting.
    text = f"{CONFIG} --launcher pytorch --work-dir /path/to/save --seed 0  --deterministic"
    config = read_train(shlex.split(f"{text} --options model.pretrained={PRETRAINED}"))
    recipe = vars(read_train([CONFIG]))
    changed = {name: value for name, value in vars(config).items() if value != recipe[name]}
    assert changed == {
        "launcher": "pytorch",
        "output_dir": "/path/to/save",
        "deterministic": True,
        "init_from": PRETRAINED,
    }


def test_the_official_training_command_with_less_memory():
    text = f"""{LARGE} --work-dir /x --seed 0 --deterministic --options model.pretrained={PRETRAINED}
        model.backbone.use_checkpoint=True data.samples_per_gpu=1 optimizer_config.update_interval=2
        --launcher pytorch"""
    config = read_train(shlex.split(text))
    assert (config.init_from, config.grad_checkpointing) == (PRETRAINED, True)
    assert (config.batch_size, config.update_freq, config.total_batch_size, config.output_dir) == (1, 2, 0, "/x")
    check(config)


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("--eval mIoU", {"eval": ("mIoU",)}),
        ("--format-only", {"format_only": True}),
        ("--eval-options imgfile_prefix=maps", {"eval_options": {"imgfile_prefix": "maps"}}),
        ("--show-dir pictures --opacity 0.7", {"show_dir": "pictures", "opacity": 0.7}),
        ("--eval mIoU --aug-test --out scores.json", {"eval": ("mIoU",), "aug_test": True, "out": "scores.json"}),
    ],
)
def test_the_official_test_commands(flags, changed):
    plain = vars(read_test([CONFIG, SEGMENTOR]))
    config = read_test(shlex.split(f"{CONFIG} {SEGMENTOR} --launcher pytorch {flags}"))
    check(config)
    assert {name: value for name, value in vars(config).items() if value != plain[name]} == {
        "launcher": "pytorch",
        **changed,
    }
    assert (config.config, config.checkpoint) == (CONFIG, SEGMENTOR)


def test_the_flags_of_training():
    text = "--load-from a.pth --resume-from b.pth --no-validate --launcher slurm --local-rank 1 --cfg-options lr=1"
    config = read_train([TINY, *shlex.split(text)])
    assert (config.init_from, config.resume, config.disable_eval) == ("a.pth", "b.pth", True)
    assert (config.launcher, config.local_rank, config.lr) == ("slurm", 1, 1.0)
    assert completed(read_train([TINY, "--launcher=mpi"])).dist_on_itp
    assert not completed(config).dist_on_itp
    with pytest.raises(InputError, match="--launcher: cannot use 'horovod': choose none"):
        read_train([TINY, "--launcher", "horovod"])


def test_flags_that_can_do_nothing_say_so(caplog):
    with caplog.at_level(logging.WARNING):
        read_train([TINY, "--gpus", "8", "--gpu-ids", "0", "1", "--options", "find_unused_parameters=True"])
        read_test([TINY, "x.pth", "--show", "--gpu-collect", "--tmpdir", "t"])
    said = " ".join(record.getMessage() for record in caplog.records)
    assert all(f"{name} has no effect" in said for name in ("--gpus", "--gpu_ids", "--show", "--gpu_collect"))
    assert "--options find_unused_parameters=True has no effect: every parameter is used" in said
    assert len(caplog.records) == 6


def test_a_run_has_a_folder_by_default_and_a_test_has_none():
    default = "work_dirs/upernet_beit_base_12_640_slide_160k_ade20k_pt2ft"
    assert completed(read_train([CONFIG])).output_dir == default
    assert completed(read_train([CONFIG, "--work-dir", "run"])).output_dir == "run"
    assert completed(read_test([CONFIG, "x.pth"])).output_dir == ""


@pytest.mark.parametrize("folder", [".", "semantic_segmentation", "docs", "tests/semantic_segmentation"])
def test_the_official_paths_work_from_every_folder(folder, monkeypatch):
    monkeypatch.chdir(ROOT / folder)
    assert read_train([LARGE]).lr == read_train([Path(LARGE).stem]).lr == 2e-5


def test_a_misspelt_config_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'upernet_beit_base_12_640_slide_160k_ade20k_pt2ft'"):
        read_train([CONFIG.replace("640_slide", "640_silde")])


def test_defaults_file_options_flags(tmp_path):
    # Broken by any other order of precedence.
    (tmp_path / "mine.yaml").write_text("max_iters: 30\n")
    mine = str(tmp_path / "mine.yaml")
    assert read_train([mine]).lr == SegmentationConfig().lr
    assert read_train([mine]).max_steps == 30
    assert read_train([mine, "--options", "runner.max_iters=20"]).max_steps == 20
    assert read_train([mine, "--max_iters", "10", "--options", "runner.max_iters=20"]).max_steps == 10
    assert read_train([mine, "--options", "optimizer_config.update_interval=2"]).max_steps == 15


def test_a_file_of_ones_own_builds_on_an_official_one(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"base: {SETTINGS.folder / NAMES[1]}.yaml\nlr: 1e-5\n")
    assert read_train([str(tmp_path / "mine.yaml")]) == dataclasses.replace(
        read_train([NAMES[1]]), lr=1e-5, config=str(tmp_path / "mine.yaml")
    )


def test_a_runs_own_settings_are_good_for_its_test_and_its_checkpoint(tmp_path):
    # Broken by a file that a run writes and testing does not read.
    config = read_train([TINY, "--work-dir", "run", "--load-from", "x.pth", "--options", "model_kwargs.depth=6"])
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    tested = read_test([str(tmp_path / "config.yaml"), "run/checkpoint-best.pth"])
    assert tested.model_kwargs == config.model_kwargs == {"patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4}
    assert from_plain(TrainConfig, to_plain(config)) == config
    names = [field.name for field in dataclasses.fields(SegmentationConfig)]
    assert all(getattr(tested, name) == getattr(config, name) for name in names)


def test_every_official_key_means_a_setting():
    # Broken by a renamed field.
    fields = {field.name for field in dataclasses.fields(SegmentationConfig)}
    assert {name.partition(".")[0] for name in KEYS.values()} <= fields
    assert not set(KEYS) & set(KEYS_WITHOUT_EFFECT)


def test_settings_of_version_0_1_are_read_under_their_old_names(tmp_path):
    # A run's config.yaml, as version 0.1 wrote it; broken by a renamed field without an alias.
    old = {
        "data_root": "/ade", "samples_per_gpu": 4, "pretrained": "a.pth", "max_iters": 800, "update_freq": 2,
        "warmup_iters": 100, "eval_interval": 200, "checkpoint_interval": 400, "work_dir": "run", "recipe_batch": 16,
        "load_from": "", "resume_from": "", "no_validate": False, "launcher": "none", "config": TINY,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({key: old[key] for key in old if key != "load_from"}))
    config = read_train([str(tmp_path / "config.yaml")])
    assert (config.data_path, config.batch_size, config.init_from, config.output_dir) == ("/ade", 4, "a.pth", "run")
    assert (config.max_steps, config.warmup_steps, config.eval_freq, config.save_ckpt_freq) == (400, 50, 100, 200)
    assert read_test([str(tmp_path / "config.yaml"), "x.pth"]).crop_size == 512
    with pytest.raises(InputError, match="--recipe_batch is gone: --total_batch_size sets the images per step"):
        read_train([TINY, "--recipe_batch", "32"])
    with pytest.raises(InputError, match="recipe_batch is gone: --total_batch_size"):
        read_train([TINY, "--options", "recipe_batch=32"])


def test_an_explicit_update_freq_takes_the_place_of_the_files_total_batch():
    assert read_train([CONFIG]).total_batch_size == 16
    assert read_train([CONFIG, "--batch_size", "4"]).total_batch_size == 16
    for more in (("--update_freq", "1"), ("--options", "optimizer_config.update_interval=1")):
        assert read_train([CONFIG, *more]).total_batch_size == 0
        assert read_train([CONFIG, *more, "--total_batch_size", "8"]).total_batch_size == 8


@pytest.mark.parametrize(
    ("assignment", "name", "value"),
    [
        ("model.pretrained=None", "init_from", ""),
        ("data.workers_per_gpu=0", "num_workers", 0),
        ("data.val.data_root=/ade", "data_path", "/ade"),
        ("data_root=/ade", "data_path", "/ade"),
        ("optimizer.lr=1e-4", "lr", 1e-4),
        ("optimizer.betas=(0.9,0.98)", "opt_betas", (0.9, 0.98)),
        ("optimizer.paramwise_cfg.layer_decay_rate=0.75", "layer_decay", 0.75),
        ("optimizer_config.grad_clip.max_norm=3", "clip_grad", 3.0),
        ("optimizer_config.grad_clip=None", "clip_grad", None),
        ("lr_config.warmup_iters=10", "warmup_steps", 10),
        ("lr_config.min_lr=1e-6", "min_lr", 1e-6),
        ("runner.max_iters=80000", "max_steps", 80000),
        ("checkpoint_config.interval=100", "save_ckpt_freq", 100),
        ("evaluation.interval=100", "eval_freq", 100),
        ("log_config.interval=5", "log_every", 5),
        ("model.backbone.out_indices=[2,5,8,11]", "out_indices", (2, 5, 8, 11)),
        ("model.backbone.depth=6", "model_kwargs", {"depth": 6}),
        ("model.backbone.use_abs_pos_emb=True", "abs_pos_emb", True),
        ("model.decode_head.channels=512", "head_channels", 512),
        ("model.test_cfg.mode=whole", "test_mode", "whole"),
        ("model.test_cfg.stride=(256,256)", "slide_stride", (256, 256)),
        ("model.test_cfg.crop_size=(512,768)", "crop_size", (512, 768)),
    ],
)
def test_official_names_of_settings(assignment, name, value):
    assert (
        getattr(read_train(["upernet_beit_base_12_512_slide_160k_ade20k_pt", "--options", assignment]), name) == value
    )


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.backbone.use_checkpint=True", "did you mean 'model.backbone.use_checkpoint'"),
        ("optimiser.lr=1", "did you mean 'optimizer.lr'"),
        ("sample_per_gpu=1", "did you mean 'samples_per_gpu'"),
        ("data.samples_per_gpu=two", "--options data.samples_per_gpu=two: cannot use 'two'"),
        ("optimizer.lr=fast", "--options optimizer.lr=fast: cannot use 'fast'"),
        ("model.backbone.use_checkpoint=perhaps", "cannot use 'perhaps': expected true or false"),
        ("model.test_cfg.mode=slid", "cannot use 'slid': choose slide, whole"),
    ],
)
def test_mistakes_in_options(assignment, message):
    with pytest.raises(InputError) as caught:
        read_train([TINY, "--options", assignment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_one_setting_here_must_not_be_given_two_values():
    both = ["data.train.data_root=/a", "data.val.data_root=/a", "data.test.data_root=/a"]
    assert read_train([TINY, "--options", *both]).data_path == "/a"
    with pytest.raises(InputError, match=r"data\.val\.data_root has set data_path to '/a' already"):
        read_train([TINY, "--options", *both[:2], "data.test.data_root=/b"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--samples_per_gpu 0", "--batch_size 0: must be at least 1"),
        ("--max_iters 0", "--max_steps 0: must be at least 1"),
        ("--test_batch_size 0", "--test_batch_size 0: must be at least 1"),
        ("--lr -1", "--lr -1.0: must be 0 or more"),
        ("--lr nan", "--lr: cannot use 'nan': expected a finite number"),
        ("--layer_decay 0", "--layer_decay 0.0: must be above 0 and at most 1"),
        ("--drop_path 1", "--drop_path 1.0: must be at least 0 and below 1"),
        ("--flip 2", "--flip 2.0: must be between 0 and 1"),
        ("--clip_grad 0", "--clip_grad 0.0: must be above 0"),
        ("--image_scale 512", "--image_scale 512: must be two numbers of pixels"),
        ("--ratio_range 2.0 0.5", "--ratio_range 2.0 0.5: must be two factors, the lower one first"),
        ("--test_ratios 1.0 0", "--test_ratios 1.0 0.0: must be above 0"),
        ("--crop_size 68", "--crop_size 68: must be a multiple of the model's patches, 8 8 pixels"),
        ("--crop_size 64x60", "must be a multiple of the model's patches"),
        ("--slide_stride 80", "--slide_stride 80: must be at most the window, --crop_size 64"),
        ("--model beit_bas_patch16_224", "no such model (did you mean 'beit_base_patch16_224'"),
        ("--out_indices 0 1 2", "--out_indices 0 1 2: UPerNet takes four blocks"),
        ("--out_indices 1 2 3 4", "--out_indices 1 2 3 4: takes blocks from 0 to 3, in rising order"),
        ("--out_indices 0 2 1 3", "in rising order"),
        ("--auxiliary_index 4", "--auxiliary_index 4: there are 4 taps"),
        ("--eval_interval 0", "--eval_freq 0: must be at least 1"),
        ("--update_freq 7 --max_iters 600", "--max_iters 600: must be a multiple of update_freq, 7"),
    ],
)
def test_settings_that_cannot_work_are_one_line(flags, message):
    with pytest.raises(InputError) as caught:
        check(read_train([TINY, *flags.split()]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--eval mIoU --format-only", "--eval and --format_only: choose one"),
        ("--opacity 0", "--opacity 0.0: must be above 0 and at most 1"),
        ("--eval-options imgfile_prefx=x", "--eval_options imgfile_prefx: no such option, there are imgfile_prefix"),
    ],
)
def test_tests_that_cannot_work_are_one_line(flags, message):
    with pytest.raises(InputError) as caught:
        check(read_test([TINY, "x.pth", *flags.split()]))
    assert message in str(caught.value)


def test_testing_without_a_checkpoint_is_refused():
    with pytest.raises(InputError, match="required: CHECKPOINT"):
        read_test([TINY])


def test_scales_and_folders_of_a_test():
    def scales(*arguments):
        config = completed(read_test([*arguments, "x"]))
        return config.test_ratios, config.test_flip

    assert scales(CONFIG) == ((1.0,), False)
    assert scales(CONFIG, "--aug-test") == ((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), True)
    assert scales(CONFIG.replace("pt2ft", "ms")) == ((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), True)
    assert label_map_folder(read_test([CONFIG, "x"])) == Path("format_results")
    assert label_map_folder(read_test([CONFIG, "x", "--work-dir", "run"])) == Path("run/format_results")
    assert label_map_folder(TestConfig(eval_options={"imgfile_prefix": "maps"})) == Path("maps")


def test_the_module_lists_its_commands_and_names_the_nearest(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in COMMANDS)
    assert main(["trian"]) == 2
    assert "unknown command 'trian' (did you mean 'train'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_and_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: semantic_segmentation {name}" in capsys.readouterr().out


def start(*command, folder, **environment):
    """Runs a command without the project on Python's path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **environment}
    return subprocess.run(list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [ROOT, ROOT / "semantic_segmentation", None])
def test_scripts_run_from_anywhere_without_installation(folder, tmp_path):
    # -S -s would leave out torch too; the project itself is only found by the script's own place.
    tools = TOOLS if folder is None else TOOLS.relative_to(folder)
    for script, arguments in (("train.py", []), ("test.py", ["x.pth"])):
        done = start(sys.executable, tools / script, LARGE, *arguments, "--lr", "-1", folder=folder or tmp_path)
        assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (
            2,
            "error: --lr -1.0: must be 0 or more",
        )


RECORDER = """#!/bin/sh
printf '%s\\n' "$@"
"""


def test_shell_scripts_pass_on_what_they_are_given(tmp_path):
    # Broken by a word that a shell splits, or a folder that is taken from the working directory.
    recorder = tmp_path / "python"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    more = ("--work-dir", "a run", "--options", "model.pretrained=x y.pth", "--empty", "")
    common = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--nnodes=1", "--node_rank=0"]
    for script, arguments in (("train", ["my config.py"]), ("test", ["my config.py", "a checkpoint.pth"])):
        shell = TOOLS / f"dist_{script}.sh"
        done = start("bash", shell, *arguments, 2, *more, folder=tmp_path, PYTHON=str(recorder), PORT="29511")
        meet = ["--master_addr=127.0.0.1", "--master_port=29511"]
        expected = [*common, *meet, str(TOOLS / f"{script}.py"), *arguments, "--launcher", "pytorch", *more]
        assert done.stdout.split("\n")[:-1] == expected
        default = start("bash", shell, *arguments, 2, folder=tmp_path, PYTHON=str(recorder), PORT="")
        assert "--master_port=29500" in default.stdout
        assert os.access(shell, os.X_OK)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("train", []),
        ("train", ["c.py"]),
        ("train", ["c.py", "--seed"]),
        ("test", ["c", "8"]),
        ("test", ["c", "x", "0"]),
    ],
)
def test_shell_scripts_say_how_they_are_used(script, arguments, tmp_path):
    done = start("bash", TOOLS / f"dist_{script}.sh", *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: dist_{script}.sh CONFIG ")


@pytest.mark.slow
def test_two_processes_are_started_and_a_mistake_is_said_once(tmp_path, free_port):
    shell = TOOLS / "dist_train.sh"
    done = start("bash", shell, LARGE, 2, "--lr", "-1", "--device", "cpu", folder=tmp_path, PORT=str(free_port))
    assert done.returncode != 0
    assert done.stderr.count("error: --lr -1.0: must be 0 or more") == 1
