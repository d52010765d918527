import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from beit.config import read_command_line, read_yaml
from beit.tasks.classification_config import FinetuningConfig
from beit.tasks.linear_probe_config import LinearProbeConfig
from beit.tasks.masked_image_modeling import PretrainingConfig

RECIPES = sorted((Path(__file__).parents[1] / "beit" / "recipes").glob("*.yaml"))
CONFIG_OF = {
    "pretrain": PretrainingConfig,
    "finetune": FinetuningConfig,
    "linear": LinearProbeConfig,
}  # the part of a recipe's name before the first "_" -> whose settings
FACTS = {"source", "data", "gpus", "hardware", "time", "quoted", "command"}

# What the official README gives, after the launcher and the script.
COMMON = """
    --data_path ${DATA_PATH} --output_dir ${OUTPUT_DIR} --num_mask_patches 75
    --model beit_base_patch16_224_8k_vocab --discrete_vae_weight_path ${TOKENIZER_PATH}
    --clip_grad 3.0 --drop_path 0.1 --layer_scale_init_value 0.1 --batch_size 128 --lr 1.5e-3
"""
OFFICIAL = {
    "pretrain_base_22k": COMMON + "--warmup_steps 10000 --epochs 150",
    "pretrain_base_1k_800ep": COMMON + "--warmup_epochs 10 --epochs 800 --imagenet_default_mean_and_std",
}
# The published rows: value by value, so that a command misread in the same way twice does not pass.
SHARED_ROW = {
    "model": "beit_base_patch16_224_8k_vocab",
    "num_mask_patches": 75,
    "min_mask_patches_per_block": 16,
    "max_mask_patches_per_block": None,
    "input_size": 224,
    "second_input_size": 112,
    "discrete_vae_type": "dall-e",
    "rel_pos_bias": True,
    "abs_pos_emb": False,
    "layer_scale_init_value": 0.1,
    "drop_path": 0.1,
    "color_jitter": 0.4,
    "opt": "adamw",
    "opt_betas": (0.9, 0.999),
    "opt_eps": 1e-8,
    "weight_decay": 0.05,
    "weight_decay_end": None,
    "clip_grad": 3.0,
    "lr": 1.5e-3,
    "min_lr": 1e-5,
    "batch_size": 128,
    "update_freq": 1,
}
ROW_1K = {**SHARED_ROW, "warmup_epochs": 10, "warmup_steps": -1, "imagenet_default_mean_and_std": True}
PUBLISHED = {
    "pretrain_base_22k": {**SHARED_ROW, "epochs": 150, "warmup_steps": 10000, "imagenet_default_mean_and_std": False},
    "pretrain_base_1k_800ep": {**ROW_1K, "epochs": 800},
    "pretrain_base_1k_300ep": {**ROW_1K, "epochs": 300},
}
PATHS = ("data_path", "output_dir", "discrete_vae_weight_path")
PATHS_OF = {
    "pretrain": PATHS,
    "finetune": ("data_path", "output_dir", "finetune"),
    "linear": ("data_path", "output_dir", "pretrained_weights"),
}


def settings_of(recipe):
    """The settings of a run started with nothing but a recipe."""
    return vars(read_command_line(config_class(recipe), ["--config", recipe], "prog", ""))


def config_class(recipe):
    return CONFIG_OF[recipe.partition("_")[0]]


def paths_of(recipe):
    return PATHS_OF[recipe.partition("_")[0]]


def facts_of(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["recipe"]


def test_every_published_pretraining_run_has_its_recipe():
    assert {path.stem for path in RECIPES if path.stem.startswith("pretrain")} == set(PUBLISHED)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
class TestEveryRecipe:
    def test_holds_settings_of_its_job_only(self, path):
        values = read_yaml(config_class(path.stem), str(path))
        assert values
        assert values.keys() <= {field.name for field in fields(config_class(path.stem))}

    def test_holds_no_path_of_somebodys_machine(self, path):
        assert not read_yaml(config_class(path.stem), str(path)).keys() & {*paths_of(path.stem), "log_dir", "resume"}

    def test_says_where_it_is_from_what_it_reached_and_how_it_is_run(self, path):
        facts = facts_of(path)
        assert set(facts) == FACTS
        assert all(facts.values())

    def test_its_command_runs_it_on_as_many_gpus_as_it_says(self, path):
        launcher, processes, script, *flags = shlex.split(facts_of(path)["command"].replace("\\\n", " "))
        assert (launcher, processes) == ("torchrun", f"--nproc_per_node={facts_of(path)['gpus']}")
        assert (path.parents[2] / script).is_file()
        commanded = vars(read_command_line(config_class(path.stem), flags, script, ""))
        paths = paths_of(path.stem)
        assert all(commanded[name] for name in paths)
        expected = settings_of(path.stem)
        assert {name: value for name, value in commanded.items() if value != expected[name]}.keys() == set(paths)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_the_published_row(name):
    # Broken by any changed default or recipe value that the published run depends on.
    settings = settings_of(name)
    assert {key: settings[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_pretraining_recipes_have_the_published_batch(name):
    settings = settings_of(name)
    gpus = facts_of(next(path for path in RECIPES if path.stem == name))["gpus"]
    assert settings["batch_size"] * gpus * settings["update_freq"] == 2048


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_command_means_what_the_recipe_says(name):
    # Broken by an official flag that is spelled otherwise here, or read into another setting.
    command = vars(read_command_line(PretrainingConfig, shlex.split(OFFICIAL[name]), "run_beit_pretraining.py", ""))
    assert {key: command[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    assert [command[path] for path in PATHS] == ["${DATA_PATH}", "${OUTPUT_DIR}", "${TOKENIZER_PATH}"]
    recipe = settings_of(name)
    assert {key for key in command if command[key] != recipe[key]} == set(PATHS)
