import copy
import inspect
import json
import math
import pickle
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath
from timm.models.beit import Beit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from beit.attention import aligned, attend, kernels_with_bias_gradient
from beit.errors import InputError
from beit.modeling import (
    Attention,
    Backbone,
    VisionTransformer,
    VisionTransformerForMaskedImageModeling,
    resize_position_embedding,
)
from beit.relative_position import relative_position_bias, relative_position_index, resize_table
from beit.zoo import create_model, get_model

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "init_values": 0.1}
BOTH_BIASES = {"use_abs_pos_emb": True, "use_rel_pos_bias": True, "use_shared_rel_pos_bias": True}


def classifier(**overrides):
    return VisionTransformer(**{**SMALL, "num_classes": 5, **BOTH_BIASES, **overrides})


def masked_image_model(**overrides):
    return VisionTransformerForMaskedImageModeling(**{**SMALL, "vocab_size": 11, **BOTH_BIASES, **overrides})


def randomize(model, seed=0):
    """Fills every parameter with numbers that matter: a fresh model has zero tables and almost no attention."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 1.2 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.5
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def images(model, batch=2, seed=1):
    return torch.randn(batch, 3, *model.img_size, generator=torch.Generator().manual_seed(seed))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_all_close(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.fixture(scope="module")
def stored_mim(golden):
    stored = torch.load(golden / "mim_small.pt", weights_only=True)
    variant = stored["variants"]["shared_relpos_ls"]
    model = VisionTransformerForMaskedImageModeling(**stored["base_config"], **variant["config"])
    model.load_state_dict(variant["state_dict"], strict=True)
    return model, stored, variant


@pytest.fixture(scope="module")
def stored_classifier(golden):
    stored = torch.load(golden / "cls_small.pt", weights_only=True)
    variant = stored["variants"]["meanpool_perlayer"]
    model = VisionTransformer(**variant["config"])
    model.load_state_dict(variant["state_dict"], strict=True)
    return model, stored, variant


@pytest.mark.parametrize(
    "wrong", [{"num_heads": 0}, {"patch_size": 0}, {"patch_size": (16, -1)}, {"depth": -1}, {"mlp_ratio": 0.0}]
)
def test_sizes_below_one_are_refused_in_one_line(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=f"^{name} {re.escape(str(value))}: must be above 0$"):
        classifier(**wrong)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_image_model_equals_the_reference(stored_mim, attention):
    # Breaks with any change of the computation: head, mask token, scale of the query, eps, order of the gathered rows.
    model, stored, variant = stored_mim
    model.set_attention(attention)
    logits = model(stored["input"], stored["bool_masked_pos"])
    torch.testing.assert_close(logits, variant["out_masked"], atol=1e-5, rtol=1e-5)
    everything = model(stored["input"], stored["bool_masked_pos"], return_all_tokens=True)
    torch.testing.assert_close(everything, variant["out_all"], atol=1e-5, rtol=1e-5)
    features = model.forward_features(stored["input"], stored["bool_masked_pos"])
    torch.testing.assert_close(features, variant["features_after_norm"], atol=1e-5, rtol=1e-5)

    loss = F.cross_entropy(logits, stored["labels"])
    assert loss.item() == pytest.approx(variant["loss"], abs=1e-5)
    assert_all_close(gradients(model, loss), variant["grads"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_image_model_equals_the_reference_in_float64(stored_mim, attention):
    # Breaks where float32 hides it: a LayerNorm eps of 1e-5 moves the logits by 5e-5 only.
    model, stored, variant = stored_mim
    model = copy.deepcopy(model).double()
    model.set_attention(attention)
    x, mask = stored["input"].double(), stored["bool_masked_pos"]
    torch.testing.assert_close(model(x, mask), variant["out_masked64"], atol=1e-9, rtol=0)
    torch.testing.assert_close(model(x, mask, return_all_tokens=True), variant["out_all64"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_classifier_equals_the_reference(stored_classifier, attention):
    # Breaks with another pooling, another place of the norm, or a bias table that is read for the wrong block.
    model, stored, variant = stored_classifier
    model.set_attention(attention)
    logits = model(stored["input"])
    torch.testing.assert_close(logits, variant["logits"], atol=1e-5, rtol=1e-5)
    features = model.forward_features(stored["input"])
    torch.testing.assert_close(features, variant["forward_features"], atol=1e-5, rtol=1e-5)

    loss = F.cross_entropy(logits, stored["labels"])
    assert loss.item() == pytest.approx(variant["loss_ce"], abs=1e-5)
    smoothed = F.cross_entropy(logits, stored["labels"], label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(variant["loss_label_smoothing_0.1"], abs=1e-5)
    soft = F.cross_entropy(logits, stored["soft_targets"])
    assert soft.item() == pytest.approx(variant["loss_soft_target"], abs=1e-5)
    assert_all_close(gradients(model, loss), variant["grads"], atol=1e-5, rtol=1e-5)

    double = copy.deepcopy(model).double()
    torch.testing.assert_close(double(stored["input"].double()), variant["logits64"], atol=1e-9, rtol=0)


def test_intermediate_layers_equal_the_reference(stored_classifier):
    # Breaks when a norm is applied to them, the class token is lost, or the patches are put down in another order.
    model, stored, variant = stored_classifier
    outputs = model.get_intermediate_layers(stored["input"])
    for output, expected in zip(outputs, variant["intermediate_layers"], strict=True):
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.get_intermediate_layers(stored["input"], n=2)[0], outputs[1])
    assert torch.equal(model.get_intermediate_layers(stored["input"], n=[0, 2])[1], outputs[2])
    (last,) = model.get_intermediate_layers(stored["input"], n=1, reshape=True)
    assert last.shape == (3, 48, 4, 4)
    assert torch.equal(last[:, :, 1, 2], outputs[2][:, 1 + 1 * 4 + 2])
    for wrong in (0, 4, [3], []):
        with pytest.raises(InputError, match="3 blocks"):
            model.get_intermediate_layers(stored["input"], n=wrong)


def test_checkpoint_transfer_keeps_the_reference_logits(golden):
    # The stored logits were computed after the official loader moved 64-pixel weights to 80 pixels; set_input_size must
    # move them to the same place. Breaks with another resize of tables or position embedding.
    stored = torch.load(golden / "ckpt_transfer.pt", weights_only=True)
    case = stored["cases"]["E_cls64_to_80_head_mismatch"]
    source = stored["sources"][case["source"]]
    config = {key: value for key, value in source["config"].items() if key != "kind"}
    model = VisionTransformer(**stored["base_config"], **config)
    model.load_state_dict(source["state_dict"], strict=True)
    model.set_input_size(80)
    model.reset_classifier(7)
    model.load_state_dict({**model.state_dict(), **case["target_init"]}, strict=True)
    for name, expected in case["result_transformed"].items():
        torch.testing.assert_close(model.state_dict()[name], expected, atol=5e-6, rtol=0)
    torch.testing.assert_close(model(case["input"]), case["logits"], atol=1e-5, rtol=1e-5)


def test_parameters_are_registered_in_the_official_order(stored_mim, stored_classifier, golden):
    # Optimizer states number parameters by this order. Breaks when a member of a module moves.
    for model, _, variant in (stored_mim, stored_classifier):
        assert [name for name, _ in model.named_parameters()] == variant["param_order"]
    tokens = [name for name, _ in masked_image_model().named_parameters()][:4]
    assert tokens == ["cls_token", "mask_token", "pos_embed", "patch_embed.proj.weight"]


def test_checkpoints_carry_no_index_and_need_none(stored_mim):
    # Breaks when the derived buffer becomes persistent, or official files that hold it do not load strictly; also under
    # a wrapper's prefix, and without changing the caller's dictionary.
    model, _, variant = stored_mim
    assert not [name for name in model.state_dict() if "index" in name]
    before = set(variant["state_dict"])
    wrapped = nn.ModuleDict({"module": copy.deepcopy(model)})
    wrapped.load_state_dict({f"module.{name}": value for name, value in variant["state_dict"].items()}, strict=True)
    assert set(variant["state_dict"]) == before
    with pytest.raises(RuntimeError, match="Unexpected key"):
        wrapped.load_state_dict({**wrapped.state_dict(), "other.relative_position_index": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**variant["state_dict"], "head.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    "options",
    [
        {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1},
        {"use_rel_pos_bias": True, "use_abs_pos_emb": True, "init_values": None, "img_size": (48, 80)},
        {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1, "img_size": (80, 48)},
        {"use_abs_pos_emb": True, "init_values": 0.1, "qkv_bias": False, "patch_size": (8, 16)},
    ],
    ids=["per-layer", "non-square", "shared", "absolute"],
)
@pytest.mark.parametrize("mean_pooling", [True, False])
def test_logits_equal_timm(options, mean_pooling):
    # An independent implementation. Breaks with a name, a shape or a computation that is not BEiT's.
    config = {**SMALL, "img_size": 64, "num_classes": 7, **options}
    reference = randomize(Beit(**config, global_pool="avg" if mean_pooling else "token")).double().eval()
    model = VisionTransformer(**config, use_mean_pooling=mean_pooling).double().eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    x = images(model).double()
    torch.testing.assert_close(model(x), reference(x), atol=1e-9, rtol=0)


def naive_attention(module, x, index):
    """Attention with loops over heads, queries and keys, as the paper writes it."""
    batch, tokens, dim = x.shape
    width = dim // module.num_heads
    weight = module.qkv.weight
    query = x @ weight[:dim].T + module.q_bias
    key = x @ weight[dim : 2 * dim].T
    value = x @ weight[2 * dim :].T + module.v_bias
    mixed = torch.zeros_like(x)
    for image in range(batch):
        for head in range(module.num_heads):
            part = slice(head * width, (head + 1) * width)
            for i in range(tokens):
                logits = [
                    query[image, i, part] @ key[image, j, part] / math.sqrt(width)
                    + module.relative_position_bias_table[index[i, j], head]
                    for j in range(tokens)
                ]
                mixed[image, i, part] = torch.stack(logits).softmax(0) @ value[image, :, part]
    return mixed @ module.proj.weight.T + module.proj.bias


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
def test_attention_equals_the_formula(fused):
    # Breaks when heads are interleaved otherwise, the bias is transposed, or the query is scaled before its bias.
    module = randomize(Attention(6, num_heads=2, window_size=(2, 3))).double()
    module.fused = fused
    index = relative_position_index((2, 3))
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(module(x, index), naive_attention(module, x, index), atol=1e-12, rtol=0)


def compare_attentions(model, x, *, dtype=None):
    """Relative error of outputs and gradients of the fused path against the eager one in the model's own precision."""
    results = {}
    for attention in ("eager", "sdpa"):
        model.set_attention(attention)
        autocast = torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None and attention == "sdpa")
        with autocast:
            output = model(x)
        weights = torch.linspace(-1, 1, output.numel(), device=x.device).view_as(output)
        results[attention] = {"output": output, **gradients(model, (output * weights).sum())}
    truth = results["eager"]
    assert all(value.norm() > 0 for value in truth.values())
    return {
        name: ((results["sdpa"][name].float() - value.float()).norm() / value.float().norm()).item()
        for name, value in truth.items()
    }


@torch.no_grad()
@pytest.mark.parametrize("img_size", [32, (24, 40)])
def test_fused_attention_equals_eager(img_size):
    # Breaks when the fused call loses the bias or the scale. Its gradients are those of a GPU, below.
    model = randomize(classifier(img_size=img_size, depth=2)).double()
    fused = model(images(model).double())
    model.set_attention("eager")
    torch.testing.assert_close(fused, model(images(model).double()), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_runs_under_autocast(dtype, attention):
    # Breaks when bias and query differ in dtype, which the fused call refuses, or when more than precision is lost.
    model = randomize(masked_image_model())
    model.set_attention(attention)
    x, mask = images(model), torch.arange(32).view(2, 16) % 3 == 0
    truth = model(x, mask)
    with torch.autocast("cpu", dtype=dtype):
        logits = model(x, mask)
    assert logits.dtype == dtype
    assert (logits.float() - truth).norm() < 0.05 * truth.norm()
    logits.float().square().sum().backward()
    assert model.rel_pos_bias.relative_position_bias_table.grad.abs().sum() > 0
    assert torch.isfinite(model.rel_pos_bias.relative_position_bias_table.grad).all()


def test_a_model_of_half_precision_runs(monkeypatch):
    # Breaks when some tensor is made in float32 along the way, or bias tables that stay in float32 are not cast.
    model = randomize(classifier()).to(torch.bfloat16)
    model.rel_pos_bias.float()
    seen = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: seen.append(k["attn_mask"]) or fused(*a, **k)
    )
    for attention, learns in (("sdpa", True), ("sdpa", False), ("eager", False)):
        model.set_attention(attention)
        with torch.set_grad_enabled(learns):
            assert model(images(model).to(torch.bfloat16)).dtype == torch.bfloat16
    # A CPU takes a float32 bias all the same, CUDA does not; nor does its efficient kernel take fewer dimensions.
    assert {(bias.dtype, bias.ndim) for bias in seen} == {(torch.bfloat16, 4)}
    model.reset_classifier(3)
    assert model.head.weight.dtype == torch.bfloat16
    assert model.head.weight.std() > 0


@pytest.fixture
def fused_calls(monkeypatch):
    calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    return calls


def test_attention_is_what_was_chosen(fused_calls):
    # Breaks when set_attention chooses nothing: all comparisons of the two paths would pass.
    model = classifier()
    with torch.no_grad():
        model(images(model))
        assert len(fused_calls) == 3  # one a block, by default
        model.set_attention("eager")
        model(images(model))
        assert len(fused_calls) == 3
        model.set_attention("sdpa")
    model(images(model))
    assert len(fused_calls) == 3  # a CPU has no fused kernel with a gradient for the bias
    model.rel_pos_bias, model.blocks = None, model.blocks.requires_grad_(False)
    model(images(model))
    assert len(fused_calls) == 6


@pytest.mark.parametrize(("device", "query_learns", "fused"), [("cpu", True, 0), ("cuda", True, 1), ("cuda", False, 0)])
def test_a_learning_bias_takes_the_path_that_can_teach_it(device, query_learns, fused, fused_calls):
    # Breaks when on a CPU torch falls back to its own plain path, in float32, or when frozen weights with a learning
    # table meet the backward of CUDA's kernel, which crashes there in some releases.
    with FakeTensorMode():
        query, key, value = torch.empty(3, 2, 2, 5, 8, device=device, requires_grad=query_learns).unbind()
        attend(query, key, value, torch.empty(2, 5, 5, device=device, requires_grad=True))
    assert len(fused_calls) == fused


def test_a_training_step_in_bf16_is_as_exact_as_that_of_the_peers(tmp_path):
    # Relative errors against float64. Breaks when sums or the softmax are rounded on the way: fused attention, which
    # the peers call, computes in float32 inside.
    from transformers import BeitConfig, BeitForImageClassification

    sizes = {"image_size": 64, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = BeitConfig(**sizes, intermediate_size=256, use_relative_position_bias=True, num_labels=7)
    randomize(BeitForImageClassification(config)).save_pretrained(tmp_path)
    ours = get_model(tmp_path)
    timms = Beit(
        **{**SMALL, "img_size": 64, "embed_dim": 64}, use_rel_pos_bias=True, use_abs_pos_emb=False,
        norm_layer=ours.norm_layer, num_classes=7, global_pool="avg",
    )  # fmt: skip
    timms.load_state_dict(ours.state_dict(), strict=True)
    peers = {"timm": timms, "transformers": BeitForImageClassification.from_pretrained(tmp_path)}

    def results(model, x, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(x)
        output = getattr(output, "logits", output)
        tables = [value for name, value in model.named_parameters() if name.endswith("bias_table")]
        return output, *torch.autograd.grad(output.double().square().sum(), [x, *tables])

    def errors(model):
        x = images(ours, batch=4).requires_grad_()
        exact = results(copy.deepcopy(model).double().eval(), x.double(), False)
        found = results(model.eval(), x, True)
        return [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    limits = [2 * max(both) for both in zip(*(errors(peer) for peer in peers.values()), strict=True)]
    assert len(limits) == 2 + 3  # logits, images, tables
    found = errors(ours)
    assert all(error < limit for error, limit in zip(found, limits, strict=True)), (found, limits)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_training_step_stores_no_more_than_timms(autocast):
    # In sizes of which attention takes the most, as at 384 pixels and above. Breaks when attention stores
    # float32 in a step in bf16, or a checkpointed block what it could compute again.
    config = {**SMALL, "patch_size": 2, "embed_dim": 64, "use_rel_pos_bias": True, "use_abs_pos_emb": False}
    timms, ours = Beit(**config, num_classes=5, global_pool="avg").train(), VisionTransformer(**config).train()

    def stored(model):
        known, found = {parameter.data_ptr() for parameter in model.parameters()}, {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(images(ours))
        return sum(found.values()), output  # which keeps them, so that no place is used twice

    (theirs, _), (plain, _) = stored(timms), stored(ours)
    assert plain <= theirs * (0.75 if autocast else 1.0)
    ours.set_grad_checkpointing()
    inputs = ours.get_num_layers() * 2 * 257 * 64 * 4  # bytes: kept by the checkpoints themselves
    assert stored(ours)[0] + inputs <= plain / 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torchs_fused_attention_still_returns_the_gradient_of_a_learned_bias(device):
    # A canary: pytorch#171707 asks for no such gradient at all. If it fails, tables no longer learn with `sdpa`.
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=generator).to(device) for shape in ((2, 3, 17, 8),) * 4 + ((1, 3, 17, 17),))
    query, key, value, weights, bias = drawn
    results = []
    for fused in (True, False):
        inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value, bias)]
        q, k, v, learned = inputs
        if fused:
            with kernels_with_bias_gradient(device):
                output = F.scaled_dot_product_attention(q, k, v, attn_mask=learned)
        else:
            output = (q @ k.transpose(-2, -1) / math.sqrt(8) + learned).softmax(-1) @ v
        results.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    assert all(gradient.norm() > 0.1 for gradient in results[1])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_attention_keeps_to_kernels_with_a_bias_gradient():
    # Breaks when cuDNN's kernel, whose backward knows no bias, is allowed on CUDA again.
    with kernels_with_bias_gradient("cuda"):
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_attention_keeps_to_a_deterministic_kernel_where_that_is_wanted(monkeypatch):
    # Breaks when --deterministic, which warns where there is no such kernel, gets the efficient one: its backward does
    # not warn each time, and gives other bits.
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with kernels_with_bias_gradient("cuda"):
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()


def test_attention_maps_are_those_of_the_forward_pass():
    # Breaks when the map is of another block, misses a bias, or is not what multiplies the values.
    model = randomize(classifier(img_size=(24, 40))).double()
    x = images(model).double()
    for block in (0, 1, -1):
        maps = model.get_attention_maps(x, block)
        assert maps.shape == (2, 2, 16, 16)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 16, dtype=torch.float64))
        seen = []
        hook = model.blocks[block].norm1.register_forward_hook(lambda module, args, out, s=seen: s.append(out))
        output = []
        other = model.blocks[block].attn.register_forward_hook(lambda module, args, out, o=output: o.append(out))
        model(x)
        hook.remove()
        other.remove()
        attn = model.blocks[block].attn
        value = (F.linear(seen[0], attn.qkv.weight[64:], attn.v_bias)).view(2, 16, 2, 16).transpose(1, 2)
        torch.testing.assert_close(attn.proj((maps @ value).transpose(1, 2).flatten(2)), output[0])
    with pytest.raises(InputError, match="3 blocks"):
        model.get_attention_maps(x, 3)
    with pytest.raises(InputError, match=r"'sdpa' or 'eager'"):
        model.set_attention("flash")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("img_size", "tokens"), [(224, 197), (384, 577), (512, 1025)])
def test_fused_attention_equals_eager_on_a_gpu(img_size, tokens, dtype, monkeypatch):
    # Breaks when a kernel without a bias gradient is taken, or one that is wrong for a length that is not aligned.
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    config = {"img_size": img_size, "patch_size": 16, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 8}
    model = randomize(VisionTransformer(**config, **BOTH_BIASES)).cuda()
    assert model.patch_embed.num_patches + 1 == tokens
    errors = compare_attentions(model, images(model, batch=4).cuda(), dtype=dtype)
    assert max(errors.values()) < (1e-3 if dtype is None else 0.1), errors


def test_masked_logits_are_the_masked_rows_of_all_logits():
    # Breaks when the gathered rows come in another order, or a grid-shaped mask is read column by column.
    model = randomize(masked_image_model(img_size=(24, 40))).double()
    x = images(model).double()
    mask = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    everything = model(x, mask, return_all_tokens=True)
    assert everything.shape == (2, 15, 11)
    torch.testing.assert_close(model(x, mask), everything[mask.flatten(1)])
    assert torch.equal(model(x, mask), model(x, mask.flatten(1)))
    assert model(x, torch.zeros_like(mask)).shape == (0, 11)


def test_masked_patches_are_not_seen():
    # Breaks when a masked patch leaks into the prediction, or an unmasked one does not reach it.
    model = randomize(masked_image_model())
    x, mask = images(model), torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, 1, 2] = True
    hidden, seen = x.clone(), x.clone()
    hidden[:, :, 8:16, 16:24] = torch.nan  # the masked patch itself
    seen[:, :, 0:8, 0:8] += 1.0
    assert torch.equal(model(x, mask), model(hidden, mask))
    assert not torch.allclose(model(x, mask), model(seen, mask))


def test_the_head_runs_on_masked_patches_only():
    # Breaks when the 8192-way head is computed for all patches and most of it thrown away.
    model = masked_image_model()
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[:-1]))
    mask = torch.arange(32).view(2, 16) < 7
    model(images(model), mask)
    assert rows == [(7,)]


def test_wrong_inputs_are_named():
    # Breaks when a user meets a shape mismatch from inside instead of a sentence.
    model = masked_image_model()
    mask = torch.zeros(2, 16, dtype=torch.bool)
    with pytest.raises(InputError, match=r"40 x 32 pixels.*32 x 32.*set_input_size\(\(40, 32\)\)"):
        model(torch.zeros(2, 3, 40, 32), mask)
    with pytest.raises(InputError, match=r"\(B, 3, height, width\), not \(2, 1, 32, 32\)"):
        model(torch.zeros(2, 1, 32, 32), mask)
    with pytest.raises(InputError, match=r"\(2, 15\).*\(2, 16\) or \(2, 4, 4\)"):
        model(images(model), mask[:, 1:])
    with pytest.raises(InputError, match="no mask token"):
        classifier().get_attention_maps(images(model), bool_masked_pos=mask)
    with pytest.raises(InputError, match="230 x 224 pixels cannot be cut into patches of 16 x 16"):
        VisionTransformer(img_size=(230, 224), depth=1)
    with pytest.raises(InputError, match="num_heads a divisor"):
        VisionTransformer(embed_dim=100, num_heads=3, depth=1)


@pytest.mark.parametrize(("keyword", "value"), [("qk_scale", 0.1), ("attn_head_dim", 64), ("drop_block_rate", 0.1)])
def test_official_keywords_without_a_meaning(keyword, value):
    # Breaks official code that passes them at their default, or drops silently what a user asked for.
    assert isinstance(classifier(**{keyword: None}), VisionTransformer)
    with pytest.raises(InputError, match=f"{keyword}={value} has no meaning here: use (num_heads|drop_path_rate)"):
        classifier(**{keyword: value})


@pytest.mark.parametrize("model", [VisionTransformer, VisionTransformerForMaskedImageModeling])
def test_constructors_take_keywords_and_no_others(model):
    # Breaks when **kwargs swallow a typo, or a keyword of the official constructors is lost.
    with pytest.raises(
        TypeError, match=rf"{model.__name__}\(\) .* 'use_rel_pos_bais' \(did you mean 'use_rel_pos_bias'"
    ):
        model(use_rel_pos_bais=True)
    with pytest.raises(InputError, match="'x' is no size"):
        model(img_size="x")
    with pytest.raises(TypeError):
        model(224)
    official = """img_size patch_size in_chans embed_dim depth num_heads mlp_ratio qkv_bias drop_rate attn_drop_rate
        drop_path_rate init_values use_abs_pos_emb use_rel_pos_bias use_shared_rel_pos_bias"""
    own = {VisionTransformer: {"num_classes", "use_mean_pooling", "init_scale"}}.get(model, {"vocab_size", "init_std"})
    assert own < inspect.signature(model).parameters.keys()
    assert set(official.split()) < inspect.signature(Backbone).parameters.keys()
    with torch.device("meta"):
        model(**{name: parameter.default for name, parameter in inspect.signature(Backbone).parameters.items()
                 if parameter.kind is parameter.KEYWORD_ONLY})  # fmt: skip


def test_options_are_what_they_say():
    # Breaks when an option builds parameters that it should not, or leaves out those it should.
    plain = classifier(use_abs_pos_emb=False, use_rel_pos_bias=False, use_shared_rel_pos_bias=False, init_values=0)
    names = {name for name, _ in plain.named_parameters()}
    assert not [name for name in names if "gamma" in name or "rel" in name or "pos" in name]
    assert plain(images(plain)).shape == (2, 5)
    assert {name for name in names if "bias" in name and "_bias" in name} == {
        f"blocks.{block}.attn.{kind}_bias" for block in range(3) for kind in "qv"
    }
    assert not [
        name for name, _ in classifier(qkv_bias=False).named_parameters() if name.endswith(("q_bias", "v_bias"))
    ]
    assert classifier(init_values=None).blocks[0].gamma_1 is None
    assert "norm.weight" in classifier(use_mean_pooling=False).state_dict()
    assert "norm.weight" not in classifier(use_mean_pooling=True).state_dict()
    assert classifier(norm_layer=partial(nn.LayerNorm, eps=1e-12)).blocks[0].norm1.eps == 1e-12


def test_classification_reads_the_mean_or_the_class_token():
    # Breaks when mean pooling counts the class token, or a final norm is applied before it.
    for mean_pooling in (True, False):
        model = randomize(classifier(use_mean_pooling=mean_pooling)).double()
        x = images(model).double()
        last = model.get_intermediate_layers(x)[-1]
        pooled = model.fc_norm(last[:, 1:].mean(1)) if mean_pooling else model.norm(last[:, 0])
        torch.testing.assert_close(model.forward_features(x), pooled)
        torch.testing.assert_close(model(x), model.head(pooled))


def test_classifier_can_be_replaced():
    # Breaks when the head keeps its size, its old weights, or appears on another device or dtype than the model.
    model = randomize(classifier()).double()
    old = model.get_classifier()
    model.reset_classifier(9)
    assert model.num_classes == 9
    assert model.get_classifier() is model.head is not old
    assert model(images(model).double()).shape == (2, 9)
    assert 0 < model.head.weight.std() < 5e-5  # 0.02 * init_scale
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(images(model).double()).shape == (2, 32)


def test_stochastic_depth_grows_linearly():
    # Breaks when it starts above 0, ends below the rate, or a branch has another rate than its block.
    model = classifier(depth=5, drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert isinstance(classifier(depth=1, drop_path_rate=0.2).blocks[0].drop_path, nn.Identity)
    assert not [module for module in classifier().modules() if isinstance(module, DropPath)]


def test_dropout_stands_where_the_reference_has_it():
    # Breaks when the MLP drops between its layers, or evaluation still drops.
    model = randomize(classifier(drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.3))
    block = model.blocks[1]
    assert [block.attn.attn_drop.p, block.attn.proj_drop.p, block.mlp.drop2.p, model.pos_drop.p] == [0.2, 0.1, 0.1, 0.1]
    hidden = []
    block.mlp.fc2.register_forward_hook(lambda module, args, output: hidden.append(args[0]))
    x = images(model)
    for attention in ("sdpa", "eager"):
        model.set_attention(attention)
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))
    assert all((layer == 0).float().mean() < 0.01 for layer in hidden)


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_checkpointing_changes_no_number(drop):
    # Breaks when the recomputed block draws other random numbers, misses the bias, or the gradient of the shared table.
    model = randomize(classifier(drop_rate=drop, drop_path_rate=drop)).train()
    x, results = images(model), []
    runs = []
    model.blocks[0].mlp.register_forward_hook(lambda module, args, output: runs.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        output = model(x)
        results.append({"output": output, **gradients(model, output.square().sum())})
    assert_all_close(results[1], results[0], atol=0, rtol=0)
    assert len(runs) == 1 + 2  # the block runs again in the backward pass


def test_shared_bias_is_gathered_once(monkeypatch):
    # Breaks when each block gathers the shared table anew.
    calls = []
    monkeypatch.setattr(
        "beit.attention.relative_position_bias", lambda *args: calls.append(1) or relative_position_bias(*args)
    )
    model = masked_image_model(use_rel_pos_bias=False)
    model(images(model), torch.ones(2, 16, dtype=torch.bool))
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_biases_that_were_looked_up_before_give_the_same_tokens(own, shared, autocast, monkeypatch):
    # Breaks when a bias is left out, added twice, of another dtype, or looked up again in each pass.
    model = randomize(classifier(use_rel_pos_bias=own, use_shared_rel_pos_bias=shared))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens = model.embed(images(model))
        expected, kept = model.forward_blocks(tokens, stop=2, keep=[0])
        biases = model.position_biases()
        monkeypatch.setattr("beit.attention.relative_position_bias", lambda *_: pytest.fail("looked up again"))
        found, kept_too = model.forward_blocks(tokens, stop=2, keep=[0], biases=biases)
    assert len(biases) == 3
    assert all((bias is not None) == (own or shared) for bias in biases)
    assert torch.equal(found, expected)
    assert torch.equal(kept_too[0], kept[0])


def test_shared_bias_comes_to_the_blocks_as_they_compute(monkeypatch):
    # Breaks when each block brings the bias into the number format of its attention by itself, or gradients stay away.
    seen = []
    monkeypatch.setattr("beit.attention.attend", lambda *a, **k: seen.append(a[3]) or attend(*a, **k))
    model = randomize(masked_image_model(use_rel_pos_bias=False))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images(model), torch.ones(2, 16, dtype=torch.bool))
    assert {bias.dtype for bias in seen} == {torch.bfloat16}
    assert len({bias.data_ptr() for bias in seen}) == 1
    output.float().square().sum().backward()
    table = model.rel_pos_bias.relative_position_bias_table
    assert table.dtype == torch.float32
    assert table.grad.abs().sum() > 0


@pytest.mark.parametrize("length", [16, 17, 197])
def test_an_aligned_bias_is_the_same_in_longer_rows(length):
    # Breaks when rows are not 8 numbers apart (the CUDA kernel would copy them), or values or gradients get lost.
    bias = torch.randn(3, length, length, requires_grad=True)
    rows = aligned(bias)
    assert torch.equal(rows, bias)
    assert rows.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in rows.stride()[:-1])
    rows.sum().backward()
    assert torch.equal(bias.grad, torch.ones_like(bias))


def test_layer_ids_follow_the_depth(golden):
    # Breaks when layer decay gives a parameter another learning rate than the official code does.
    ids = {name: masked_image_model().layer_id(name) for name, _ in masked_image_model().named_parameters()}
    for name, layer in ids.items():
        if name.startswith("blocks."):
            assert layer == int(name.split(".")[1]) + 1
        elif name.startswith(("norm", "lm_head", "rel_pos_bias")):
            assert layer == 4
        else:
            assert layer == 0, name
    assert {classifier().layer_id(name) for name in ("fc_norm.weight", "head.bias")} == {4}
    assert classifier().no_weight_decay() == {"pos_embed", "cls_token"}
    assert classifier().get_num_layers() == 3


@pytest.mark.parametrize("build", [classifier, masked_image_model])
@pytest.mark.parametrize("options", [{}, {"init_values": None, "use_rel_pos_bias": False}])
def test_initialisation_forgets_nothing(build, options):
    # Breaks when a new parameter is left as allocated: memory that happens to be zero hides it.
    model = build(**options)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.init_weights()
    assert not [name for name, parameter in model.named_parameters() if parameter.isnan().any()]


def test_initialisation_from_the_meta_device():
    # Breaks when the derived index is left as allocated.
    with torch.device("meta"):
        model = masked_image_model()
    model.to_empty(device="cpu")
    model.relative_position_index.fill_(-1)
    model.init_weights()
    assert torch.equal(model.relative_position_index, relative_position_index((4, 4)))
    assert torch.isfinite(model(images(model), torch.ones(2, 16, dtype=torch.bool))).all()


def test_initialisation_of_the_masked_image_model():
    # Breaks when it is truncated elsewhere than at one standard deviation, or the patch projection keeps torch's own.
    torch.manual_seed(0)
    model = masked_image_model(embed_dim=128, vocab_size=500)
    truncated = 0.02 * 0.5396  # a normal distribution cut at one standard deviation keeps 0.54 of it
    for weight in (model.lm_head.weight, model.patch_embed.proj.weight, model.blocks[1].attn.qkv.weight):
        assert weight.abs().max() <= 0.02
        assert weight.std().item() == pytest.approx(truncated, rel=0.03)
    for token in (model.cls_token, model.mask_token, model.pos_embed):
        assert 0.5 * truncated < token.std() < 1.5 * truncated
    assert model.patch_embed.proj.bias.abs().max() == 0
    for layer, block in enumerate(model.blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(truncated / math.sqrt(2 * layer), rel=0.03)
        assert (block.gamma_1 == 0.1).all()
        assert (block.norm1.weight == 1).all()
        assert block.attn.relative_position_bias_table.abs().max() == 0


def test_initialisation_of_the_classifier():
    # Breaks when it is truncated at one or two standard deviations, or the patch projection is drawn as the rest.
    torch.manual_seed(0)
    model = classifier(embed_dim=128, num_classes=400)
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.blocks[0].attn.qkv.weight.abs().max() > 0.06
    assert model.blocks[2].mlp.fc2.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.02)
    bound = 1 / math.sqrt(3 * 8 * 8)  # torch's default: uniform in ±1/sqrt(fan_in)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert model.patch_embed.proj.bias.abs().max() > 0
    assert model.head.weight.std().item() == pytest.approx(0.02 * 0.001, rel=0.03)


@settings(deadline=None, max_examples=15)
@given(st.tuples(st.integers(1, 5), st.integers(1, 5)), st.sampled_from([4, (4, 6)]))
def test_any_grid_works(grid, patch_size):
    # Breaks where height and width change places: not seen on squares.
    height, width = (4, 4) if patch_size == 4 else patch_size
    size = (grid[0] * height, grid[1] * width)
    model = masked_image_model(img_size=size, patch_size=patch_size, depth=1, embed_dim=8)
    assert (model.img_size, model.patch_embed.grid_size, model.patch_embed.patch_size) == (size, grid, (height, width))
    assert model(torch.randn(2, 3, *size), torch.ones(2, *grid, dtype=torch.bool)).shape == (2 * grid[0] * grid[1], 11)
    (features,) = model.get_intermediate_layers(torch.randn(2, 3, *size), reshape=True)
    assert features.shape == (2, 8, *grid)


def test_set_input_size_resizes_tables_and_positions():
    # Breaks when one table is forgotten, the axes change places, or a frozen parameter comes back learning.
    model = randomize(masked_image_model())
    model.pos_embed.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    model.set_input_size((24, 56))
    assert model.img_size == (24, 56)
    assert not model.pos_embed.requires_grad
    for name, value in model.state_dict().items():
        if name.endswith("relative_position_bias_table"):
            assert torch.equal(value, resize_table(before[name], (4, 4), (3, 7)))
        elif name == "pos_embed":
            assert torch.equal(value, resize_position_embedding(before[name], (4, 4), (3, 7)))
        else:
            assert torch.equal(value, before[name])
    assert torch.equal(model.relative_position_index, relative_position_index((3, 7)))
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in masked_image_model().named_parameters()
    ]
    model(images(model), torch.ones(2, 3, 7, dtype=torch.bool)).sum().backward()
    assert model.rel_pos_bias.relative_position_bias_table.grad is not None
    with pytest.raises(InputError, match="60 x 56"):
        model.set_input_size((60, 56))
    assert model.img_size == (24, 56)


def test_position_embedding_resize_is_bicubic():
    # Breaks with another interpolation or with aligned corners; the stored case stands in the transfer test.
    embedding = torch.randn(1, 13, 2)
    resized = resize_position_embedding(embedding, (3, 4), (5, 6))
    grid = embedding[0, 1:].T.reshape(1, 2, 3, 4)
    expected = F.interpolate(grid, size=(5, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resized[0, 1:].T.reshape(1, 2, 5, 6), expected)
    assert torch.equal(resized[:, 0], embedding[:, 0])
    with pytest.raises(InputError, match=r"\(1, 17, channels\), not \(1, 13, 2\)"):
        resize_position_embedding(embedding, (4, 4), (5, 6))


def test_models_can_be_copied_and_sent():
    # Breaks weight averaging (deepcopy) and sending models to other processes (pickle).
    model = randomize(classifier())
    x = images(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        twin.load_state_dict({**model.state_dict(), "relative_position_index": torch.zeros(1)}, strict=True)


def test_published_models_have_the_official_names_and_shapes(golden):
    # Breaks when a released file would not load without a rename.
    official = json.loads((golden / "official_state_dicts.json").read_text())
    for name, published in official.items():
        with torch.device("meta"):
            model = create_model(name)
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        expected = {key: shape for key, shape in published["state_dict"].items() if not key.endswith("position_index")}
        assert shapes == expected
        assert list(shapes) == list(expected)
        assert sum(parameter.numel() for parameter in model.parameters()) == published["num_params"]
        index = {tuple(s) for key, s in published["state_dict"].items() if key.endswith("position_index")}
        assert index == {tuple(model.relative_position_index.shape)}
        assert np.prod(model.patch_embed.grid_size) == model.patch_embed.num_patches
