"""The dVAE against the stored reference, and each piece of its loss against a direct computation."""

import math

import pytest
import torch

from beit.errors import InputError
from beit.tokenizers.dvae import (
    DiscreteVAE,
    QuantizedAutoencoder,
    RelaxedAutoencoder,
    codebook_statistics,
    count_codes,
    from_signed_range,
    kl_to_uniform,
    reconstruction_loss,
    relaxed_codes,
    to_signed_range,
)


@pytest.fixture(scope="module")
def reference(golden):
    return torch.load(golden / "dvae_custom" / "expected.pt", weights_only=True)


@pytest.fixture(scope="module")
def model(golden, reference):
    model = DiscreteVAE(**reference["config"])
    # Strict: a renamed or reshaped parameter breaks every "customized" checkpoint in the wild.
    weights = torch.load(golden / "dvae_custom" / "pytorch_model.bin", weights_only=True)["weights"]
    model.load_state_dict(weights)
    return model.eval()


def test_logits_ids_and_probabilities_equal_the_reference(model, reference):
    # Breaks with another order of layers, padding, a ReLU more or less in a block, or a missing skip connection.
    logits = model(reference["input"])
    assert torch.allclose(logits, reference["logits"], atol=1e-5)
    assert torch.allclose(logits.softmax(dim=1), reference["probs"], atol=1e-6)
    assert torch.equal(model(reference["input"]).argmax(dim=1), reference["ids"])


def test_decoded_image_equals_the_reference_and_the_one_hot_mixture(model, reference):
    # Breaks when the decoder is mirrored wrongly, or ids are read column by column.
    ids = reference["decode_input"].reshape(reference["ids"].shape)
    decoded = model.decode(ids)
    assert torch.allclose(decoded, reference["decoded"], atol=1e-5)
    one_hot = torch.nn.functional.one_hot(ids, 64).permute(0, 3, 1, 2).float()
    assert torch.allclose(model.decode_relaxed(one_hot), decoded, atol=1e-5)


def test_sizes_rebuild_the_same_model_and_image_sides_need_not_be_equal():
    # Breaks if config.json forgets a constructor argument, or height and width are swapped.
    model = DiscreteVAE((16, 32), num_tokens=10, codebook_dim=6, num_layers=2, hidden_dim=4)
    twin = DiscreteVAE(**model.sizes())
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert twin.image_size == (16, 32)
    assert model(torch.zeros(1, 3, 16, 32)).shape == (1, 10, 4, 8)
    assert model.decode(torch.zeros(1, 4, 8, dtype=torch.long)).shape == (1, 3, 16, 32)


def test_official_sizes_are_the_defaults():
    model = DiscreteVAE(112)
    assert model.codebook.weight.shape == (8192, 512)
    assert model.head.weight.shape == (8192, 256, 1, 1)
    assert model.downsampling == 8


@pytest.mark.parametrize("sizes", [{"image_size": 30}, {"image_size": 0}, {"image_size": 32, "num_tokens": 0}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(InputError):
        DiscreteVAE(**sizes)


def test_pixel_range_round_trip():
    images = torch.rand(2, 3, 4, 4)
    assert to_signed_range(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-1, 0, 1]
    assert torch.allclose(from_signed_range(to_signed_range(images)), images, atol=1e-6)
    assert from_signed_range(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]


def test_relaxed_codes_are_distributions_whose_argmax_follows_the_posterior():
    # Gumbel-max: the largest entry is a sample of softmax(logits), at any temperature. Breaks with noise of another
    # distribution (Gaussian, uniform), noise of the wrong sign, or a softmax over the wrong axis.
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log()[None, :, None, None].expand(1, 4, 200, 200)
    for temperature in (1.0, 0.0625):
        codes = relaxed_codes(logits, temperature, torch.Generator().manual_seed(0))
        assert torch.allclose(codes.sum(dim=1), torch.ones(1, 200, 200), atol=1e-5)
        shares = torch.bincount(codes.argmax(dim=1).flatten(), minlength=4) / 40_000
        assert torch.allclose(shares, probabilities, atol=0.01)
    assert codes.max(dim=1).values.mean() > 0.9  # cold: nearly one-hot


def test_relaxed_codes_repeat_with_the_generator_and_pass_gradients():
    logits = torch.randn(1, 5, 2, 2, requires_grad=True)
    first, second = (relaxed_codes(logits, 0.5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    (first * torch.randn(1, 5, 2, 2)).sum().backward()
    assert logits.grad.abs().sum() > 0


def test_kl_is_summed_over_the_grid_and_meaned_over_the_batch():
    # The direct double loop; breaks with a mean over the wrong axis (negative KL) or the reversed divergence.
    logits = torch.randn(3, 7, 2, 4, dtype=torch.float64) * 2
    total = 0.0
    for image in logits:
        for cell in image.flatten(1).T:
            q = [math.exp(v) / sum(math.exp(u) for u in cell.tolist()) for v in cell.tolist()]
            total += sum(p * math.log(p * 7) for p in q)
    assert kl_to_uniform(logits).item() == pytest.approx(total / 3, rel=1e-5)
    assert kl_to_uniform(torch.full((2, 7, 2, 4), 3.0)).item() == pytest.approx(0, abs=1e-6)
    certain = torch.zeros(1, 7, 1, 1)
    certain[0, 2] = 1000
    assert kl_to_uniform(certain).item() == pytest.approx(math.log(7))


def test_the_kl_is_normalised_per_pixel_value():
    # 8-pixel cells of RGB: the mean KL of a cell weighs kl_weight / 192.
    vae, images = DiscreteVAE(16, num_tokens=16, codebook_dim=4, num_layers=3, hidden_dim=4), torch.randn(2, 3, 16, 16)
    result = RelaxedAutoencoder(vae)(images, temperature=1.0, kl_weight=6.6)
    assert result.penalty.item() == pytest.approx(6.6 / 192 * kl_to_uniform(vae(images)).item() / 4, rel=1e-5)


def test_reconstruction_kinds():
    images, target = torch.tensor([0.5, 3.0]), torch.zeros(2)
    assert reconstruction_loss(images, target).item() == pytest.approx((0.25 + 9) / 2)
    assert reconstruction_loss(images, target, "smooth_l1").item() == pytest.approx((0.125 + 2.5) / 2)


def test_logits_and_losses_are_float32_inside_autocast(model, reference):
    # Breaks when the head or the KL runs in half precision: log-probabilities of 8192 codes need float32.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.features(reference["input"]).dtype == torch.bfloat16
        logits = model(reference["input"])
        assert logits.dtype == torch.float32
        assert relaxed_codes(logits.bfloat16(), 1.0).dtype == torch.float32
        decoded = model.decode_relaxed(relaxed_codes(logits, 1.0))
        assert reconstruction_loss(decoded, reference["input"]).dtype == torch.float32
        assert kl_to_uniform(logits.bfloat16()).dtype == torch.float32


def test_codebook_statistics():
    uniform = codebook_statistics(torch.tensor([5, 5, 5, 5, 0]))
    assert uniform.perplexity == pytest.approx(4)
    assert (uniform.used, uniform.dead) == (4, 1)
    assert codebook_statistics(torch.tensor([0, 9])).perplexity == pytest.approx(1)
    assert codebook_statistics(torch.zeros(3, dtype=torch.long)).perplexity == 0
    assert count_codes(torch.tensor([[[0, 2], [2, 2]]]), 4).tolist() == [1, 0, 3, 0]


@pytest.fixture
def one_thread():
    """Many threads slow tiny operations down when other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_training_starts_without_collapse(one_thread):
    # From the initial weights, 60 steps on coloured squares lower the loss, and more than one code stays in use. With
    # codes of length 1 per dimension and a narrow head, one code soon takes everything.
    torch.manual_seed(0)
    model = DiscreteVAE(16, num_tokens=32, codebook_dim=8, num_layers=2, hidden_dim=8)
    relaxed = RelaxedAutoencoder(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        images = (torch.rand(16, 3, 2, 2) * 2 - 1).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        result = relaxed(images, temperature=0.5, kl_weight=0.1)
        error = reconstruction_loss(result.images, images)
        optimizer.zero_grad()
        (error + result.penalty).backward()
        optimizer.step()
        losses.append(error.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert codebook_statistics(count_codes(model(images).argmax(dim=1), 32)).perplexity > 3


# ----------------------------------------------------------------------------------------------- vector quantisation


def quantized(codes=12, **options) -> QuantizedAutoencoder:
    torch.manual_seed(0)
    return QuantizedAutoencoder(
        DiscreteVAE(16, num_tokens=codes, codebook_dim=6, num_layers=2, hidden_dim=8), **options
    )


def vectors_of(model, images):
    return model.projection(model.encoder(images)).permute(0, 2, 3, 1).flatten(0, 2)


def some_images(count=4):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_exported_tokens_are_the_nearest_codes():
    model, images = quantized(), some_images()
    model(images)
    model.eval()
    vae = model.tokenizer()
    ids = torch.cdist(vectors_of(model, images).double(), model.codes.double()).argmin(dim=1)
    assert len(ids.unique()) > 3
    assert torch.equal(vae(images).argmax(dim=1).flatten(), ids)
    result = model(images)
    torch.testing.assert_close(vae.decode(ids.view(4, 4, 4)), result.images)
    assert result.penalty.item() == pytest.approx(
        0.25 * (vectors_of(model, images) - model.codes[ids]).square().mean().item(), rel=1e-4
    )


def test_codes_follow_the_averages_of_their_vectors():
    # Beside a double loop; breaks if the codebook moved before the tokens of the same pass are chosen.
    model, images = quantized(decay=0.8), some_images()
    model(images)
    counts, sums = model.counts.double(), model.sums.double()
    for _ in range(3):
        vectors, before = vectors_of(model, images).double(), model.codes.clone()
        ids = torch.cdist(vectors, before.double()).argmin(dim=1)
        for code in range(12):
            counts[code] = 0.8 * counts[code] + 0.2 * (ids == code).sum()
            sums[code] = 0.8 * sums[code] + 0.2 * vectors[ids == code].sum(dim=0)
        model(images)
        torch.testing.assert_close(model.codes.double(), sums / counts[:, None], rtol=1e-4, atol=1e-5)
    model.eval()
    before = model.codes.clone()
    model(images)
    assert torch.equal(model.codes, before)


def test_the_gradient_passes_straight_through_and_not_into_the_codebook():
    model, images = quantized(commitment=0.0), some_images()
    model(images)
    passed = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: passed.append(inputs[0].retain_grad() or inputs[0]))
    encoded = []
    model.projection.register_forward_hook(lambda _, __, output: encoded.append(output.retain_grad() or output))
    result = model(images)
    (result.images.square().mean() + result.penalty).backward()
    assert torch.equal(passed[-1].grad, encoded[-1].grad)
    assert not model.codes.requires_grad
    assert all(parameter.grad is not None for parameter in model.parameters())  # data parallelism waits for all


def test_codes_of_no_use_come_back():
    model, images = quantized(), some_images(16)
    model(images)
    model.codes[:6], model.sums[:6], model.counts[:6] = 1e3, 0.0, 1e-9  # as far as can be
    model(images)
    assert (model.counts[:6] < model.DEAD * model.counts.mean()).all()
    model(images, revive=True)
    assert len(torch.cdist(vectors_of(model, images), model.codes).argmin(dim=1).unique()) > 6
    assert model.codes.abs().max() < 100


def test_before_it_quantises_it_is_an_autoencoder_and_no_tokenizer():
    model, images = quantized(), some_images()
    result = model(images, quantized=False)
    expected = model.decoder(model.projection(model.encoder(images)))
    torch.testing.assert_close(result.images, expected)
    assert result.penalty == 0
    assert not model.has_codes()
    model(images)
    assert model.has_codes()
    again = quantized()
    again.load_state_dict(model.state_dict())
    codes = again.codes.clone()
    again.eval()
    resumed = again(images, quantized=False)  # as in a longer rerun, whose schedule starts the codes later
    assert torch.equal(again.codes, codes)  # a codebook that a checkpoint has is not started anew
    torch.testing.assert_close(resumed.images, model.eval()(images).images)


def test_the_codebook_is_the_same_in_bf16():
    model, images = quantized().eval(), some_images()
    with torch.autocast("cpu", torch.bfloat16):
        result = model(images)
    assert result.penalty.dtype == model.codes.dtype == torch.float32
