"""The paper's ablations: each recipe differs from the reference in what its row of the table says, and in no more."""

import shlex

import pytest

from beit.config import read_command_line, read_facts, recipe_names
from beit.tasks.settings import FinetuningConfig, PretrainingConfig

# Typed from arXiv 2106.08254, tables 4 and 5: what differs from the reference, ImageNet top-1, and ADE20K mIoU with
# SETR-PUP (table 4) and with UPerNet (table 5).
PIXELS = {"target": "pixels", "pixel_norm": False}
TABLE = {
    "beit": ({}, 82.86, 44.65, 44.86),
    "random_masks": ({"mask_strategy": "random"}, 82.77, 42.93, None),
    "pixels": (PIXELS, 81.04, 41.38, None),
    "pixels_random_masks": ({**PIXELS, "mask_strategy": "random"}, 80.50, 37.09, None),
    "all_tokens": ({"predict": "all"}, 82.59, 40.93, None),
    "longer": ({"epochs": 800}, 83.19, 45.58, None),
    "layer_scale": ({"layer_scale_init_value": 0.1}, 83.00, None, 45.43),
    "layer_scale_and_bias": (
        {"layer_scale_init_value": 0.1, "rel_pos_bias": True, "abs_pos_emb": False},
        *(83.22, None, 45.70),
    ),
    "no_drop_path": ({"drop_path": 0.0}, "not published", None, None),
}
HEADS = ("SETR-PUP", "UPerNet")
# "ViT (used in this paper)", table 5: the recipes of the official command have LayerScale and the shared bias.
VIT = {"rel_pos_bias": False, "abs_pos_emb": True, "layer_scale_init_value": 0.0}


def settings_of(recipe):
    return vars(read_command_line(PretrainingConfig, ["--config", recipe], "prog", ""))


def differences(one, other):
    return {key: value for key, value in one.items() if value != other[key]}


def test_every_row_has_its_recipe():
    ours = {name for name in recipe_names() if "ablation" in name}
    assert ours == {*(f"pretrain_ablation_{row}" for row in TABLE), "finetune_ablation_224"}


def test_the_reference_is_the_official_run_of_300_epochs_with_the_architecture_of_the_paper():
    reference, official = settings_of("pretrain_ablation_beit"), settings_of("pretrain_base_1k_300ep")
    assert differences(reference, official) == VIT
    assert (reference["target"], reference["mask_strategy"], reference["predict"]) == ("tokens", "block", "masked")


@pytest.mark.parametrize("row", TABLE)
def test_a_row_differs_from_the_reference_as_the_table_says(row):
    # Broken by a default that changes, or by a recipe that builds on another one than it should.
    expected, acc1, *miou = TABLE[row]
    name = f"pretrain_ablation_{row}"
    assert differences(settings_of(name), settings_of("pretrain_ablation_beit")) == expected
    quoted = dict(read_facts(name)["quoted"])
    assert quoted.pop("after fine-tuning on ImageNet-1k at 224 pixels") == {"acc1": acc1}
    on_ade20k = {
        f"after segmentation on ADE20K with {head}": {"mIoU": it} for head, it in zip(HEADS, miou, strict=True)
    }
    assert quoted == {key: value for key, value in on_ade20k.items() if value["mIoU"]}


@pytest.mark.parametrize("row", TABLE)
def test_fine_tuning_builds_the_model_that_was_pre_trained(row):
    # Broken by flags that miss a part of the architecture: what was learnt of it would be dropped, or start anew.
    name = f"pretrain_ablation_{row}"
    flags = shlex.split(read_facts(name)["fine_tuned_with"])
    assert flags[:2] == ["--config", "finetune_ablation_224"]
    fine_tuning = vars(read_command_line(FinetuningConfig, flags, "prog", ""))
    pretraining = settings_of(name)
    assert {key: fine_tuning[key] for key in VIT} == {key: pretraining[key] for key in VIT}
    assert fine_tuning["imagenet_default_mean_and_std"] == pretraining["imagenet_default_mean_and_std"]


def test_the_longer_run_has_the_papers_hardware():
    facts = read_facts("pretrain_ablation_longer")
    assert (facts["hardware"], facts["time"]) == ("16 V100-32GB", "5 days")
