"""The two kinds of tokenizer behind one interface: stored ids, the mask's shortcut, frozenness, and every refusal."""

import importlib
import json
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import beit.storage
import beit.tokenizers.base
import beit.tokenizers.dalle
from beit.errors import InputError
from beit.registry import TOKENIZERS
from beit.tokenizers.base import VisualTokenizer, load_tokenizer
from beit.tokenizers.dalle import download_tokenizer
from beit.tokenizers.dvae import DiscreteVAE, load_dvae, save_dvae
from beit.zoo import create_model
from dall_e import load_model, map_pixels
from dall_e.utils import Conv2d


@pytest.fixture(scope="module")
def dvae_folder(golden, tmp_path_factory):
    """The stored customized dVAE with its config.json."""
    folder = tmp_path_factory.mktemp("dvae")
    shutil.copy(golden / "dvae_custom" / "pytorch_model.bin", folder)
    config = torch.load(golden / "dvae_custom" / "expected.pt", weights_only=True)["config"]
    (folder / "config.json").write_text(json.dumps({**config, "note": "unknown keys do no harm"}))
    return folder


@pytest.fixture(params=["dall-e", "customized"])
def tokenizer(request, golden, dvae_folder):
    return load_tokenizer(golden / "dalle_small" if request.param == "dall-e" else dvae_folder, request.param)


def test_another_package_in_the_place_of_ours_is_said_in_one_line(monkeypatch):
    # As after `pip install DALL-E`, OpenAI's package, whose files have the same names.
    monkeypatch.setitem(sys.modules, "dall_e", ModuleType("dall_e"))
    monkeypatch.delitem(sys.modules, "beit.tokenizers.dalle")
    with pytest.raises(InputError, match=r"the package dall_e is not the one .*`pip uninstall DALL-E`") as caught:
        importlib.import_module("beit.tokenizers.dalle")
    assert "\n" not in str(caught.value)


def test_dall_e_gives_the_stored_ids_and_reconstruction(golden):
    # Breaks if images enter without map_pixels, or leave without unmap_pixels.
    folder = golden / "dalle_small"
    inputs = torch.load(folder / "input.pt", weights_only=True)
    expected = torch.load(folder / "expected.pt", weights_only=True)
    tokenizer = load_tokenizer(folder, "dall-e", torch.device("cpu"))
    assert (tokenizer.vocab_size, tokenizer.downsampling) == (512, 8)
    ids = tokenizer.encode(inputs["image_u8"] / 255)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected["ids"])
    images = tokenizer.decode(expected["decoder_ids"])
    assert torch.allclose(images[0], expected["recon_unmap_sigmoid_image0"], atol=1e-5)


def test_customized_gives_the_stored_ids_and_image(golden, dvae_folder):
    # Breaks if images are not scaled to mean and standard deviation 0.5 on the way in, or not scaled back.
    expected = torch.load(golden / "dvae_custom" / "expected.pt", weights_only=True)
    tokenizer = load_tokenizer(dvae_folder, "customized")
    assert torch.equal(tokenizer.encode(expected["input"] * 0.5 + 0.5), expected["ids"])
    images = tokenizer.decode(expected["decode_input"].reshape(expected["ids"].shape))
    assert torch.allclose(images, (expected["decoded"] * 0.5 + 0.5).clamp(0, 1), atol=1e-5)


def test_masked_encoding_equals_the_full_one(tokenizer):
    # For non-square images, masks of both shapes, an index, nothing and everything; breaks when the features are
    # flattened in another order than the mask.
    images = torch.rand(3, 3, 32, 48)
    full = tokenizer.encode(images)
    assert full.shape == (3, 4, 6)
    logits_argmax = {
        "DallETokenizer": lambda: tokenizer.encoder(images * 0.8 + 0.1).argmax(dim=1),
        "CustomizedTokenizer": lambda: tokenizer.model(images * 2 - 1).argmax(dim=1),
    }[type(tokenizer).__name__]()
    assert torch.equal(full, logits_argmax)  # the naive way: all logits
    for share in (0.0, 0.4, 1.0):
        mask = torch.rand(3, 4, 6) < share
        expected = full[mask]
        assert torch.equal(tokenizer.encode(images, mask), expected)
        assert torch.equal(tokenizer.encode(images, mask.flatten(1)), expected)
        assert torch.equal(tokenizer.encode(images, index=mask.flatten().nonzero().squeeze(1)), expected)


def test_the_last_convolution_runs_at_masked_places_only(tokenizer, monkeypatch):
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(beit.tokenizers.base.F, "linear", lambda x, *rest: seen.append(len(x)) or linear(x, *rest))
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 3, 0] = True
    tokenizer.encode(torch.rand(2, 3, 32, 32), mask)
    assert sum(seen) == 2


def test_logits_in_pieces_give_the_same_ids(tokenizer, monkeypatch):
    images = torch.rand(2, 3, 32, 32)
    full = tokenizer.encode(images)
    monkeypatch.setattr(beit.tokenizers.base, "LOGITS_AT_ONCE", 3 * tokenizer.vocab_size)
    assert torch.equal(tokenizer.encode(images), full)


def test_it_stays_frozen_whatever_is_called(tokenizer):
    # Breaks if .train() of the parent reaches it, or encode and decode build a graph.
    parent = nn.Sequential(tokenizer, nn.Linear(2, 2))
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    tokenizer.decode(tokenizer.encode(images))  # the decoder is there from here on
    parent.train()
    tokenizer.train(True)
    assert parent.training
    assert not any(module.training for module in tokenizer.modules())
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert not tokenizer.decode(tokenizer.encode(images)).requires_grad


def test_autocast_changes_nothing(tokenizer):
    # Breaks if the region reaches the convolutions: the decoded images differ in bfloat16.
    images = torch.rand(4, 3, 64, 64)
    expected = tokenizer.encode(images)
    reconstruction = tokenizer.decode(expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), expected)
        assert torch.equal(tokenizer.decode(expected), reconstruction)
    assert torch.equal(tokenizer.encode(images.double()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["dall-e", "customized"])
def test_half_precision_gives_nearly_the_same_ids(kind, dtype, golden, dvae_folder, monkeypatch):
    # The stored networks are untrained: their likeliest tokens are closer to each other than those of a trained one.
    # Breaks if the logits or the decoder are rounded too, or the format asked for is not computed in.
    folder = golden / "dalle_small" if kind == "dall-e" else dvae_folder
    plain, half = load_tokenizer(folder, kind), load_tokenizer(folder, kind, dtype=dtype)
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = plain.encode(images)
    heads, trunk = set(), set()
    linear = torch.nn.functional.linear
    monkeypatch.setattr(beit.tokenizers.base.F, "linear", lambda x, *rest: heads.add(x.dtype) or linear(x, *rest))
    for module in half.modules():
        if isinstance(module, nn.Conv2d | Conv2d):
            module.register_forward_hook(lambda _module, _inputs, output: trunk.add(output.dtype))
    ids = half.encode(images)
    assert heads == {torch.float32}
    assert dtype in trunk
    assert (ids == expected).float().mean() >= 0.95
    places = (torch.rand(8, 8, 8) < 0.4).flatten().nonzero().squeeze(1)
    assert torch.equal(half.encode(images, index=places), ids.flatten()[places])
    assert torch.equal(half.decode(expected), plain.decode(expected))


def test_bfloat16_spares_the_shortcuts(golden):
    # They carry the sum over all blocks: with them in 8 bits, one in a hundred ids of the full encoder differed.
    encoder = load_tokenizer(golden / "dalle_small", dtype=torch.bfloat16).encoder
    formats = {name: parameter.dtype for name, parameter in encoder.named_parameters()}
    assert {name for name, dtype in formats.items() if dtype == torch.bfloat16} == {
        n for n in formats if "res_path" in n
    }
    encoder = load_tokenizer(golden / "dalle_small", dtype=torch.float16).encoder
    formats = {name: parameter.dtype for name, parameter in encoder.named_parameters()}
    assert {n for n, dtype in formats.items() if dtype == torch.float32} == {n for n in formats if "output.conv" in n}


@torch.no_grad()
def test_only_the_frozen_encoder_overwrites_what_enters_a_block(golden):
    # Breaks if sums in place reach the images or change an id, or a block of the plain module keeps its input no more.
    plain, images = load_model(golden / "dalle_small" / "encoder.pkl"), torch.rand(2, 3, 32, 32)
    before = images.clone()
    frozen = load_tokenizer(golden / "dalle_small")
    assert torch.equal(frozen.encode(images), plain(map_pixels(images)).argmax(dim=1))
    assert torch.equal(images, before)
    for encoder, kept in ((plain, True), (frozen.encoder, False)):
        block = encoder.blocks.group_1.block_1
        x = torch.randn(1, encoder.n_hid, 8, 8)
        assert torch.equal(block(x.clone()), block.id_path(x) + block.post_gain * block.res_path(x))
        before = x.clone()
        block(x)
        assert torch.equal(x, before) == kept


def test_decoded_images_are_in_range(tokenizer):
    images = tokenizer.decode(torch.randint(0, tokenizer.vocab_size, (2, 3, 5)))
    assert images.shape == (2, 3, 24, 40)
    assert images.min() >= 0
    assert images.max() <= 1
    for odd in (-1, tokenizer.vocab_size):
        with pytest.raises(InputError, match=f"ids from 0 to {tokenizer.vocab_size - 1}, not"):
            tokenizer.decode(torch.full((1, 2, 2), odd))


@pytest.mark.gpu
def test_on_a_gpu(golden):
    folder = golden / "dalle_small"
    images = torch.load(folder / "input.pt", weights_only=True)["image_u8"].cuda() / 255
    expected = torch.load(folder / "expected.pt", weights_only=True)["ids"].cuda()
    tokenizer = load_tokenizer(folder, "dall-e", "cuda")
    assert (tokenizer.encode(images) == expected).float().mean() > 0.97  # TF32 rounds as float16 does
    assert tokenizer.decode(expected).is_cuda
    for dtype in (torch.float16, torch.bfloat16):
        half = load_tokenizer(folder, "dall-e", "cuda", dtype)
        assert (half.encode(images) == expected).float().mean() > 0.9


def test_grids_are_checked_with_the_size_that_would_match(tokenizer):
    assert tokenizer.grid_size((112, 64)) == (14, 8)
    tokenizer.check_grid((112, 112), (14, 14))
    with pytest.raises(InputError, match=r"multiples of 8 pixels, not 100×112; the nearest are 96×112$"):
        tokenizer.grid_size((100, 112))
    with pytest.raises(InputError, match=r"112×112 pixels, 8 per token, .*16×16: set second_input_size to 128$"):
        tokenizer.check_grid((112, 112), (16, 16))
    with pytest.raises(InputError, match=r"second_input_size to 112x128$"):
        tokenizer.check_grid((112, 112), (14, 16))
    with pytest.raises(InputError, match=r"100×112 pixels.*to 112$"):
        tokenizer.check_grid((100, 112), (14, 14))


def test_wrong_images_masks_and_ids_are_refused(tokenizer):
    images = torch.rand(2, 3, 16, 16)
    for bad in (images[0], images[:, :1], (images * 255).byte()):
        with pytest.raises(InputError, match="float images"):
            tokenizer.encode(bad)
    with pytest.raises(InputError, match="multiples of 8"):
        tokenizer.encode(torch.rand(1, 3, 17, 16))
    for bad in (torch.ones(2, 2, 2), torch.ones(2, 3, 2, dtype=torch.bool), torch.ones(1, 2, 2, dtype=torch.bool)):
        with pytest.raises(InputError, match="mask"):
            tokenizer.encode(images, bad)
    for bad in (torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2)):
        with pytest.raises(InputError, match="index must be int64"):
            tokenizer.encode(images, index=bad)
    with pytest.raises(InputError, match="ids"):
        tokenizer.decode(torch.zeros(2, 4, dtype=torch.long))


class NearestColour(VisualTokenizer):
    """A tokenizer of another sort: the nearest of four greys to a cell's mean, and no decoder."""

    def __init__(self):
        super().__init__(vocab_size=4, downsampling=8)
        self.register_buffer("codes", torch.linspace(0, 1, 4)[:, None].repeat(1, 3))

    def features(self, images):
        return nn.functional.avg_pool2d(images, 8)

    def quantise(self, features):
        return torch.cdist(features, self.codes).argmin(dim=1)


def test_a_nearest_code_tokenizer_needs_two_methods(monkeypatch, tmp_path):
    # Breaks when the interface assumes logits again.
    monkeypatch.setitem(TOKENIZERS, "nearest", lambda _path, _dtype, _compiled: NearestColour())
    tokenizer = load_tokenizer(tmp_path, "nearest")
    images = torch.tensor([0.0, 0.3, 0.9]).view(3, 1, 1, 1).expand(3, 3, 16, 8)
    ids = tokenizer.encode(images)
    assert ids.tolist() == [[[0], [0]], [[1], [1]], [[3], [3]]]
    mask = torch.tensor([[0, 1], [0, 0], [1, 1]], dtype=torch.bool)
    assert tokenizer.encode(images, mask).tolist() == [0, 3, 3]
    assert tokenizer.encode(images, index=torch.tensor([3, 0, 3])).tolist() == [1, 0, 1]
    with pytest.raises(InputError, match="NearestColour has no decoder"):
        tokenizer.decode(ids)


def test_kinds_and_paths_that_cannot_work_are_named(golden, dvae_folder, tmp_path):
    (tmp_path / "dall_e_tokenizer_weight").mkdir()
    with pytest.raises(InputError, match=r"'dalle' \(did you mean 'dall-e'\?\)"):
        load_tokenizer(tmp_path, "dalle")
    with pytest.raises(InputError, match="did you mean 'dall_e_tokenizer_weight'"):
        load_tokenizer(tmp_path / "dall_e_tokenizer_weights", "dall-e")
    with pytest.raises(InputError, match="beit download tokenizer"):
        load_tokenizer("https://cdn.openai.com/dall-e/encoder.pkl", "dall-e")
    with pytest.raises(InputError, match=r"neither encoder.pkl nor .*found: dall_e_tokenizer_weight\)"):
        load_tokenizer(tmp_path, "dall-e")
    with pytest.raises(InputError, match="give --discrete_vae_type customized"):
        load_tokenizer(dvae_folder, "dall-e")
    with pytest.raises(InputError, match=r"no pytorch_model.bin.*\(found: decoder.pkl"):
        load_tokenizer(golden / "dalle_small", "customized")
    with pytest.raises(InputError, match="set the kind to dall-e"):
        load_tokenizer(golden / "dalle_small" / "encoder.pkl", "customized")
    with pytest.raises(InputError, match="holds the decoder, not the encoder"):
        load_tokenizer(golden / "dalle_small" / "decoder.pkl", "dall-e")
    with pytest.raises(InputError, match="neither an encoder nor a decoder"):
        load_tokenizer(dvae_folder / "pytorch_model.bin", "dall-e")
    with pytest.raises(InputError, match=r"no tokenizer at .*; released ones go by name: vqkd_encoder_base_"):
        load_tokenizer(tmp_path / "gone.pth", "vqkd")


@pytest.mark.parametrize("kind", ["dall-e", "customized", "vqkd"])
def test_a_backbone_that_is_given_as_a_tokenizer_is_recognised(kind, tmp_path):
    model = create_model("beit_tiny_patch16_224_8k_vocab", depth=1, embed_dim=16, num_heads=2, vocab_size=8)
    torch.save({"model": model.state_dict()}, tmp_path / "checkpoint-1.pth")
    with pytest.raises(InputError, match=r"checkpoint-1.pth is no tokenizer but a pre-trained BEiT with 1 block, 16 c"):
        load_tokenizer(tmp_path / "checkpoint-1.pth", kind)


def test_a_file_that_is_something_else_is_named(tmp_path):
    for name, kind in (("encoder.pkl", "dall-e"), ("pytorch_model.bin", "customized")):
        (tmp_path / name).write_bytes(b"--2022-03-29 10:11:12--  https://cdn.openai.com/dall-e/encoder.pkl\n")
        with pytest.raises(InputError, match="log of wget"):
            load_tokenizer(tmp_path, kind)


def test_the_decoder_is_needed_only_to_decode(golden, tmp_path):
    shutil.copy(golden / "dalle_small" / "encoder.pkl", tmp_path)
    tokenizer = load_tokenizer(tmp_path, "dall-e")
    ids = tokenizer.encode(torch.rand(1, 3, 16, 16))
    with pytest.raises(InputError, match=r"neither decoder.pkl nor decoder.safetensors \(found: encoder.pkl\)"):
        tokenizer.decode(ids)


def test_dall_e_opens_from_safetensors_too(golden, tmp_path):
    folder = golden / "dalle_small"
    for name in ("encoder", "decoder"):
        save_file(load_model(folder / f"{name}.pkl").state_dict(), tmp_path / f"{name}.safetensors")
    images = torch.rand(2, 3, 32, 32)
    one, other = load_tokenizer(folder, "dall-e"), load_tokenizer(tmp_path, "dall-e")
    ids = one.encode(images)
    assert torch.equal(other.encode(images), ids)
    assert torch.equal(other.decode(ids), one.decode(ids))


def test_dvae_round_trip(tmp_path):
    # Breaks if a size is left out of config.json, or one is swapped.
    torch.manual_seed(0)
    model = DiscreteVAE((16, 32), num_tokens=20, codebook_dim=6, num_layers=2, hidden_dim=8)
    save_dvae(tmp_path / "new", model)
    copy = load_dvae(tmp_path / "new")
    assert copy.sizes() == model.sizes()
    assert all(parameter.requires_grad for parameter in copy.parameters())
    tokenizer = load_tokenizer(tmp_path / "new" / "pytorch_model.bin", "customized")
    assert (tokenizer.vocab_size, tokenizer.downsampling) == (20, 4)
    images = torch.rand(1, 3, 16, 32)
    assert torch.equal(tokenizer.encode(images), model(images * 2 - 1).argmax(dim=1))


def test_dvae_sizes_come_from_the_config_or_are_the_official_ones(dvae_folder, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    shutil.copy(dvae_folder / "pytorch_model.bin", path)
    with pytest.raises(InputError, match=r"official sizes .*codebook.weight \(64, 16\) in the file, \(8192, 512\) in"):
        load_dvae(tmp_path)
    (tmp_path / "config.json").write_text('{"num_tokens": "many"}')
    with pytest.raises(InputError, match=r"config\.json does not describe"):
        load_dvae(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not a JSON object"):
        load_dvae(tmp_path)
    torch.save({"weights": {"head.weight": torch.zeros(1)}}, path)
    with pytest.raises(InputError, match=r"no codebook\.weight"):
        load_dvae(tmp_path)
    with pytest.raises(InputError, match="no file"):
        load_dvae(tmp_path / "pytorch_modell.bin")


@pytest.fixture
def server(golden, monkeypatch):
    """The small stored files, served from this machine; yields the address and the list of requests."""
    monkeypatch.setattr(beit.storage, "BACKOFF_SECONDS", 0.01)
    requests = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    handler = partial(Quiet, directory=str(golden / "dalle_small"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}", requests
        http.shutdown()


def test_download_fetches_once_records_the_hash_and_checks_it(server, tmp_path):
    url, requests = server
    folder = tmp_path / "tokenizer"
    download_tokenizer(folder, url)
    assert {file.name for file in folder.iterdir()} == {
        "encoder.pkl",
        "encoder.pkl.sha256",
        "decoder.pkl",
        "decoder.pkl.sha256",
    }
    count = len(requests)
    download_tokenizer(folder, url + "/")
    assert len(requests) == count  # nothing is fetched again
    assert load_tokenizer(folder, "dall-e").vocab_size == 512
    with open(folder / "encoder.pkl", "ab") as file:
        file.write(b"\0")
    for use in (lambda: download_tokenizer(folder, url), lambda: load_tokenizer(folder, "dall-e")):
        with pytest.raises(InputError, match=r"sha256 .* delete encoder\.pkl"):
            use()


def test_download_refuses_files_of_other_sizes_than_the_published(server, tmp_path, monkeypatch):
    # The stored files are small: at the default address they are not what was published, and nothing is kept.
    url, _ = server
    monkeypatch.setattr(beit.tokenizers.dalle, "OPENAI_URL", url)
    with pytest.raises(InputError, match="sizes of the published encoder"):
        download_tokenizer(tmp_path, url)
    assert list(tmp_path.iterdir()) == []


def test_download_refuses_what_is_not_an_encoder(tmp_path, monkeypatch, server, golden):
    url, _ = server
    monkeypatch.setattr(beit.tokenizers.dalle, "Encoder", beit.tokenizers.dalle.Decoder)
    with pytest.raises(InputError, match="holds the encoder, not the decoder"):
        download_tokenizer(tmp_path, url)
    assert not (tmp_path / "encoder.pkl").exists()


@pytest.mark.parametrize("kind", ["dall-e", "customized"])
def test_a_fingerprint_is_of_the_weights_in_the_file(kind, golden, dvae_folder, tmp_path):
    # Whatever they are computed in, and whether or not the decoder has been loaded.
    folder = golden / "dalle_small" if kind == "dall-e" else dvae_folder
    tokenizer = load_tokenizer(folder, kind)
    before = tokenizer.fingerprint()
    tokenizer.decode(torch.zeros(1, 8, 8, dtype=torch.int64))
    assert tokenizer.fingerprint() == before
    for dtype in (torch.float16, torch.bfloat16):
        assert load_tokenizer(folder, kind, dtype=dtype).fingerprint() == before
    model = load_model(folder / "encoder.pkl") if kind == "dall-e" else load_dvae(folder)
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1e-3
    if kind == "dall-e":
        save_file(
            {name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "encoder.safetensors"
        )
    else:
        save_dvae(tmp_path, model)
    assert load_tokenizer(tmp_path, kind).fingerprint() != before
