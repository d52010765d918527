"""Pre-training through the class token (BEiT v2): numbers, names and gradients of the official code; see golden/."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath

import beit
from beit.errors import InputError
from beit.modeling import Attention, VisionTransformerForMaskedImageModeling
from beit.training.optim import parameter_groups

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "vocab_size": 11}
HEADS = ("shared_lm_head", "own_lm_head")


@pytest.fixture(scope="module")
def stored(golden):
    return torch.load(golden / "mim_cls_pt_small.pt", weights_only=True)


@pytest.fixture(scope="module")
def facts(golden):
    return json.loads((golden / "cls_pt.json").read_text())


def official(stored, heads, dtype=torch.float32):
    """The stored model, made as a user does and loaded strictly."""
    name, config = "beit_base_patch16_224_8k_vocab_cls_pt", stored["variants"][heads]["config"]
    model = beit.create_model(name, **config).to(dtype)
    model.load_state_dict(stored["state_dict"] | (stored["own_head_state_dict"] if heads == "own_lm_head" else {}))
    return model


def small(**options):
    return VisionTransformerForMaskedImageModeling(**{**SMALL, "head_layers": 2, **options})


def losses(model, stored):
    outputs = model(stored["input"].to(model.cls_token.dtype), stored["bool_masked_pos"])
    return [F.cross_entropy(logits, stored["labels"]) for logits in outputs]


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, 2e-5), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_both_logits_and_losses_equal_the_reference(stored, heads, dtype, exact):
    # Breaks with the wrong early block, the class token taken early or after the norm, patches normalised before they
    # are mixed, no bias in the further blocks, or these in another order.
    reference, model = stored["variants"][heads], official(stored, heads, dtype)
    outputs = model(stored["input"].to(dtype), stored["bool_masked_pos"])
    for ours, theirs in zip(outputs, reference["logits64"], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=exact)
    for ours, number in zip(losses(model, stored), (1, 2), strict=True):
        torch.testing.assert_close(ours.double(), reference[f"loss_{number}_64"], rtol=0, atol=exact)
    nothing = torch.zeros_like(stored["bool_masked_pos"])
    everywhere = model(stored["input"].to(dtype), nothing, return_all_tokens=True)
    for ours, theirs in zip(everywhere, reference["all_logits_no_mask64"], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=exact)


@pytest.mark.parametrize("heads", HEADS)
def test_every_gradient_equals_the_reference(stored, heads):
    reference, model = stored["variants"][heads], official(stored, heads)
    sum(losses(model, stored)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, theirs in reference["grads"].items():
        assert (gradients[name] - theirs).norm() <= 1e-5 * theirs.norm(), name
    assert heads == "own_lm_head" or gradients.keys() == reference["grads"].keys()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("number", [1, 2])
def test_the_gradient_of_each_loss_equals_the_reference(stored, heads, number):
    reference, model = stored["variants"][heads], official(stored, heads, torch.float64)
    losses(model, stored)[number - 1].backward()
    for name, parameter in model.named_parameters():
        ours = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        assert ours == pytest.approx(reference[f"grad_norms_loss_{number}_64"][name] or 0.0, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("heads", HEADS)
def test_the_second_loss_reaches_the_last_blocks_through_the_class_token_only(stored, heads):
    model, states = official(stored, heads, torch.float64), {}
    for name, blocks in (("blocks", model.blocks), ("cls_pt_layers", model.cls_pt_layers)):
        for number, block in enumerate(blocks):

            def keep(_module, _inputs, output, name=f"{name}.{number}"):
                output.retain_grad()
                states[name] = output

            block.register_forward_hook(keep)
    losses(model, stored)[1].backward()
    assert states["blocks.3"].grad[:, 1:].abs().max() == 0 < states["blocks.3"].grad[:, 0].abs().max()
    for name, theirs in stored["variants"][heads]["loss_2_gradient_reaching_states64"].items():
        gradient = states[name].grad
        ours = {"cls": gradient[:, 0].norm().item(), "patches": gradient[:, 1:].norm().item()}
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12), name


def test_names_and_shapes_are_the_official_ones(stored, facts):
    for heads in HEADS:
        assert [n for n, _ in official(stored, heads).named_parameters()] == stored["variants"][heads]["param_order"]
    for size in ("base", "large"):
        name = f"beit_{size}_patch16_224_8k_vocab_cls_pt"
        for shared, suffix in ((True, ""), (False, " own_lm_head")):
            with torch.device("meta"):
                model = beit.create_model(name, shared_lm_head=shared)
            assert sum(p.numel() for p in model.parameters()) == facts["counts"][f"{name}{suffix}"]
            assert model.early_layers == {"base": 9, "large": 21}[size]
            if size == "base" and shared:
                assert {n: list(p.shape) for n, p in model.named_parameters()} == facts["shapes"]


def test_weight_decay_is_the_official_one(facts):
    sizes = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 4, "init_values": 0.1, "vocab_size": 32}
    heads = {"early_layers": 2, "head_layers": 2, "shared_lm_head": False}
    biases = {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": True}
    model = VisionTransformerForMaskedImageModeling(**sizes, **heads, **biases)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.05, no_decay=model.no_weight_decay())
    ours = [(group["weight_decay"], [names[id(p)] for p in group["params"]]) for group in groups]
    assert ours == [(group["weight_decay"], group["names"]) for group in facts["groups"]["groups_in_order"]]


def test_stochastic_depth_goes_on_where_the_early_block_is(facts):
    for case in facts["drop_path_rates"]:
        options = {key: case[key] for key in ("depth", "early_layers", "head_layers", "drop_path_rate")}
        model = small(**options)
        for blocks, theirs in ((model.blocks, case["blocks"]), (model.cls_pt_layers, case["cls_pt_layers"])):
            drops = [block.drop_path for block in blocks]
            ours = [drop.drop_prob if isinstance(drop, DropPath) else 0.0 for drop in drops]
            assert ours == pytest.approx(theirs, abs=1e-7)


@pytest.mark.parametrize("meta", [False, True])
def test_the_further_blocks_start_from_torchs_default(facts, meta):
    # As official, unlike the rest. Breaks if they are drawn like the rest, or their residual branches are not damped.
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 192, "depth": 4, "num_heads": 3, "init_values": 0.1}
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        model = small(**sizes, vocab_size=8192, early_layers=3, shared_lm_head=False, use_shared_rel_pos_bias=True)
    if meta:
        model.to_empty(device="cpu").init_weights()
    for name, (mean, std, low, high) in facts["init_stats"].items():
        tensor = model.get_parameter(name).detach()
        assert abs(tensor.mean().item() - mean) < 5 * std / math.sqrt(tensor.numel()) + 1e-6, name
        assert tensor.std().item() == pytest.approx(std, rel=0.1, abs=1e-6), name
        assert (tensor.min().item(), tensor.max().item()) == pytest.approx((low, high), rel=0.1, abs=2e-3), name


def test_heads_see_masked_patches_only_in_both_branches():
    model, seen = small(), []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape))
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[0, 1:4] = mask[2, 5] = True
    outputs = model(torch.randn(3, 3, 32, 32), mask)
    assert seen == [(4, 32), (4, 32)]
    everywhere = model.eval()(images := torch.randn(3, 3, 32, 32), mask, return_all_tokens=True)
    for some, everything in zip(model(images, mask), everywhere, strict=True):
        torch.testing.assert_close(some, everything[mask])
    assert len(outputs) == 2


def test_the_eager_path_and_checkpointing_reach_the_further_blocks():
    model = small(use_shared_rel_pos_bias=True).train()
    images, mask = torch.randn(2, 3, 32, 32), torch.ones(2, 16, dtype=torch.bool)
    expected = model(images, mask)
    model.set_grad_checkpointing()
    model.set_attention("eager")
    assert not any(module.fused for module in model.modules() if isinstance(module, Attention))
    for ours, theirs in zip(model(images, mask), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_further_blocks_follow_another_image_size():
    model = small(use_rel_pos_bias=True, use_shared_rel_pos_bias=True)
    model.set_input_size((40, 48))
    first, second = model(torch.randn(1, 3, 40, 48), torch.ones(1, 5, 6, dtype=torch.bool))
    assert first.shape == second.shape == (30, 11)


@pytest.mark.parametrize("options", [{"early_layers": 0}, {"early_layers": 5}, {"head_layers": -1}])
def test_a_block_that_is_not_there_is_named(options):
    with pytest.raises(InputError, match=r"early_layers \d+, head_layers"):
        small(**options)


def test_without_further_blocks_it_is_the_first_version():
    model = small(head_layers=0)
    assert not [name for name in model.state_dict() if "cls_pt" in name]
    assert model(torch.randn(1, 3, 32, 32), torch.ones(1, 16, dtype=torch.bool)).shape == (16, 11)
