"""What `--compile` and `--tokenizer_compile` rely on: one graph, compiled once, with the numbers of the plain model."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from beit.config import read_command_line
from beit.masking import RandomMaskGenerator
from beit.modeling import VisionTransformerForMaskedImageModeling
from beit.targets import TokenTarget
from beit.tasks.pretraining import MaskedPrediction, PretrainingConfig, tokenizer_dtype, with_patch_index
from beit.tokenizers.base import load_tokenizer
from beit.tokenizers.dvae import CustomizedTokenizer, DiscreteVAE, save_dvae
from beit.training.compilation import compile_for_training, uncompiled

GRID, MOST = (4, 4), 7
HALF = ((0.5,) * 3, (0.5,) * 3)


def batch_of(seed: int, room: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    masks = RandomMaskGenerator(GRID, MOST - seed)  # each batch has another number of masked patches
    batch = {
        "image": torch.from_numpy(rng.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)),
        "token_image": torch.from_numpy(rng.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)),
        "mask": torch.from_numpy(np.stack([masks(rng) for _ in range(3)])),
    }
    return with_patch_index(batch, room=room)


@pytest.fixture
def objective():
    torch.manual_seed(0)
    return MaskedPrediction(TokenTarget(CustomizedTokenizer(DiscreteVAE(32, 16, 8, 3, 8))), *HALF)


def model(**options):
    torch.manual_seed(0)
    made = VisionTransformerForMaskedImageModeling(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, vocab_size=16, init_values=0.1,
        use_shared_rel_pos_bias=True, use_abs_pos_emb=False, **options,
    )  # fmt: skip
    torch.nn.init.normal_(made.rel_pos_bias.relative_position_bias_table)
    return made


def loss_and_gradients(objective, trained, batch):
    trained.zero_grad()
    loss, metrics = objective(trained, batch, 0)
    loss.backward()
    return loss, metrics, {name: parameter.grad.clone() for name, parameter in trained.named_parameters()}


def test_padding_changes_no_number(objective):
    # Breaks if what is predicted in the room that is over reaches loss, accuracy or gradients.
    plain = model()
    for seed in range(3):
        bare, padded = batch_of(seed, 0), batch_of(seed, 3 * MOST + 5)
        assert "padded_index" not in bare
        assert len(padded["padded_index"]) == 3 * MOST + 5 > len(padded["patch_index"])
        loss, metrics, expected = loss_and_gradients(objective, plain, bare)
        other, other_metrics, actual = loss_and_gradients(objective, plain, padded)
        assert torch.equal(other, loss)
        assert torch.equal(other_metrics["mlm_acc"], metrics["mlm_acc"])
        torch.testing.assert_close(actual, expected)


# Recomputed or not, in float32 or not, one prediction or two: each of the six is met once, in two graphs.
@pytest.mark.slow
@pytest.mark.parametrize(("autocast", "checkpointing", "head_layers"), [(False, True, 2), (True, False, 0)])
def test_training_is_one_graph_that_is_compiled_once(
    objective, autocast, checkpointing, head_layers, monkeypatch, caplog
):
    # Masks of several sizes; fullgraph refuses a break. Breaks if a shape depends on the mask, such as an index
    # without padding, or the host looks at a number on the device.
    plain = model(head_layers=head_layers)
    compiled = copy.deepcopy(plain)
    for one in (plain, compiled):
        one.set_grad_checkpointing(checkpointing)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_with(self, backend=counter, **how))
    caplog.set_level("INFO", "beit")
    compile_for_training(compiled, recomputes=checkpointing)
    batches = [batch_of(seed, 3 * MOST) for seed in range(4)]
    assert len({len(batch["patch_index"]) for batch in batches}) > 1
    for batch in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss, _, expected = loss_and_gradients(objective, plain, batch)
            other, _, actual = loss_and_gradients(objective, compiled, batch)
        tolerance = {"atol": 2e-2, "rtol": 2e-2} if autocast else {"atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(other, loss, **tolerance)
        torch.testing.assert_close(actual, expected, **tolerance)
    assert counter.frame_count == 1
    assert list(compiled.state_dict()) == list(plain.state_dict())  # checkpoints stay what they are

    compiled.eval()
    with torch.no_grad(), uncompiled():
        for images in (3, 2):  # the last batch of an evaluation is smaller
            some = {name: value[:images] for name, value in batches[0].items()}
            assert objective.outputs_of_all(compiled, some).shape == (images, 16, 16)
    assert counter.frame_count == 1  # a picture is not worth minutes
    assert all(line.startswith("compiled in ") for line in caplog.messages)
    assert 1 <= len(caplog.messages) <= 2  # forward, and backward where torch leaves it for later


def test_a_compiled_tokenizer_gives_the_same_ids(tmp_path, monkeypatch):
    # Breaks if the compiled function is that of another instance, or sees another layout or format of images.
    torch.manual_seed(0)
    save_dvae(tmp_path, DiscreteVAE(32, 16, 8, 3, 8))
    counter = CompileCounterWithBackend("aot_eager")
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_with(function, backend=counter, **how))
    torch._dynamo.reset()
    images = torch.rand(3, 3, 32, 32)
    for dtype in (torch.float32, torch.bfloat16):
        plain = load_tokenizer(tmp_path, "customized", dtype=dtype)
        compiled = load_tokenizer(tmp_path, "customized", dtype=dtype, compiled=True)
        for mask in (None, torch.rand(3, 4, 4) < 0.3, torch.rand(3, 4, 4) < 0.6):
            assert torch.equal(compiled.encode(images, mask), plain.encode(images, mask))
    assert counter.frame_count == 2  # one for each format


@pytest.mark.parametrize(
    ("flags", "device", "expected"),
    [
        ((), "cpu", torch.float32),
        (("--amp_dtype", "bf16"), "cpu", torch.bfloat16),
        (("--amp_dtype", "bf16", "--tokenizer_dtype", "fp32"), "cpu", torch.float32),
        (("--tokenizer_dtype", "fp16"), "cpu", torch.float16),
        (("--amp_dtype", "bf16"), "cuda", torch.float16),
        (("--amp_dtype", "fp16"), "cuda", torch.float16),
        (("--amp_dtype", "fp32"), "cuda", torch.float32),
    ],
)
def test_the_tokenizer_goes_with_the_run(flags, device, expected):
    config = read_command_line(PretrainingConfig, list(flags), "prog", "")
    assert tokenizer_dtype(config, torch.device(device)) == expected
