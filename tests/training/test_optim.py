"""Parameter groups against the stored ones of the official code, optimizers by name."""

import copy
import json
import logging

import pytest
import torch
from torch import nn

from beit.errors import InputError
from beit.modeling import VisionTransformer, VisionTransformerForMaskedImageModeling
from beit.training.optim import apply_schedules, create_optimizer, load_optimizer, parameter_groups

SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 4}


@pytest.mark.parametrize("name", ["adahessian", "bnbadam", "adamvv"])
def test_an_optimizer_that_cannot_be_used_is_one_line(name):
    group = {"params": [nn.Parameter(torch.ones(2))]}
    with pytest.raises(InputError, match=name) as caught:
        create_optimizer(name, [group], lr=0.1)
    assert "\n" not in str(caught.value)


def assert_groups_equal(model, groups, stored):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = [(group["lr_scale"], group["weight_decay"], [names[id(p)] for p in group["params"]]) for group in groups]
    theirs = [(group["lr_scale"], group["weight_decay"], group["names"]) for group in stored["groups_in_order"]]
    assert [names for *_, names in ours] == [names for *_, names in theirs]
    assert [scale for scale, *_ in ours] == pytest.approx([scale for scale, *_ in theirs])
    assert [decay for _, decay, _ in ours] == [decay for _, decay, _ in theirs]


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (
            "pretrain_shared_relpos_wd0.05",
            {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "init_values": 0.1},
        ),
        (
            "pretrain_abs_perlayer_nols_wd0.05",
            {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": False, "use_rel_pos_bias": True, "init_values": 0},
        ),
    ],
)
def test_pretraining_groups(golden, case, options):
    # Breaks if mask_token or the bias tables lose their weight decay, which the official code gives them.
    stored = json.loads((golden / "optim_groups.json").read_text())[case]
    model = VisionTransformerForMaskedImageModeling(**SMALL, vocab_size=128, **options)
    assert_groups_equal(model, parameter_groups(model, 0.05, no_decay=model.no_weight_decay()), stored)


@pytest.mark.parametrize("keep_tables", [True, False])
def test_layer_decay_groups(golden, keep_tables):
    case = "finetune_ld0.65_wd0.05" + ("" if keep_tables else "_disable_wd_relpos")
    stored = json.loads((golden / "optim_groups.json").read_text())[case]
    model = VisionTransformer(
        **SMALL, num_classes=10, use_abs_pos_emb=False, use_rel_pos_bias=True, use_mean_pooling=True, init_values=0.1
    )
    tables = {name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")}
    groups = parameter_groups(
        model,
        0.05,
        no_decay=set(model.no_weight_decay()) | (set() if keep_tables else tables),
        layer_id=model.layer_id,
        num_layers=3,
        layer_decay=0.65,
    )
    assert_groups_equal(model, groups, stored)


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert [p is model.weight for group in groups for p in group["params"]] == [True]


def test_schedules_scale_by_layer_and_leave_groups_without_decay_alone():
    model = nn.Linear(2, 2)
    groups = parameter_groups(
        model, 0.1, layer_id=lambda name: 0 if name == "weight" else 1, num_layers=1, layer_decay=0.5
    )
    optimizer = create_optimizer("adamw", groups, lr=1.0)
    apply_schedules(optimizer, 3, lambda step: step, lambda step: step / 10)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.75, 0.3), (1.5, 0.0)]


def test_optimizers_by_name():
    weights = [{"params": [nn.Parameter(torch.ones(2, 2))], "weight_decay": 0.3}]
    adamw = create_optimizer("adamw", weights, lr=1e-3, eps=1e-6, betas=(0.8, 0.9))
    assert type(adamw) is torch.optim.AdamW
    assert (adamw.defaults["eps"], adamw.defaults["betas"]) == (1e-6, (0.8, 0.9))
    assert adamw.param_groups[0]["weight_decay"] == 0.3
    assert type(create_optimizer("sgd", weights, lr=1e-3)) is torch.optim.SGD
    assert "lamb" in type(create_optimizer("lamb", weights, lr=1e-3)).__name__.lower()


def test_apex_optimizer_falls_back_with_a_line(caplog):
    with caplog.at_level(logging.WARNING):
        optimizer = create_optimizer("fusedadamw", [{"params": [nn.Parameter(torch.ones(2))]}], lr=1e-3)
    assert type(optimizer) is torch.optim.AdamW
    assert "apex is not installed" in caplog.text


def test_unknown_optimizer_names_its_neighbours():
    with pytest.raises(InputError, match="adamw"):
        create_optimizer("adamww", [{"params": [nn.Parameter(torch.ones(2))]}], lr=1e-3)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "adan", "adafactor", "muon"])
def test_an_optimizer_goes_on_as_if_it_had_not_been_stopped(name):
    # Breaks when something that an optimizer counts outside the parameters' states is left behind, or a setting of the
    # stopped run is taken over.
    def make(lr):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
        return model, create_optimizer(name, parameter_groups(model, 0.05), lr=lr)

    def train(model, optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    undisturbed, optimizer = make(1e-2)
    train(undisturbed, optimizer, range(6))
    stopped, optimizer = make(1e-2)
    train(stopped, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 0.5
    model, resumed = make(1e-2)
    model.load_state_dict(stopped.state_dict())
    load_optimizer(resumed, copy.deepcopy(optimizer.state_dict()), type(resumed).__name__, "checkpoint.pth")
    train(model, resumed, range(3, 6))
    for parameter, expected in zip(model.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(parameter, expected)
