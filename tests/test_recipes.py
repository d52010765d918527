"""The published runs: for every row, the recipe's command, read by its launcher, means what the row says.

The rows are typed from the sources, value by value, so that a command misread in the same way twice does not pass.
"""

import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from beit.commands.recipes import command, read_recipe
from beit.config import read_command_line, read_facts, read_yaml, recipe_names
from beit.tasks.base import resolve_batch
from beit.tasks.settings import FinetuningConfig, LinearProbeConfig, PretrainingConfig, PretrainingV2Config, VqkdConfig
from semantic_segmentation.config import SETTINGS, check
from tests.command_lines import read_test, read_train

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "beit" / "recipes").glob("[!_]*.yaml"))
CONFIG_OF = {
    "pretrain": PretrainingConfig,
    "finetune": FinetuningConfig,
    "linear": LinearProbeConfig,
    "vqkd": VqkdConfig,
}  # the part of a recipe's name before the first "_" -> whose settings
WITH_SETTINGS = [path for path in RECIPES if path.stem.partition("_")[0] in CONFIG_OF]
SEGMENTATION = [path for path in RECIPES if path.stem.startswith("segment")]
FACTS = {"task", "source", "data", "gpus", "hardware", "time", "quoted", "data_path", "start"}
SEGMENTATION_FACTS = {"config", "model", "batch_size", "total_batch_size", "max_steps"}

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
# Table 12 of the paper, its column "Large Size", and the LayerScale that the README gives released large models.
LARGE = {
    "model": "beit_large_patch16_224_8k_vocab",
    "epochs": 800,
    "batch_size": 128,
    "update_freq": 1,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "opt_betas": (0.9, 0.999),
    "lr": 1.5e-3,
    "min_lr": 1e-5,
    "warmup_epochs": 10,
    "clip_grad": 1.0,
    "drop_path": 0.1,
    "weight_decay": 0.05,
    "input_size": 224,
    "color_jitter": 0.4,
    "num_mask_patches": 75,
    "imagenet_default_mean_and_std": True,
    "layer_scale_init_value": 1e-5,
}
PUBLISHED = {
    "pretrain_base_22k": {**SHARED_ROW, "epochs": 150, "warmup_steps": 10000, "imagenet_default_mean_and_std": False},
    "pretrain_base_1k_800ep": {**ROW_1K, "epochs": 800},
    "pretrain_base_1k_300ep": {**ROW_1K, "epochs": 300},
    "pretrain_base_1k_300ep_mmpretrain": {**ROW_1K, "epochs": 300, "batch_size": 256},
    "pretrain_large_1k_800ep": LARGE,
    "pretrain_base_1k_300ep_maskdistill": {
        **{**ROW_1K, "epochs": 300, "num_mask_patches": 79},
        "target": "features",
        "teacher": "vit_base_patch16_clip_quickgelu_224.openai",
    },
    "pretrain_base_1k_300ep_maskfeat": {
        **{**ROW_1K, "epochs": 300, "batch_size": 256, "lr": 2e-4 * 8, "min_lr": 0.0, "warmup_epochs": 30},
        **{"num_mask_patches": 78, "min_mask_patches_per_block": 15, "color_jitter": 0.0, "drop_path": 0.0},
        "min_crop": 0.5,
        **{"rel_pos_bias": False, "abs_pos_emb": True, "layer_scale_init_value": 0.0, "clip_grad": 0.02},
        "target": "hog",
    },
}
V2 = {
    **{"model": "beit_base_patch16_224_8k_vocab_cls_pt", "epochs": 1600, "batch_size": 128, "early_layers": None},
    **{"head_layers": 2, "shared_lm_head": True, "num_mask_patches": 75, "mask_strategy": "block_exact"},
    **{"input_size": 224, "second_input_size": 224, "train_interpolation": "bicubic", "min_crop": 0.2},
    **{"second_interpolation": "bicubic", "discrete_vae_type": "vqkd", "imagenet_default_mean_and_std": True},
    **{"lr": 1.5e-3, "min_lr": 1e-5, "warmup_epochs": 10, "clip_grad": 3.0, "weight_decay": 0.05, "drop_path": 0.1},
    **{"layer_scale_init_value": 0.1, "opt": "adamw", "opt_eps": 1e-8, "opt_betas": (0.9, 0.999)},
}
V2_SHORT = {"epochs": 300, "drop_path": 0.0, "opt_betas": (0.9, 0.98)}
V2_LARGE = {"model": "beit_large_patch16_224_8k_vocab_cls_pt", "batch_size": 32, "layer_scale_init_value": 1e-5}
PUBLISHED |= {
    "pretrain_v2_base_1600ep": V2,
    "pretrain_v2_base_300ep": V2 | V2_SHORT,
    "pretrain_v2_large_1600ep": V2 | V2_LARGE,
    "pretrain_v2_large_300ep": V2 | V2_SHORT | V2_LARGE,
}
EIGHT = ("pretrain_base_1k_300ep_mmpretrain", "pretrain_base_1k_300ep_maskfeat")
GPUS = {**dict.fromkeys(PUBLISHED, 16), **dict.fromkeys(EIGHT, 8)}
GPUS |= dict.fromkeys(("pretrain_v2_large_1600ep", "pretrain_v2_large_300ep"), 64)
PROBE = {
    "model": "beit_base_patch16_224",
    "batch_size": 128,
    "update_freq": 1,
    "lr": 4e-3,
    "epochs": 100,
    "opt": "adamw",
    "weight_decay": 1e-4,
    "layers": (),
}
# Appendix D of the paper.
LARGE_PROBE = {
    "model": "beit_large_patch16_224",
    "batch_size": 128,
    "update_freq": 1,
    "lr": 4e-3,
    "epochs": 50,
    "opt": "adamw",
    "weight_decay": 1e-4,
    "layers": (),
    "pool": ("mean",),
    "imagenet_default_mean_and_std": True,
}
# The command of TOKENIZER.md, for each of the three released tokenizers.
TOKENIZER = {
    **{"process_type": "default", "train_interpolation": "bicubic", "min_crop": 0.08, "input_size": 224},
    **{"codebook_size": 8192, "codebook_dim": 32, "quantize_kmeans_init": True, "rec_loss_type": "cosine"},
    **{"batch_size": 64, "opt": "adamw", "opt_betas": (0.9, 0.99), "weight_decay": 1e-4, "warmup_epochs": 10},
    **{"epochs": 100, "lr": 5e-5, "min_lr": 1e-5, "ema_decay": 0.99, "clip_grad": None},
}
TOKENIZERS = {
    f"vqkd_{form}": TOKENIZER | {"model": f"vqkd_encoder_base_decoder_{form}"}
    for form in ("3x768x12_clip", "1x768x12_clip", "1x768x12_dino")
}
# Results in the paper, tables 1 and 9, by what stands in front of them in our files.
PAPER = {
    "pretrain_base_1k_800ep": {"after fine-tuning, 224": 83.2, "after 10 more epochs of it, 384": 84.6},
    "pretrain_large_1k_800ep": {"after fine-tuning, 224": 85.2, "after 10 more epochs of it, 384": 86.3},
    "linear_probe_base": {"the paper's run, from the 9th block": 56.7},
    "linear_probe_large": {"acc1": 73.5},
}
# Segmentation, row by row: model, crop, images x interval on 8 GPUs, lr, layer decay, stochastic depth,
# LayerScale, taps, channels of the head, stride. All take 160k steps of 16 images, after 1500 steps of warm-up.
SEGMENTATION_TABLE = """
segment_base_512_pt     base_12   512 2 1 7e-4 0.65 0.1 0.1  3-5-7-11   768  341
segment_base_512_pt2ft  base_12   512 2 1 3e-5 0.9  0.1 0.1  3-5-7-11   768  341
segment_base_640_pt2ft  base_12   640 2 1 3e-5 0.9  0.1 0.1  3-5-7-11   768  426
segment_large_512_pt2ft large_24 512 2 1 2e-5 0.95 0.2 1e-6 7-11-15-23 1024 341
segment_large_640_pt2ft large_24 640 1 2 2e-5 0.95 0.2 1e-6 7-11-15-23 1024 426
segment_v2_base_512        base_12   512 2 1 5e-5 0.75 0.15 0.1  3-5-7-11   768  341
segment_v2_base_512_ft21k  base_12   512 2 1 5e-5 0.85 0.15 0.1  3-5-7-11   768  341
segment_v2_large_512       large_24 512 2 1 4e-5 0.9 0.2 1e-6 7-11-15-23 1024 341
segment_v2_large_512_ft21k large_24 512 2 1 3e-5 0.9 0.2 1e-6 7-11-15-23 1024 341
"""
SEGMENTATION_ROWS = {line.split()[0]: line.split()[1:] for line in SEGMENTATION_TABLE.strip().splitlines()}
CONFIGS = {
    name: f"upernet_beit_{row[0]}_{row[1]}_slide_160k_ade20k_{name.rpartition('_')[2]}"
    for name, row in SEGMENTATION_ROWS.items()
}
CONFIGS |= {  # with the names of BEiT v2's
    f"segment_v2_{size}_512{start}": f"upernet_beit_{size}_{depth}_512_slide_160k_{data}"
    for size, depth in (("base", 12), ("large", 24))
    for start, data in (("", "ade20k"), ("_ft21k", "21ktoade20k"))
}
MULTI_SCALE = ("segment_base_512_ms", "segment_base_640_ms", "segment_large_512_ms", "segment_large_640_ms")
QUOTED_MIOU = {
    "segment_base_640_pt2ft": 53.61,
    "segment_v2_base_512": 53.1,
    "segment_v2_base_512_ft21k": 53.5,
    "segment_v2_large_512": 56.7,
    "segment_v2_large_512_ft21k": 57.54,
    "segment_base_640_ms": 54.26,
    "segment_large_640_pt2ft": 56.7,
    "segment_large_640_ms": 57.0,
}

PATHS = ("data_path", "output_dir", "discrete_vae_weight_path")
PATHS_OF = {
    "pretrain": PATHS,
    "finetune": ("data_path", "output_dir", "init_from"),
    "linear": ("data_path", "output_dir", "checkpoint"),
    "vqkd": ("data_path", "output_dir", "teacher"),
}


def settings_of(recipe):
    """The settings of a run started with nothing but a recipe."""
    return vars(read_command_line(config_class(recipe), ["--config", recipe], "prog", ""))


def config_class(recipe):
    return PretrainingV2Config if recipe.startswith("pretrain_v2") else CONFIG_OF[recipe.partition("_")[0]]


def paths_of(recipe):
    return PATHS_OF[recipe.partition("_")[0]]


def facts_of(path):
    return read_facts(path.stem)


def commanded(name, gpus):
    """What a recipe's command means: the number of processes, and the settings of its run with the batch split."""
    words = shlex.split(command(read_recipe(name), gpus).replace("\\\n", ""))
    if name.startswith("segment"):
        return segmentation_commanded(words)
    processes = 1
    if words[0] == "torchrun":
        processes = int(words[1].removeprefix("--nproc_per_node="))
        words.pop(1)
    script, *flags = words[1:]
    assert (ROOT / script).is_file()
    config = read_command_line(config_class(name), flags, script, "")
    return processes, vars(resolve_batch(config, processes, 2 if name.startswith("finetune") else 1))


def segmentation_commanded(words):
    tool, *arguments = words[1:]
    assert (ROOT / tool).is_file()
    read, positional = (read_test, 2) if "test" in tool else (read_train, 1)
    processes = int(arguments.pop(positional)) if words[0] == "bash" else 1  # the shell scripts take it after CONFIG …
    config = read(arguments)
    check(config)
    return processes, vars(resolve_batch(config, processes) if read is read_train else config)


def test_every_published_row_has_its_recipe():
    ours = {name for name in recipe_names() if "ablation" not in name and not name.startswith("finetune")}
    assert ours == {
        *PUBLISHED,
        *TOKENIZERS,
        "linear_probe_base",
        "linear_probe_large",
        *SEGMENTATION_ROWS,
        *MULTI_SCALE,
    }
    assert recipe_names() == [path.stem for path in RECIPES]


@pytest.mark.parametrize("path", WITH_SETTINGS, ids=lambda path: path.stem)
class TestEveryRecipe:
    def test_holds_settings_of_its_job_only(self, path):
        values = read_yaml(config_class(path.stem), str(path))
        assert values
        assert values.keys() <= {field.name for field in fields(config_class(path.stem))}

    def test_holds_no_path_of_somebodys_machine(self, path):
        assert not read_yaml(config_class(path.stem), str(path)).keys() & {*paths_of(path.stem), "log_dir", "resume"}

    @pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16])
    def test_its_command_is_the_published_run_on_any_number_of_gpus(self, path, gpus):
        expected, facts = settings_of(path.stem), facts_of(path)
        processes, settings = commanded(path.stem, gpus)
        assert processes == gpus
        assert processes * settings["batch_size"] * settings["update_freq"] == expected["total_batch_size"]
        assert settings["batch_size"] <= expected["batch_size"]
        start = {paths_of(path.stem)[2]} if not facts["start"] else set()
        paths = {*paths_of(path.stem)} - start
        assert all(settings[name] for name in paths)
        changed = {name for name in settings if settings[name] != expected[name]}
        assert changed - {"batch_size", "update_freq"} == paths
        if gpus == facts["gpus"]:
            assert settings["batch_size"] == expected["batch_size"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_where_it_is_from_and_what_it_reached(path):
    facts = facts_of(path)
    more = SEGMENTATION_FACTS if path in SEGMENTATION else set()
    assert {*FACTS, *more} <= facts.keys() <= {*FACTS, *more, "command", "note", "fine_tuned_with"}
    # Without a start are runs that need none (pixels as targets), without quoted results those nobody published.
    may_be_empty = {"start", "quoted"} if "ablation" in path.stem else {"start"} if "_mask" in path.stem else set()
    assert {name for name, fact in facts.items() if not fact} <= may_be_empty


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_shows_only_what_makes_it_differ(path):
    # Broken by a setting or a fact that the file it builds on gives already, with the same value.
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    above = (path.parent / content["base"]).read_text(encoding="utf-8")
    base = yaml.safe_load(above)
    assert [key for key in content if key in base and key != "base" and content[key] == base[key]] == []
    facts, base_facts = content.get("recipe", {}), base.get("recipe", {})
    assert [key for key in facts if facts[key] == base_facts.get(key)] == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_the_published_row(name):
    # Broken by any changed default or recipe value that the published run depends on.
    processes, settings = commanded(name, GPUS[name])
    assert {key: settings[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    assert processes * settings["batch_size"] * settings["update_freq"] == 2048


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_command_means_what_the_recipe_says(name):
    # Broken by an official flag that is spelled otherwise here, or read into another setting.
    given = vars(read_command_line(PretrainingConfig, shlex.split(OFFICIAL[name]), "run_beit_pretraining.py", ""))
    assert {key: given[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    assert [given[path] for path in PATHS] == ["${DATA_PATH}", "${OUTPUT_DIR}", "${TOKENIZER_PATH}"]
    _, recipe = commanded(name, GPUS[name])
    assert {key for key in given if given[key] != recipe[key]} == {*PATHS, "total_batch_size"}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_is_the_published_row(name):
    processes, settings = commanded(name, 8)
    assert processes * settings["batch_size"] * settings["update_freq"] == 512
    assert {key: settings[key] for key in TOKENIZERS[name]} == TOKENIZERS[name]


@pytest.mark.parametrize(("name", "row"), [("linear_probe_base", PROBE), ("linear_probe_large", LARGE_PROBE)])
def test_the_linear_probe_is_the_published_row(name, row):
    processes, settings = commanded(name, 8)
    assert processes == 8
    assert {key: settings[key] for key in row} == row


@pytest.mark.parametrize("name", PAPER)
def test_quotes_what_the_paper_has_and_says_where_its_model_differs(name):
    # Broken by a number misread, or by the paper's results standing without a word on its plain ViT.
    facts = read_facts(name)
    quoted = {key: fact for key, fact in facts["quoted"].items() if key != "parameters"}
    assert len(quoted) == len(PAPER[name])
    for start, result in PAPER[name].items():
        (found,) = [value for key, value in quoted.items() if key.startswith(start)]
        assert found in (result, {"acc1": result})
    assert "plain ViT" in facts["note"]


class TestSegmentation:
    @pytest.mark.parametrize("name", SEGMENTATION_ROWS)
    @pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16])
    def test_its_command_is_the_published_row(self, name, gpus):
        # Broken by a batch that is not 16, or a length that depends on how it is split.
        model, crop, images, interval, *rates, taps, channels, stride = SEGMENTATION_ROWS[name]
        processes, settings = commanded(name, gpus)
        assert settings["config"] == CONFIGS[name]
        assert processes * settings["batch_size"] * settings["update_freq"] == 16
        assert [settings[key] for key in ("max_steps", "warmup_steps", "eval_freq")] == [160000, 1500, 16000]
        row = {
            "model": f"beit_{model.partition('_')[0]}_patch16_224",
            "crop_size": int(crop),
            **dict(zip(("lr", "layer_decay", "drop_path", "layer_scale_init_value"), map(float, rates), strict=True)),
            "out_indices": tuple(map(int, taps.split("-"))),
            "head_channels": int(channels),
            "slide_stride": int(stride),
        }
        assert {key: settings[key] for key in row} == row
        if gpus == 8:
            assert (settings["batch_size"], settings["update_freq"]) == (int(images), int(interval))
        # UPerNet refuses to train on a single image: batch norm after pooling to 1 x 1 has one value.
        assert processes * settings["batch_size"] >= 2

    @pytest.mark.parametrize("name", SEGMENTATION_ROWS)
    def test_on_8_gpus_its_command_is_its_config(self, name):
        # The config is found by its name, as segmentation's launcher finds it: beit does not know that package.
        _, settings = commanded(name, 8)
        expected = vars(read_train([CONFIGS[name]]))
        given = {"data_path", "init_from", "output_dir", "deterministic", "launcher", "update_freq"}
        assert {key for key in settings if settings[key] != expected[key]} <= given
        assert settings["init_from"].startswith("beitv2_" if "_v2_" in name else "beit_")
        facts = read_facts(name)
        for key in ("model", "batch_size", "total_batch_size", "max_steps"):
            assert facts[key] == expected[key]

    @pytest.mark.parametrize("name", MULTI_SCALE)
    @pytest.mark.parametrize("gpus", [1, 3, 8])
    def test_the_multi_scale_tests(self, name, gpus):
        processes, settings = commanded(name, gpus)
        assert processes == gpus
        assert (settings["test_ratios"], settings["test_flip"]) == ((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), True)
        assert settings["eval"] == ("mIoU",)
        assert settings["crop_size"] == int(name.split("_")[2])

    @pytest.mark.parametrize("path", SEGMENTATION, ids=lambda path: path.stem)
    def test_quotes_what_the_config_quotes(self, path):
        # Broken by a number that is corrected in one of the two places.
        facts = facts_of(path)
        config = yaml.safe_load((SETTINGS.folder / f"{facts['config']}.yaml").read_text(encoding="utf-8"))["recipe"]
        shared = ("source", "data", "gpus", "hardware", "time", "quoted")
        assert {key: facts[key] for key in shared} == {key: config[key] for key in shared}
        assert facts["quoted"]["mIoU"] == QUOTED_MIOU.get(path.stem, "none in the source")
