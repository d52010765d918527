"""Encoder, decoder and pixel ranges against stored numbers and against OpenAI's package with the same weights."""

import pytest
import torch
import torch.nn.functional as F

from dall_e import Decoder, Encoder, load_model, map_pixels, unmap_pixels

ENCODER_SIZES = {"n_hid": 4, "n_blk_per_group": 2, "vocab_size": 12}
DECODER_SIZES = {"n_init": 6, "n_hid": 4, "n_blk_per_group": 2, "vocab_size": 12}


@pytest.fixture(scope="module")
def numbers(golden):
    folder = golden / "dalle_small"
    load = lambda name: torch.load(folder / name, weights_only=True)  # noqa: E731
    return load("input.pt"), load("expected.pt")


def test_encoder_gives_the_stored_ids_and_logits(golden, numbers):
    # Breaks with another kernel order, post_gain, pooling, or a missing ReLU before the head.
    inputs, expected = numbers
    logits = load_model(golden / "dalle_small" / "encoder.pkl")(inputs["input_mapped"])
    assert torch.allclose(logits[0], expected["encoder_logits_image0"], atol=1e-5)
    assert torch.allclose(logits.logsumexp(dim=1), expected["encoder_logsumexp"], atol=1e-5)
    assert torch.equal(logits.argmax(dim=1), expected["ids"])


@pytest.mark.parametrize("name", ["decoder.pkl", "decoder_legacy.pkl"])
def test_decoder_gives_the_stored_reconstruction(golden, numbers, name):
    # Breaks with bilinear upsampling, or when the 2021 file (its Upsample lacks an attribute) does not open.
    _, expected = numbers
    one_hot = F.one_hot(expected["decoder_ids"], 512).permute(0, 3, 1, 2).float()
    out = load_model(golden / "dalle_small" / name)(one_hot)
    assert torch.allclose(out[0], expected["decoder_out_image0"], atol=1e-5)
    images = unmap_pixels(out[:, :3].sigmoid())
    assert torch.allclose(images[0], expected["recon_unmap_sigmoid_image0"], atol=1e-5)


def test_pixel_ranges_equal_the_stored_ones(numbers):
    inputs, _ = numbers
    assert torch.allclose(map_pixels(inputs["image_u8"] / 255), inputs["input_mapped"], atol=1e-6)
    assert torch.allclose(unmap_pixels(inputs["unmap_in"]), inputs["unmap_out"], atol=1e-6)
    assert torch.allclose(map_pixels(inputs["unmap_in"]), inputs["map_out"], atol=1e-6)
    for function in (map_pixels, unmap_pixels):
        with pytest.raises(ValueError, match="float32"):
            function(torch.zeros(3, 4, 4))
        with pytest.raises(ValueError, match="float32"):
            function(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize(("kind", "sizes"), [("encoder", ENCODER_SIZES), ("decoder", DECODER_SIZES)])
def test_same_outputs_and_names_as_openai_with_the_weights_copied(openai_package, make_peer, kind, sizes):
    # Two blocks a group, which the stored files have not: breaks if n_layers or the inner widths are wrong there.
    model = (Encoder if kind == "encoder" else Decoder)(**sizes)
    channels = 3 if kind == "encoder" else 12
    x = torch.rand(2, channels, 16, 24)
    with openai_package() as package:
        peer = make_peer(package, kind, **sizes)
        expected = peer(x)
        assert list(peer.state_dict()) == list(model.state_dict())
        model.load_state_dict(peer.state_dict())
    assert expected.std() > 1e-3
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_published_sizes_are_the_defaults(openai_package):
    # Names and shapes of the released encoder.pkl and decoder.pkl, from the package that wrote them.
    with openai_package() as package, torch.device("meta"):
        device = torch.device("meta")
        peers = [package.Encoder(device=device), package.Decoder(device=device)]
        for peer, model in zip(peers, [Encoder(), Decoder()], strict=True):
            shapes = {name: tuple(value.shape) for name, value in peer.state_dict().items()}
            assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes


def test_features_and_head_are_the_two_halves_of_the_encoder():
    encoder = Encoder(**ENCODER_SIZES)
    x = torch.rand(1, 3, 16, 16)
    features = encoder.features(x)
    assert features.shape == (1, 32, 2, 2)
    assert features.min() >= 0
    assert torch.equal(encoder.head(features), encoder(x))


def test_everything_is_float32_on_a_cpu_even_inside_autocast():
    # Breaks if use_mixed_precision (set in the released files) or an autocast region reaches the convolutions.
    x, tokens = torch.rand(1, 3, 16, 16), torch.rand(1, 12, 2, 2)
    for kind, sizes, inputs in ((Encoder, ENCODER_SIZES, x), (Decoder, DECODER_SIZES, tokens)):
        model, plain = kind(**sizes), kind(**sizes, use_mixed_precision=False)
        assert model.use_mixed_precision
        plain.load_state_dict(model.state_dict())
        expected = plain(inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = model(inputs)
        assert inside.dtype == torch.float32
        assert torch.equal(model(inputs), expected)
        assert torch.equal(inside, expected)


def test_wrong_inputs_and_sizes_are_refused():
    encoder, decoder = Encoder(**ENCODER_SIZES), Decoder(**DECODER_SIZES)
    for bad in (torch.zeros(3, 16, 16), torch.zeros(1, 4, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.float64)):
        with pytest.raises(ValueError, match="encoder"):
            encoder(bad)
    with pytest.raises(ValueError, match="decoder"):
        decoder(torch.zeros(1, 11, 2, 2))
    with pytest.raises(ValueError, match="multiple of 4"):
        Encoder(n_hid=6)
