"""The published fine-tuning runs: recipes, official commands and the rows of the published tables agree."""

import shlex

import pytest

from beit.config import read_command_line
from beit.tasks.finetuning import recorded_transform
from beit.tasks.settings import FinetuningConfig
from tests.test_recipes import RECIPES, commanded, facts_of

PATHS = ("data_path", "output_dir", "init_from")
BLOB = "https://unilm.blob.core.windows.net/beit"

# The official commands, after the launcher and the script, word for word.
OFFICIAL = {
    "finetune_large_22k": f"""
        --model beit_large_patch16_224 --data_path $DATA_PATH
        --nb_classes 21841 --data_set image_folder --disable_eval_during_finetuning
        --finetune {BLOB}/beit_large_patch16_224_pt22k.pth
        --output_dir $OUTPUT_DIR --batch_size 64 --lr 2e-3 --update_freq 2
        --warmup_epochs 5 --epochs 90 --layer_decay 0.75 --drop_path 0.2
        --weight_decay 0.05 --enable_deepspeed --layer_scale_init_value 1e-5 --clip_grad 1.0""",
    "finetune_base_22k": f"""
        --model beit_base_patch16_224 --data_path $DATA_PATH
        --nb_classes 21841 --data_set image_folder --disable_eval_during_finetuning
        --finetune {BLOB}/beit_base_patch16_224_pt22k.pth
        --output_dir $OUTPUT_DIR --batch_size 256 --lr 3e-3 --update_freq 1
        --warmup_epochs 5 --epochs 90 --layer_decay 0.65 --drop_path 0.2
        --weight_decay 0.05 --enable_deepspeed --layer_scale_init_value 0.1 --clip_grad 3.0""",
    "finetune_large_pt22k_ft22k_224": f"""
        --model beit_large_patch16_224 --data_path /path/to/imagenet
        --finetune {BLOB}/beit_large_patch16_224_pt22k_ft22k.pth
        --output_dir /path/to/save_result --batch_size 32 --lr 2e-5 --update_freq 2
        --warmup_epochs 5 --epochs 30 --layer_decay 0.9 --drop_path 0.4
        --weight_decay 1e-8 --enable_deepspeed""",
    "finetune_base_pt22k_ft22k_224": f"""
        --model beit_base_patch16_224 --data_path /path/to/imagenet
        --finetune {BLOB}/beit_base_patch16_224_pt22k_ft22k.pth
        --output_dir /path/to/save_result --batch_size 64 --lr 2e-5 --update_freq 1
        --warmup_epochs 5 --epochs 30 --layer_decay 0.85 --drop_path 0.1
        --weight_decay 1e-8 --enable_deepspeed""",
    "finetune_large_pt22k_224": f"""
        --model beit_large_patch16_224 --data_path /path/to/imagenet
        --finetune {BLOB}/beit_large_patch16_224_pt22k.pth
        --output_dir /path/to/save_result --batch_size 64 --lr 1e-3 --update_freq 2
        --warmup_epochs 5 --epochs 50 --layer_decay 0.75 --drop_path 0.2
        --weight_decay 0.05 --mixup 0.8 --cutmix 1.0 --enable_deepspeed""",
    "finetune_base_pt22k_224": f"""
        --model beit_base_patch16_224 --data_path /path/to/imagenet
        --finetune {BLOB}/beit_base_patch16_224_pt22k.pth
        --output_dir /path/to/save_result --batch_size 128 --lr 4e-3 --update_freq 1
        --warmup_epochs 20 --epochs 100 --layer_decay 0.65 --drop_path 0.1
        --weight_decay 0.05 --mixup 0.8 --cutmix 1.0 --enable_deepspeed""",
}

# The rows of the published tables, value by value.
ALL = {
    "opt": "adamw",
    "opt_betas": None,
    "min_lr": 1e-6,
    "aa": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.4,
    "reprob": 0.25,
    "remode": "pixel",
    "smoothing": 0.1,
    "train_interpolation": "bicubic",
    "use_mean_pooling": True,
    "rel_pos_bias": True,
    "abs_pos_emb": False,
    "init_scale": 0.001,
    "model_ema": False,
}
NAMES = ("model", "batch_size", "update_freq", "lr", "warmup_epochs", "epochs", "layer_decay", "drop_path")
NAMES += ("weight_decay", "clip_grad", "mixup", "cutmix", "input_size", "imagenet_default_mean_and_std", "nb_classes")


def row(size, resolution, *values, clip=None, mix=(0, 0), classes=0):
    name = f"beit_{size}_patch16_{resolution}"
    return ALL | dict(zip(NAMES, (name, *values, clip, *mix, resolution, False, classes), strict=True))


PUBLISHED = {
    "finetune_base_22k": row("base", 224, 256, 1, 3e-3, 5, 90, 0.65, 0.2, 0.05, clip=3.0, classes=21841),
    "finetune_large_22k": row("large", 224, 64, 2, 2e-3, 5, 90, 0.75, 0.2, 0.05, clip=1.0, classes=21841),
    "finetune_base_pt22k_ft22k_224": row("base", 224, 64, 1, 2e-5, 5, 30, 0.85, 0.1, 1e-8),
    "finetune_base_pt22k_ft22k_384": row("base", 384, 64, 1, 2e-5, 5, 30, 0.85, 0.1, 1e-8),
    "finetune_large_pt22k_ft22k_224": row("large", 224, 32, 2, 2e-5, 5, 30, 0.9, 0.4, 1e-8),
    "finetune_large_pt22k_ft22k_384": row("large", 384, 32, 2, 2e-5, 5, 30, 0.9, 0.4, 1e-8),
    "finetune_large_pt22k_ft22k_512": row("large", 512, 32, 2, 2e-5, 5, 30, 0.9, 0.4, 1e-8),
    "finetune_base_pt22k_224": row("base", 224, 128, 1, 4e-3, 20, 100, 0.65, 0.1, 0.05, mix=(0.8, 1.0)),
    "finetune_large_pt22k_224": row("large", 224, 64, 2, 1e-3, 5, 50, 0.75, 0.2, 0.05, mix=(0.8, 1.0)),
    # mmpretrain normalises with 0.5 here, though it pre-trains with ImageNet's mean, and does not shrink the new head
    "finetune_base_pt1k_224": row("base", 224, 128, 1, 4e-3, 20, 100, 0.65, 0.1, 0.05, mix=(0.8, 1.0))
    | {"init_scale": 1.0},
    # Table 13 of the paper, "ImageNet-1K, Base Size", for the plain ViT of its ablations.
    "finetune_ablation_224": row("base", 224, 128, 1, 4e-3, 20, 100, 0.65, 0.1, 0.05, mix=(0.8, 1.0))
    | {"rel_pos_bias": False, "abs_pos_emb": True, "layer_scale_init_value": 0, "imagenet_default_mean_and_std": True},
}
BATCH = {
    **dict.fromkeys(PUBLISHED, 512),
    **{name: 1024 for name in PUBLISHED if "ft22k" not in name},
    "finetune_base_22k": 4096,
    "finetune_large_22k": 2048,
}
ACCURACY = {
    "finetune_base_pt22k_224": 83.7,
    "finetune_base_pt22k_ft22k_224": 85.2,
    "finetune_base_pt22k_ft22k_384": 86.820,
    "finetune_large_pt22k_224": 86.0,
    "finetune_large_pt22k_ft22k_224": 87.396,
    "finetune_large_pt22k_ft22k_384": 88.408,
    "finetune_large_pt22k_ft22k_512": 88.600,
    "finetune_base_pt1k_224": 83.10,
    "finetune_ablation_224": 82.86,
}
# BEiT v2's, whose command is for the run after intermediate fine-tuning; beside it the official page lists what
# differs in the others.
V2_FILES = "https://github.com/addf400/files/releases/download/BEiT-v2"
OFFICIAL |= {
    "finetune_v2_base_ft21k_224": f"""
        --data_path /path/to/imagenet-1k/train --eval_data_path /path/to/imagenet-1k/val --nb_classes 1000
        --data_set image_folder --output_dir /path/to/save/your_model --log_dir /path/to/save/your_model
        --model beit_base_patch16_224 --weight_decay 0.05
        --finetune {V2_FILES}/beitv2_base_patch16_224_pt1k_ft21k.pth
        --batch_size 128 --lr 5e-5 --update_freq 1 --warmup_epochs 20 --epochs 30 --layer_decay 0.75
        --drop_path 0.1 --mixup 0. --cutmix 0. --imagenet_default_mean_and_std --dist_eval --save_ckpt_freq 20
        --enable_deepspeed""",
    "finetune_v2_large_ft21k_224": f"""
        --data_path /path/to/imagenet-1k/train --eval_data_path /path/to/imagenet-1k/val --nb_classes 1000
        --data_set image_folder --output_dir /path/to/save/your_model --log_dir /path/to/save/your_model
        --model beit_large_patch16_224 --weight_decay 0.05
        --finetune {V2_FILES}/beitv2_large_patch16_224_pt1k_ft21k.pth
        --batch_size 64 --lr 7e-5 --update_freq 2 --warmup_epochs 5 --epochs 20 --layer_decay 0.8
        --drop_path 0.25 --mixup 0. --cutmix 0. --imagenet_default_mean_and_std --dist_eval --save_ckpt_freq 10
        --enable_deepspeed""",
    "finetune_v2_base_21k": f"""
        --data_path /path/to/imagenet-21k/train --disable_eval_during_finetuning --nb_classes 21841
        --data_set image_folder --output_dir /path/to/save/your_model --log_dir /path/to/save/your_model
        --model beit_base_patch16_224 --weight_decay 0.05 --finetune {V2_FILES}/beitv2_base_patch16_224_pt1k.pth
        --batch_size 128 --lr 6e-4 --update_freq 1 --warmup_epochs 20 --epochs 90 --layer_decay 0.75
        --drop_path 0.1 --mixup 0.8 --cutmix 1.0 --imagenet_default_mean_and_std --save_ckpt_freq 20
        --enable_deepspeed""",
}
ELSEWHERE = {
    "eval_data_path",
    "data_set",
    "nb_classes",
    "log_dir",
    "save_ckpt_freq",
    "dist_eval",
}  # no part of a recipe
IMAGENET = {"imagenet_default_mean_and_std": True}
MIX = {"mix": (0.8, 1.0)}
PUBLISHED |= {
    "finetune_v2_base_300ep_224": row("base", 224, 128, 1, 5e-4, 20, 100, 0.65, 0.1, 0.05, **MIX) | IMAGENET,
    "finetune_v2_base_1600ep_224": row("base", 224, 128, 1, 5e-4, 20, 100, 0.6, 0.2, 0.05, **MIX) | IMAGENET,
    "finetune_v2_base_ft21k_224": row("base", 224, 128, 1, 5e-5, 20, 30, 0.75, 0.1, 0.05) | IMAGENET,
    "finetune_v2_large_300ep_224": row("large", 224, 64, 2, 5e-4, 5, 50, 0.8, 0.2, 0.05, **MIX) | IMAGENET,
    "finetune_v2_large_1600ep_224": row("large", 224, 64, 2, 2e-4, 5, 50, 0.8, 0.2, 0.05, **MIX) | IMAGENET,
    "finetune_v2_large_ft21k_224": row("large", 224, 64, 2, 7e-5, 5, 20, 0.8, 0.25, 0.05) | IMAGENET,
    **{
        f"finetune_v2_{size}_21k": row(size, 224, 128, 1, 6e-4, 20, 90, 0.75, drop, 0.05, classes=21841, **MIX)
        | IMAGENET
        for size, drop in (("base", 0.1), ("large", 0.2))
    },
}
BATCH |= {name: 4096 if name.endswith("_21k") else 1024 for name in PUBLISHED if "_v2_" in name}
ACCURACY |= {
    "finetune_v2_base_300ep_224": 85.0,
    "finetune_v2_base_1600ep_224": 85.5,
    "finetune_v2_base_ft21k_224": 86.458,
    "finetune_v2_large_300ep_224": 86.6,
    "finetune_v2_large_1600ep_224": 87.3,
    "finetune_v2_large_ft21k_224": 88.37,
}
PROCESSES = {"_22k": 16, "_21k": 32}  # by the end of the name; otherwise 8


def command(text):
    return read_command_line(FinetuningConfig, shlex.split(text), "run_class_finetuning.py", "")


def test_every_published_run_has_its_recipe():
    assert {path.stem for path in RECIPES if path.stem.startswith("finetune")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_the_published_row(name):
    # Broken by any changed default or recipe value that the published run depends on.
    facts = facts_of(next(path for path in RECIPES if path.stem == name))
    gpus, settings = commanded(name, facts["gpus"])
    assert {key: settings[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    assert gpus == PROCESSES.get(name[-4:], 8)
    assert settings["batch_size"] * gpus * settings["update_freq"] == settings["total_batch_size"] == BATCH[name]
    assert facts["quoted"].get("acc1") == ACCURACY.get(name)


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_command_means_what_the_recipe_says(name):
    # Broken by an official flag that is spelled otherwise here, or read into another setting.
    given, (_, recipe) = vars(command(OFFICIAL[name])), commanded(name, PROCESSES.get(name[-4:], 8))
    differing = {key for key in given if given[key] != recipe[key]} - (ELSEWHERE if "_v2_" in name else set())
    assert differing - set(PATHS) == {"enable_deepspeed", "total_batch_size"}
    assert given["init_from"].startswith(V2_FILES if "_v2_" in name else BLOB)


EVALUATIONS = [
    ("--eval --model beit_large_patch16_224 --data_path /path/to/imagenet", "beit_large_patch16_224", 224, 0.875),
    (
        "--eval --model beit_base_patch16_384 --input_size 384 --data_path /path/to/imagenet",
        "beit_base_patch16_384",
        384,
        1,
    ),
    (
        "--eval --model beit_large_patch16_384 --input_size 384 --data_path /path/to/imagenet",
        "beit_large_patch16_384",
        384,
        1,
    ),
    (
        "--eval --model beit_large_patch16_512 --input_size 512 --data_path /path/to/imagenet",
        "beit_large_patch16_512",
        512,
        1,
    ),
]


@pytest.mark.parametrize(("flags", "model", "size", "crop_pct"), EVALUATIONS)
def test_official_evaluations_mean_the_published_crops(flags, model, size, crop_pct):
    config = command(f"{flags} --resume {BLOB}/{model}_pt22k_ft22kto1k.pth ")
    transform = recorded_transform(config, {}, "")
    assert config.eval
    assert (config.model, transform.size, transform.crop_pct) == (model, (size, size), crop_pct)
    assert transform.resized((640, 480))[0] == {224: 256, 384: 384, 512: 512}[size]
    assert not config.imagenet_default_mean_and_std
