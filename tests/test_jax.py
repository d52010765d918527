"""The models in JAX: torch's outputs and gradients at 1e-5, at any size, compiled, and checkpoints bit by bit."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from beit.checkpoints.export import convert
from beit.errors import InputError
from beit.jax import from_checkpoint, from_torch, official_weights
from beit.jax import save_checkpoint as save_in_jax
from beit.modeling import VisionTransformer, VisionTransformerForMaskedImageModeling
from beit.storage import load_checkpoint, save_checkpoint
from beit.zoo import create_model, get_model

pytestmark = pytest.mark.slow  # each shape is compiled
jax.config.update("jax_disable_most_optimizations", True)  # what is compiled here runs once

SIZES = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.1}
CLASSIFIER = {**SIZES, "num_classes": 5, "use_abs_pos_emb": False, "use_rel_pos_bias": True}
PLAIN = {"init_values": None, "qkv_bias": False}
MASKED = {**SIZES, "vocab_size": 16, "use_abs_pos_emb": False, "use_shared_rel_pos_bias": True}
MODELS = {
    "classifier": (VisionTransformer, CLASSIFIER),
    "class token, positions": (VisionTransformer, {**SIZES, **PLAIN, "use_mean_pooling": False, "num_classes": 5}),
    "features": (VisionTransformer, {**CLASSIFIER, "num_classes": 0}),
    "pre-training": (VisionTransformerForMaskedImageModeling, {**MASKED, "use_rel_pos_bias": True}),
    "pre-training v2": (VisionTransformerForMaskedImageModeling, {**MASKED, "head_layers": 2, "early_layers": 1}),
    "pre-training v2, two heads": (
        VisionTransformerForMaskedImageModeling,
        {**MASKED, "head_layers": 1, "shared_lm_head": False},
    ),
}


def random_model(kind, **overrides):
    model_class, options = MODELS[kind]
    torch.manual_seed(0)
    model = model_class(**{**options, **overrides})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(model, batch=3):
    """Images, and for pre-training a mask with a different number of patches in each of them."""
    torch.manual_seed(1)
    images, (height, width) = torch.randn(batch, 3, *model.img_size), model.patch_embed.grid_size
    masked = isinstance(model, VisionTransformerForMaskedImageModeling)
    return (images, *([torch.rand(batch, height, width) < 0.4] if masked else []))


def in_jax(tensors):
    return [tensor.numpy() for tensor in tensors]


def assert_same(outputs, expected):
    outputs, expected = ([it] if not isinstance(it, list) else it for it in (outputs, expected))
    for one, other in zip(outputs, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(np.asarray(one), other.detach().numpy(), rtol=1e-5, atol=1e-5)


def loss_of(outputs):
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return sum((it**2).mean() for it in outputs)


def call(model, *arrays, **options):
    return nnx.jit(lambda model, arrays: model(*arrays, **options))(model, arrays)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "features"])
def test_outputs_and_gradients_are_those_of_torch(kind):
    model = random_model(kind)
    copy, tensors = from_torch(model), inputs(model)
    outputs = model(*tensors)
    loss_of(outputs).backward()
    arrays = in_jax(tensors)
    index = {"masked_index": np.flatnonzero(arrays[1])} if len(arrays) == 2 else {}

    @nnx.jit
    def outputs_and_gradients(model, arrays, index):
        def loss(model):
            found = model(*arrays, **index)
            return loss_of(found), found

        gradients, found = nnx.grad(loss, has_aux=True)(model)
        return found, gradients

    found, gradients = outputs_and_gradients(copy, arrays, index)
    assert_same(found, outputs)
    nnx.update(copy, gradients)
    gradients = official_weights(copy)
    parameters = dict(model.named_parameters())
    assert gradients.keys() == parameters.keys()
    for name, gradient in gradients.items():
        wanted = torch.zeros_like(gradient) if parameters[name].grad is None else parameters[name].grad
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()) + 1e-9, msg=name)


@pytest.mark.parametrize("kind", ["class token, positions", "pre-training"])
def test_another_size_resizes_as_torch_does(kind):
    for size in ((48, 32), 16):
        model = random_model(kind)
        copy = from_torch(model)
        model.set_input_size(size)
        copy.set_input_size(size)
        weights = official_weights(copy)
        assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    tensors = inputs(model)
    index = {"masked_index": np.flatnonzero(tensors[1])} if len(tensors) == 2 else {}
    assert_same(call(copy, *in_jax(tensors), **index), model(*tensors))
    with pytest.raises(InputError, match="cannot be cut into patches"):
        copy.set_input_size((30, 32))


@pytest.mark.parametrize("kind", MODELS)
def test_an_official_file_comes_back_bit_by_bit(kind, tmp_path):
    model = random_model(kind)
    facts = {"image_size": model.img_size, "num_heads": 2, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}
    facts |= {"args": {"early_layers": 1}} if kind == "pre-training v2" else {}
    save_checkpoint(tmp_path / "ours.pth", {"model": model.state_dict(), **facts})
    convert(tmp_path / "ours.pth", tmp_path / "official.pth", "unilm")
    copy = from_checkpoint(tmp_path / "official.pth")
    assert copy.metadata["mean"] == (0.5, 0.4, 0.3)
    save_in_jax(copy, tmp_path / "back.pth")
    official, back = (load_checkpoint(tmp_path / f"{name}.pth") for name in ("official", "back"))
    assert list(back["model"]) == list(official["model"])
    assert all(torch.equal(tensor, back["model"][name]) for name, tensor in official["model"].items())
    assert {key: back[key] for key in facts} == {key: official[key] for key in facts}
    opened = get_model(tmp_path / "back.pth")
    assert opened.img_size == model.img_size
    assert getattr(opened, "early_layers", None) == getattr(model, "early_layers", None)


def test_files_of_other_libraries_open_and_are_written(tmp_path):
    model = random_model("classifier", img_size=32)
    save_checkpoint(tmp_path / "ours.pth", {"model": model.state_dict(), "num_heads": 2})
    convert(tmp_path / "ours.pth", tmp_path / "hf", "huggingface")
    copy = from_checkpoint(tmp_path / "hf")
    save_in_jax(copy, tmp_path / "timm", to="timm")
    images = inputs(model)
    for there in (copy, from_checkpoint(tmp_path / "timm")):
        assert_same(call(there, *in_jax(images)), model(*images))
    with pytest.raises(InputError, match="unknown format 'keras'"):
        save_in_jax(copy, tmp_path / "keras", to="keras")


def test_a_compiled_function_is_told_how_many_patches_are_masked():
    model = random_model("pre-training", depth=1)
    copy, (images, mask) = from_torch(model), inputs(model)
    arrays = in_jax((images, mask))
    with pytest.raises(InputError, match="give masked_index= or return_all_tokens=True"):
        call(copy, *arrays)
    assert_same(call(copy, *arrays, return_all_tokens=True), model(images, mask, return_all_tokens=True))
    assert_same(copy(*arrays), model(images, mask))  # in one that is not, it finds them itself


def test_stochastic_depth_drops_whole_branches_of_an_image_in_training_only():
    model = create_model("beit_tiny_patch16_224", **SIZES, drop_path_rate=0.4, num_classes=5)
    copy, images = from_torch(model.train()), inputs(model)[0].numpy()
    drop = copy.blocks[1].drop_path
    values = drop(jnp.ones((200, 4, 6)))
    assert set(np.unique(values.round(4))) == {np.float32(0), np.float32(1.6667)}
    assert bool((values == values[:, :1, :1]).all())
    assert 60 <= int((values[:, 0, 0] == 0).sum()) <= 100  # 0.4 of 200, within three standard deviations
    forward = nnx.jit(lambda model, images: model(images))
    assert not jnp.array_equal(forward(copy, images), forward(copy, images))
    copy.eval()
    assert_same(forward(copy, images), model.eval()(torch.from_numpy(images)))


def test_mistakes_are_one_line():
    classifier, masked = (from_torch(random_model(kind)) for kind in ("classifier", "pre-training"))
    images = jnp.zeros((2, 3, 32, 48))
    for call, message in (
        (lambda: classifier(images[..., :40]), r"images have shape \(2, 3, 32, 40\), not \(B, 3, 32, 48\)"),
        (lambda: classifier(images[0]), r"images have shape \(3, 32, 48\), not \(B, 3, 32, 48\)"),
        (lambda: classifier(images.astype("uint8")), "images are uint8: give floating point numbers"),
        (lambda: classifier.set_input_size("x"), "'x' is no size"),
        (lambda: save_in_jax(random_model("classifier"), "a.pth"), "VisionTransformer is no model of beit.jax"),
        (lambda: masked(images, jnp.ones((2, 6, 4))), r"bool_masked_pos is \(2, 6, 4\): give \(B, 4, 6\)"),
        (lambda: classifier.embed(images, jnp.ones((2, 24))), "a classifier has no mask token"),
        (lambda: from_torch(random_model("classifier", drop_rate=0.1)), "no dropout: build the model with drop_rate=0"),
        (lambda: from_torch(torch.nn.Linear(2, 2)), "beit.jax has no Linear"),
        (lambda: from_checkpoint("nowhere.pth"), "nowhere.pth"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_without_jax_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "beit.jax")
    with pytest.raises(InputError, match=r"beit\.jax needs jax and flax: pip install jax flax"):
        importlib.import_module("beit.jax")
