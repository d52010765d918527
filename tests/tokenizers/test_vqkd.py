"""VQ-KD beside stored numbers of the official code, its codebook's properties, and its files."""

import json
import logging
import multiprocessing
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange

import beit
from beit.errors import InputError
from beit.storage import sha256_of
from beit.tokenizers import codebook, vqkd
from beit.tokenizers.dvae import DiscreteVAE, save_dvae
from beit.tokenizers.vqkd import MODELS, VQKD, Quantizer, VqkdTokenizer, load_vqkd

SMALL = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 4}
MMPRETRAIN = {
    "blocks": "layers", ".fc_norm": ".ln1", "norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0",
    "mlp.fc2": "ffn.layers.1", "patch_embed.proj": "patch_embed.projection",
}  # fmt: skip
SIZES = {"codebook_size": 32, "codebook_dim": 8, "decoder_depth": 1, "decoder_out_dim": 24}


@pytest.fixture(scope="module")
def stored(golden):
    return torch.load(golden / "v2" / "vqkd_small.pt", weights_only=True)


@pytest.fixture(scope="module")
def facts(golden):
    return json.loads((golden / "v2" / "vqkd_training.json").read_text())


def official(stored, dtype=torch.float32):
    """The stored model; its state dict is exactly the official one, but for what official loaders leave out."""
    model = VQKD(**SMALL, **SIZES)
    assert {name for name in model.state_dict() if not name.startswith(vqkd.NO_PART)} == stored["state_dict"].keys()
    model.load_state_dict({**stored["state_dict"], "loss_idle": model.loss_idle}, strict=True)
    return model.to(dtype)


def losses(model, images, target):
    features, quantized = model(images)
    return 1 - F.cosine_similarity(features, target, dim=-1).mean(), quantized


def update(model, quantized, **options):
    model.update(quantized.vectors.flatten(0, 1), quantized.ids.flatten(), **options)


@pytest.fixture
def path(stored, tmp_path):
    torch.save({"model": stored["state_dict"]}, tmp_path / "vqkd.pth")
    return tmp_path / "vqkd.pth"


@pytest.mark.parametrize(("dtype", "suffix", "close"), [(torch.float32, "", 1e-5), (torch.float64, "64", 1e-9)])
def test_outputs_losses_and_gradients_of_the_official_code(stored, dtype, suffix, close):
    # Breaks with another eps, no q_bias, a decoder without its class token, or a gradient that the codes stop.
    model = official(stored, dtype)
    images, target = stored["input"].to(dtype), stored["target"].to(dtype)
    rec, quantized = losses(model, images, target)
    assert torch.equal(quantized.ids, stored["ids"])
    for name, value in {"rec_loss": rec, "commitment_loss": quantized.commitment}.items():
        assert value.item() == pytest.approx(stored[name + suffix].item(), abs=close)
    if suffix:
        torch.testing.assert_close(model.encode(images), stored["z64"], atol=close, rtol=close)
        torch.testing.assert_close(model(images)[0], stored["decoder_output64"], atol=close, rtol=close)
    codes = rearrange(quantized.codes, "b (h w) d -> b d h w", h=4)
    torch.testing.assert_close(codes.float(), stored["z_q"], atol=1e-5, rtol=1e-5)
    (rec + quantized.commitment).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert list(gradients) == stored["param_order"]
    for name, gradient in gradients.items():
        assert gradient.norm().item() == pytest.approx(stored["grad_norms64"][name], rel=10 * close), name
        difference = (gradient.float() - stored["grads"][name]).norm() / stored["grads"][name].norm()
        assert difference < 1e-5, name


def test_the_codebook_after_updates_of_the_official_code(stored, golden):
    # Breaks with the mean of vectors that are not of length 1, or codes chosen after the update.
    ema = torch.load(golden / "v2" / "vqkd_ema.pt", weights_only=True)
    model, model64 = official(stored), official(stored, torch.float64)
    images = ema["ema_images"]["images_uint8"]
    for batch, step in zip(images, ema["ema_images"]["steps"], strict=True):
        for module, suffix, close in ((model, "", 2e-6), (model64, "64", 2e-7)):  # rounding moves official codes
            quantized = module(batch.to(module.encoder.cls_token.dtype) / 255)[1]
            assert torch.equal(quantized.ids, step["ids"])
            update(module, quantized)
            weight, counts = module.quantize.embedding.weight, module.quantize.cluster_size
            torch.testing.assert_close(weight, step[f"weight{suffix}"], atol=close, rtol=close)
            torch.testing.assert_close(counts, step[f"cluster_size{suffix}"], atol=1e-6, rtol=1e-6)
    never = ema["ema_images"]["never_used_codes"]
    assert torch.equal(model.quantize.embedding.weight[never], stored["state_dict"]["quantize.embedding.weight"][never])
    assert model.loss_idle[never].eq(3).all()
    norms = model.quantize.embedding.weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_six_optimizer_steps_of_the_official_code(stored, golden):
    run = torch.load(golden / "v2" / "vqkd_ema.pt", weights_only=True)
    images, run = run["ema_images"]["images_uint8"], run["train64"]
    model = official(stored, torch.float64)
    free = model.no_weight_decay()
    decayed = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decayed[parameter.ndim > 1 and name not in free].append(parameter)
    groups = [{"params": group, "weight_decay": run["weight_decay"] * on} for on, group in decayed.items()]
    optimizer = torch.optim.AdamW(groups, betas=run["betas"], eps=run["eps"])
    for number, step in enumerate(run["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = step["lr"]
        rec, quantized = losses(model, images[number % 3].double() / 255, run["targets"][number % 3].double())
        assert rec.item() == pytest.approx(step["rec_loss"], abs=1e-7)
        assert quantized.commitment.item() == pytest.approx(step["commitment_loss"], abs=1e-7)
        assert torch.equal(quantized.ids, step["ids"])
        optimizer.zero_grad()
        (rec + quantized.commitment).backward()
        update(model, quantized)
        optimizer.step()
    for name, value in run["params_after"].items():
        torch.testing.assert_close(model.get_parameter(name).data, value, atol=1e-6, rtol=1e-6)


def test_kmeans_of_the_official_code(golden):
    cases = torch.load(golden / "v2" / "kmeans_init.pt", weights_only=True)["cases"]
    for name, case in cases.items():
        for iterations in (1, 10):
            means, bins = codebook.kmeans(case["samples"], case["initial_means"], iterations, cosine=True)
            if name == "fewer_vectors_than_codes":  # equal means compete: rounding decides which one wins
                best = (case["samples"] @ means.T).amax(dim=1).sum()
                expected = (case["samples"] @ case["means_after"][iterations - 1].T).amax(dim=1).sum()
                assert best.item() == pytest.approx(expected.item(), rel=1e-5)
                continue
            torch.testing.assert_close(means, case["means_after"][iterations - 1], atol=1e-6, rtol=1e-5)
            assert torch.equal(bins.long(), case["bins_after"][iterations - 1])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_first_forward_takes_the_codes_from_its_vectors(golden, mode, monkeypatch):
    first = torch.load(golden / "v2" / "kmeans_init.pt", weights_only=True)["first_forward"]
    monkeypatch.setattr(vqkd, "draw", lambda vectors, number: vectors[first["initial_rows"]])
    quantizer = Quantizer(first["n_embed"], 4, kmeans_start=True).train(mode == "train")
    quantized = quantizer(first["z"].flatten(2).mT)
    assert torch.equal(quantized.ids, first[mode]["ids"])
    assert quantized.commitment.item() == pytest.approx(first[mode]["commitment_loss"].item(), abs=1e-6)
    if mode == "train":
        quantizer.update(quantized.vectors.flatten(0, 1), quantized.ids.flatten())
    for name, value in quantizer.state_dict().items():
        if name != "cluster_size" or mode == "train":
            torch.testing.assert_close(value, first[mode]["state_dict"][name], atol=1e-6, rtol=1e-5, msg=name)
    before = quantizer.embedding.weight.clone()
    quantizer(torch.randn(2, 3, 4))
    assert torch.equal(quantizer.embedding.weight, before)  # once


def test_autocast_does_not_reach_the_codes_and_no_gradient_does():
    torch.manual_seed(0)
    quantizer, z = Quantizer(50, 6), torch.randn(4, 30, 6, requires_grad=True)
    expected = quantizer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized = quantizer(z)
    assert torch.equal(quantized.ids, expected.ids)
    assert quantized.codes.dtype == quantized.commitment.dtype == torch.float32
    assert not list(quantizer.parameters())
    (gradient,) = torch.autograd.grad(quantized.codes.sum(), z)
    (identity,) = torch.autograd.grad(F.normalize(z, dim=-1).sum(), z)
    torch.testing.assert_close(gradient, identity)


def two_updates(vectors_of_both, rank=0, world_size=1):
    """Two steps of a codebook that begins with k-means, on this process's share of each batch."""
    torch.manual_seed(rank)  # what a process draws by itself is its own
    quantizer = Quantizer(12, 5, kmeans_start=True)
    for vectors in vectors_of_both:
        quantized = quantizer(vectors.chunk(world_size)[rank])
        quantizer.update(quantized.vectors.flatten(0, 1), quantized.ids.flatten())
    return quantizer.state_dict()


def one_of_two(rank, vectors, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(two_updates(vectors, rank, 2), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_codebook_of_one_with_the_joined_batch(tmp_path):
    # Breaks with k-means or updates on a process's own vectors, or start vectors that each draws for itself.
    vectors = torch.randn(2, 6, 8, 5, generator=torch.Generator().manual_seed(1))
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=one_of_two, args=(rank, vectors, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    alone = two_updates(vectors)
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(value, alone[name], atol=1e-6, rtol=1e-6, msg=name)


def test_codes_that_nobody_chooses_are_revived_after_so_many_steps():
    torch.manual_seed(0)
    model = VQKD(**SMALL, **SIZES)
    images = torch.rand(2, 3, 64, 64)
    for _ in range(3):
        quantized = model(images)[1]
        update(model, quantized, revive_after=3)
    idle, vectors = model.loss_idle, quantized.vectors.flatten(0, 1)
    revived = (model.quantize.cluster_size == 0) & (idle == 0)
    assert revived.sum() == 32 - quantized.ids.unique().numel() > 0
    weight = model.quantize.embedding.weight
    assert all((vectors == code).all(dim=1).any() for code in weight[revived])
    assert model(images)[1].ids.unique().numel() > quantized.ids.unique().numel()


# Files and the tokenizer


def test_codes_are_drawn_by_the_decoder_beside_the_file(stored, path, tmp_path):
    tokenizer = beit.load_tokenizer(path, num_heads=4)
    vae = DiscreteVAE(64, 32, 8, num_layers=4, hidden_dim=8)
    save_dvae(tmp_path / "vqkd-pixels", vae)
    ids = stored["ids"].view(2, 4, 4)
    with pytest.raises(InputError, match="draws the codes of another tokenizer"):
        tokenizer.decode(ids)
    vae.codebook.weight.data.copy_(tokenizer.model.quantize.codes)
    save_dvae(tmp_path / "vqkd-pixels", vae)
    before = tokenizer.fingerprint()
    tokenizer = beit.load_tokenizer(path, num_heads=4)
    torch.testing.assert_close(tokenizer.decode(ids), (vae.decode(ids) / 2 + 0.5).clamp(0, 1))
    assert tokenizer.fingerprint() == before


@pytest.mark.parametrize("case", range(4))
def test_tokens_of_images_of_other_sizes(stored, golden, path, case):
    # Breaks with positions resized by size instead of the official factor, or where the number of patches is the same.
    case = torch.load(golden / "v2" / "vqkd_tokens.pt", weights_only=True)["cases"][case]
    tokenizer = beit.load_tokenizer(path, num_heads=4)
    images = case["input_uint8"] / 255
    ids = tokenizer.encode(images)
    assert ids.shape == (1, *case["grid"])
    assert torch.equal(ids.flatten(1), case["ids"])
    mask = torch.arange(ids.numel()).view_as(ids) % 3 == 0
    assert torch.equal(tokenizer.encode(images, mask), ids[mask])
    z = tokenizer.features(images).flatten(2).mT
    torch.testing.assert_close(z.double(), case["z64"], atol=1e-5, rtol=1e-5)


def test_the_tokenizer_is_frozen_and_stays_as_it_is(stored, path, tmp_path):
    tokenizer = beit.load_tokenizer(path, "vqkd", num_heads=4)
    assert isinstance(tokenizer, VqkdTokenizer)
    assert (tokenizer.vocab_size, tokenizer.downsampling) == (32, 16)
    before = tokenizer.fingerprint()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.train().encode(stored["input"]).flatten(1), stored["ids"])
    assert tokenizer.fingerprint() == before
    more = {**stored["state_dict"], "loss_idle": torch.ones(32, dtype=torch.int64)}  # of a run: the same tokens
    torch.save({"model": {**more, "quantize.cluster_size": torch.ones(32)}}, tmp_path / "run.pth")
    assert beit.load_tokenizer(tmp_path / "run.pth", num_heads=4).fingerprint() == before
    torch.save({"model": {**more, "encode_task_layer.0.bias": torch.ones(48)}}, tmp_path / "other.pth")
    assert beit.load_tokenizer(tmp_path / "other.pth", num_heads=4).fingerprint() != before
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    half = beit.load_tokenizer(path, dtype=torch.bfloat16, num_heads=4).encode(stored["input"])
    assert (half.flatten(1) == stored["ids"]).float().mean() > 0.8
    with pytest.raises(InputError, match=r"--pixels_of` makes .*/vqkd-pixels"):
        tokenizer.decode(stored["ids"].view(2, 4, 4))


def test_full_size_models_have_the_official_names_shapes_and_numbers(facts):
    with torch.device("meta"):
        models = {
            name: VQKD(decoder_depth=depth, decoder_out_dim=768 if name.endswith("dino") else 512)
            for name, (depth, _) in MODELS.items()
        }
    for name, model in models.items():
        assert sum(parameter.numel() for parameter in model.parameters()) == facts["learnable"][name]
    state = models["vqkd_encoder_base_decoder_3x768x12_clip"].state_dict()
    del state["loss_idle"]
    assert {name: list(tensor.shape) for name, tensor in state.items()} == facts["shapes"]


def test_initial_weights_are_spread_like_the_official_ones(facts):
    torch.manual_seed(0)
    sizes = {"img_size": 64, "embed_dim": 192, "depth": 4, "num_heads": 3}
    model = VQKD(**sizes, codebook_size=512)
    for name, tensor in model.state_dict().items():
        if name in facts["init"]:
            mean, std = facts["init"][name][:2]
            assert tensor.mean().item() == pytest.approx(mean, abs=0.01), name
            assert tensor.float().std(unbiased=False).item() == pytest.approx(std, rel=0.1, abs=1e-3), name


def test_the_number_of_heads_is_recorded_given_or_guessed_with_a_warning(stored, path, caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        assert load_vqkd(path).encoder.num_heads == 1
    assert "1 attention head of 48 channels (num_heads= settles it)" in caplog.text
    caplog.clear()
    torch.save({"model": stored["state_dict"], "num_heads": 4}, tmp_path / "own.pth")
    torch.save({"model": stored["state_dict"], "args": {"model_kwargs": {"num_heads": 4}}}, tmp_path / "args.pth")
    for name in ("own.pth", "args.pth"):
        assert load_vqkd(tmp_path / name).encoder.num_heads == 4
    assert not caplog.text


def test_files_with_a_teacher_and_those_of_mmpretrain(stored, path, tmp_path):
    weights = stored["state_dict"]
    teacher = {"teacher_model.proj": torch.zeros(3), "scaling_layer.shift": torch.zeros(3), "loss_fn.w": torch.ones(1)}
    torch.save({"state_dict": {**weights, **teacher}}, tmp_path / "whole.pth")
    theirs = {}
    for name, value in weights.items():
        for ours, mmpretrain in MMPRETRAIN.items():
            name = name.replace(ours, mmpretrain) if name.startswith("encoder.") else name
        theirs |= {name: value} if name.startswith(("encoder.", "quantize.", "encode_task_layer.")) else {}
    assert {"encoder.layers.1.ln2.weight", "encoder.ln1.bias"} <= theirs.keys()
    torch.save({"state_dict": theirs}, tmp_path / "mm.pth")
    for name in ("whole.pth", "mm.pth"):
        assert torch.equal(
            beit.load_tokenizer(tmp_path / name, num_heads=4).encode(stored["input"]).flatten(1), stored["ids"]
        )


def test_released_names_are_downloaded_and_their_digits_compared(stored, path, tmp_path, monkeypatch):
    name = "vqkd_encoder_base_decoder_1x768x12_clip"
    monkeypatch.setenv("BEIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for digits in (sha256_of(path)[:8], "00000000"):
            shutil.copy(path, tmp_path / f"{name}-{digits}.pth")
            url = f"http://127.0.0.1:{server.server_address[1]}/{name}-{digits}.pth"
            monkeypatch.setitem(vqkd.DOWNLOADS, name, url)
            if digits == "00000000":
                (tmp_path / "home" / "tokenizers" / f"{name}.pth").unlink()
                with pytest.raises(InputError, match="its sha256 does not begin with 00000000"):
                    beit.load_tokenizer(name)
            else:
                ids = beit.load_tokenizer(name, num_heads=4).encode(stored["input"])
                assert torch.equal(ids.flatten(1), stored["ids"])
        server.shutdown()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoder.blocks.0.norm1.weight"), "no whole VQ-KD: 1 tensors differ (decoder.blocks.0.norm1"),
        (lambda w: w.pop("quantize.embedding.weight"), "no VQ-KD tokenizer: it lacks quantize.embedding.weight"),
        (lambda w: w.update({"quantize.cluster_size": torch.zeros(31)}), "quantize.cluster_size (31,) in the file"),
        (lambda w: w.update({"quantize.embedding.initted": torch.zeros(1)}), "has no codes yet"),
        (lambda w: w.update({"encoder.pos_embed": torch.zeros(1, 15, 48)}), "14 positions"),
        (lambda w: w.pop("encoder.cls_token"), "holds no VQ-KD tokenizer: it lacks cls_token"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused_in_one_line(stored, tmp_path, change, message):
    weights = dict(stored["state_dict"])
    change(weights)
    torch.save({"model": weights}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=re.escape(message)):
        beit.load_tokenizer(tmp_path / "bad.pth", "vqkd", num_heads=4)


def test_other_mistakes(stored, path, tmp_path, golden):
    with pytest.raises(InputError, match="cannot be split into 5 heads"):
        beit.load_tokenizer(path, num_heads=5)
    with pytest.raises(InputError, match=r"holds no model.safetensors, .* give one of its files: vqkd\.pth"):
        beit.load_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"no released tokenizer vqkd_encoder_.*clipp \(did you mean"):
        beit.load_tokenizer("vqkd_encoder_base_decoder_1x768x12_clipp")
    assert type(beit.load_tokenizer(golden / "dalle_small")).__name__ == "DallETokenizer"
    with pytest.raises(InputError, match="only VQ-KD's files take num_heads"):
        beit.load_tokenizer(golden / "dalle_small", num_heads=3)
