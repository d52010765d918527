"""One loader for every file: the reference's numbers, where weights are found, what is refused and how."""

import argparse
import io
import json
import logging
import os
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import beit
from beit import storage
from beit.checkpoints import released
from beit.checkpoints.export import convert
from beit.checkpoints.formats import dialects
from beit.checkpoints.heads import match_classes
from beit.checkpoints.load import load_pretrained
from beit.checkpoints.read import architecture_of, class_names, preparation_of, read_weights
from beit.checkpoints.released import RELEASED, ReleasedCheckpoint, released_for, resolve
from beit.data.transforms import normalize
from beit.errors import InputError
from beit.inference import preprocessing_of
from beit.modeling import VisionTransformer, VisionTransformerForMaskedImageModeling
from beit.relative_position import relative_position_index
from beit.storage import save_checkpoint
from beit.zoo import create_model, get_model, list_models, open_model

SIZES = {"img_size": 64, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 0.1}
TABLES = {"use_abs_pos_emb": False, "use_rel_pos_bias": True}
SHARED = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "vocab_size": 8}


def random_(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def classifier(**options):
    return random_(VisionTransformer(**{**SIZES, **TABLES, "num_classes": 3, **options}))


def masked(**options):
    return random_(VisionTransformerForMaskedImageModeling(**{**SIZES, **SHARED, **options}))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No test may touch the user's own cache."""
    monkeypatch.setenv("BEIT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("BEIT_OFFLINE", raising=False)
    return tmp_path / "home"


def save(folder, model, name="checkpoint.pth", key="model", **more):
    save_checkpoint(folder / name, {key: model.state_dict(), **more})
    return folder / name


def same(model, weights, names=None):
    own = model.state_dict()
    return all(torch.equal(own[name], weights[name]) for name in names or own)


@pytest.mark.parametrize("case", ["D_mim64_to_80", "E_cls64_to_80_head_mismatch"])
def test_loading_equals_the_official_code(golden, tmp_path, case):
    # Breaks with another order of shared-table copy, resize and head removal, or another interpolation.
    stored = torch.load(golden / "ckpt_transfer.pt", weights_only=True)
    expected = stored["cases"][case]
    weights = stored["sources"][expected["source"]]["state_dict"]
    content = {expected["wrapper_key"]: weights} if expected["wrapper_key"] else weights
    save_checkpoint(tmp_path / "source.pth", content)
    model = VisionTransformer(**stored["base_config"], **expected["config"]).eval()
    model.load_state_dict(expected["target_init"], strict=False)

    report = load_pretrained(model, tmp_path / "source.pth")

    own = model.state_dict()
    assert set(report.loaded) == set(expected["loaded_keys"])
    untouched = {key for key in expected["untouched_keys"] if not key.endswith("relative_position_index")}
    assert set(report.missing) == untouched
    assert set(report.resized) == set(expected["result_transformed"])
    for name, tensor in expected["result_transformed"].items():
        # Tables to the last bit; torch's bicubic, which resizes positions, differs in it between releases.
        tolerance = 5e-6 if name == "pos_embed" else 0
        torch.testing.assert_close(own[name], tensor, atol=tolerance, rtol=0)
    assert all(torch.equal(own[name], weights[name]) for name in expected["copied_keys"])
    assert all(torch.equal(own[name], tensor) for name, tensor in expected["target_init"].items())
    with torch.no_grad():
        torch.testing.assert_close(model(expected["input"]), expected["logits"], rtol=1e-5, atol=1e-5)
    if case.startswith("D"):
        assert report.expanded == 3
        assert set(report.dropped) == {"mask_token", "lm_head.weight", "lm_head.bias", "norm.weight", "norm.bias"}
    else:
        assert set(report.dropped) == {"head.weight", "head.bias"}
    assert report.unexpected == ()
    assert "4 x 4 to 5 x 5 patches" in report.summary()


def test_a_shared_table_adds_no_blocks_to_what_a_deeper_model_is_told(tmp_path):
    with pytest.raises(InputError, match="it looks like a pre-trained BEiT with 2 blocks"):
        load_pretrained(classifier(depth=6), save(tmp_path, masked()))


def test_a_shared_table_stays_shared_where_the_model_shares_one(tmp_path):
    source, target = masked(), masked(img_size=(80, 64))
    report = load_pretrained(target, save(tmp_path, source))
    assert report.expanded == 0
    assert list(report.resized) == ["rel_pos_bias.relative_position_bias_table"]
    assert report.missing == ()
    source.set_input_size((80, 64))
    assert same(target, source.state_dict())


def test_non_square_targets_get_what_set_input_size_gives(tmp_path):
    # Breaks when height and width are exchanged on the way, for tables or for positions.
    source, target = classifier(use_abs_pos_emb=True), classifier(use_abs_pos_emb=True, img_size=(48, 96))
    load_pretrained(target, save(tmp_path, source))
    source.set_input_size((48, 96))
    assert same(target, source.state_dict())


@pytest.mark.parametrize("told", ["by the index buffers", "by the settings", "by the model"])
def test_non_square_sources_are_read_at_their_own_size(tmp_path, told):
    # 2 x 6 and 6 x 2 patches have tables of one length: only what is recorded tells them apart.
    source = classifier(img_size=(32, 96))
    weights, more = source.state_dict(), {}
    if told == "by the index buffers":
        weights = dialects()["unilm"].from_official(weights, relative_position_index((2, 6)))
    elif told == "by the settings":
        more = {"args": {"input_size": [32, 96]}}
    save_checkpoint(tmp_path / "a.pth", {"model": weights, **more})
    if told == "by the model":
        target = classifier(img_size=(32, 96))
        assert load_pretrained(target, tmp_path / "a.pth").resized == {}
        with pytest.raises(InputError, match="36 rows, no square"):
            load_pretrained(classifier(), tmp_path / "a.pth")
    else:
        target = classifier(img_size=(64, 64))
        load_pretrained(target, tmp_path / "a.pth")
        source.set_input_size((64, 64))
    assert same(target, source.state_dict())


@pytest.mark.parametrize("key", ["model", "module", "state_dict", "model_ema"])
@pytest.mark.parametrize("wrapper", ["", "module.", "backbone."])
def test_weights_are_found_under_every_usual_key_and_prefix(tmp_path, key, wrapper):
    source, target = classifier(), classifier()
    weights = {wrapper + name: tensor for name, tensor in source.state_dict().items()}
    save_checkpoint(tmp_path / "a.pth", {key: weights, "optimizer": {"state": {}}, "epoch": 3})
    load_pretrained(target, tmp_path / "a.pth")
    assert same(target, source.state_dict())


def test_the_key_and_the_prefix_asked_for_count(tmp_path):
    # Breaks when --model_key model_ema silently scores the raw weights.
    plain, average, target = classifier(), classifier(), classifier()
    student = {f"student.{name}": tensor for name, tensor in plain.state_dict().items()}
    noise = {f"teacher.{name}": tensor + 1 for name, tensor in plain.state_dict().items()}
    path = save(tmp_path, plain, model_ema=average.state_dict())
    load_pretrained(target, path, model_key="model_ema|model")
    assert same(target, average.state_dict())
    save_checkpoint(tmp_path / "b.pth", {"model": {**noise, **student}})
    load_pretrained(target, tmp_path / "b.pth", prefix="student.")
    assert same(target, plain.state_dict())
    with pytest.raises(InputError, match=r"no name in .* begins with 'pupil.'"):
        load_pretrained(target, tmp_path / "b.pth", prefix="pupil.")
    with pytest.raises(InputError, match="nothing under 'model_ema'; it has model"):
        load_pretrained(target, tmp_path / "b.pth", model_key="model_ema")


@pytest.mark.parametrize("dialect", dialects())
def test_every_dialect_loads(tmp_path, dialect):
    source, target = classifier(), classifier()
    translated = dialects()[dialect].from_official(source.state_dict(), relative_position_index((4, 4)))
    save_file({name: tensor.contiguous() for name, tensor in translated.items()}, tmp_path / "model.safetensors")
    report = load_pretrained(target, tmp_path / "model.safetensors")
    heads = ("head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias")
    assert report.missing == (() if dialect != "mmsegmentation" else ("fc_norm.weight", "fc_norm.bias", *heads[:2]))
    assert same(target, source.state_dict(), report.loaded)


def test_folders_are_read_whole_or_in_shards(tmp_path):
    source = classifier()
    names = dialects()["huggingface"].from_official(source.state_dict(), None)
    first = dict(list(names.items())[:10])
    rest = {name: tensor for name, tensor in names.items() if name not in first}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    save_file(rest, tmp_path / "model-00002-of-00002.safetensors")
    index = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    index |= dict.fromkeys(rest, "model-00002-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert same(get_model(tmp_path), source.state_dict())
    (tmp_path / "old").mkdir()
    torch.save(names, tmp_path / "old/pytorch_model.bin")
    assert same(get_model(tmp_path / "old"), source.state_dict())
    (tmp_path / "other").mkdir()
    save(tmp_path / "other", source, "vqkd.pth")
    with pytest.raises(InputError, match=r"give one of its files: vqkd.pth"):
        get_model(tmp_path / "other")


def test_a_run_folder_stands_for_its_best_checkpoint_or_the_newest(tmp_path):
    for name, time in (("checkpoint-9.pth", 1), ("checkpoint-10.pth", 3), ("checkpoint-last.pth", 2)):
        save(tmp_path / "run", classifier(num_classes=time), name)
        os.utime(tmp_path / "run" / name, (time, time))
    model = get_model(tmp_path / "run")
    assert (model.num_classes, model.metadata["source"]) == (3, str(tmp_path / "run" / "checkpoint-10.pth"))
    save(tmp_path / "run", classifier(num_classes=7), "checkpoint-best.pth")
    convert(tmp_path / "run", tmp_path / "hf", "huggingface")
    assert get_model(tmp_path / "hf").num_classes == 7
    (tmp_path / "rums").mkdir()  # of images
    with pytest.raises(InputError, match=r"did you mean 'run'\?"):
        get_model(tmp_path / "rum")


def test_opening_a_whole_checkpoint_draws_no_random_numbers(tmp_path):
    path = save(tmp_path, classifier())
    before = torch.get_rng_state()
    opened = get_model(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(opened.relative_position_index, classifier().relative_position_index)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_weights_of_other_floating_point_numbers_open(dtype, tmp_path):
    weights = {name: tensor.to(dtype) for name, tensor in classifier().state_dict().items()}
    save_checkpoint(tmp_path / "a.pth", {"model": weights})
    assert same(get_model(tmp_path / "a.pth"), {name: tensor.float() for name, tensor in weights.items()})


def test_half_precision_is_resized_in_float32(tmp_path):
    source, target = classifier(), classifier(img_size=96)
    save_checkpoint(tmp_path / "half.pth", {"module": {n: t.half() for n, t in source.state_dict().items()}})
    load_pretrained(target, tmp_path / "half.pth")
    source.half().float().set_input_size(96)
    assert same(target, source.state_dict())


def test_heads_are_kept_dropped_or_left_out(tmp_path):
    source = classifier()
    path = save(tmp_path, source)
    other = classifier(num_classes=7)
    before = other.head.weight.clone()
    report = load_pretrained(other, path)
    assert report.dropped["head.bias"] == "the head has 3 outputs, the model 7"
    assert torch.equal(other.head.weight, before)
    assert "head.weight" in load_pretrained(classifier(), path, drop_head=True).missing
    assert load_pretrained(classifier(num_classes=0), path).dropped["head.weight"] == "of classification"
    report = load_pretrained(masked(use_rel_pos_bias=True, use_shared_rel_pos_bias=False), path)
    assert {"head.weight", "fc_norm.weight"} <= report.dropped.keys()
    assert {"mask_token", "norm.weight", "lm_head.bias"} <= set(report.missing)


def test_the_final_norm_of_pre_training_serves_a_class_token_classifier(tmp_path):
    source, target = masked(), classifier(use_mean_pooling=False)
    report = load_pretrained(target, save(tmp_path, source))
    assert torch.equal(target.norm.weight, source.norm.weight)
    assert set(report.missing) == {"head.weight", "head.bias"}


def test_a_segmentation_checkpoint_gives_its_backbone(golden, tmp_path, caplog):
    source = classifier()
    weights = {f"backbone.{n}": t for n, t in source.state_dict().items() if not n.startswith(("head", "fc_norm"))}
    parts = ("backbone.fpn1.0.weight", "decode_head.conv_seg.weight", "auxiliary_head.conv_seg.bias")
    save_checkpoint(tmp_path / "a.pth", {"meta": {}, "state_dict": weights | dict.fromkeys(parts, torch.zeros(4))})
    target = classifier()
    with caplog.at_level(logging.INFO):
        report = load_pretrained(target, tmp_path / "a.pth")
    assert set(report.dropped.values()) == {"of segmentation"}
    assert report.unexpected == ()
    assert "dropped (of segmentation): fpn1.0.weight, decode_head.conv_seg.weight" in caplog.text
    assert same(target, source.state_dict(), report.loaded)


def test_relatives_are_loaded_or_refused_by_name(tmp_path):
    source = masked()
    v2 = {**source.state_dict(), "cls_pt_layers.0.norm1.weight": torch.zeros(16)}
    save_checkpoint(tmp_path / "v2.pth", {"model": v2})
    target = masked()
    report = load_pretrained(target, tmp_path / "v2.pth")
    assert report.dropped["lm_head.weight"] == "BEiT v2 predicts something else"
    assert report.dropped["cls_pt_layers.0.norm1.weight"] == "of BEiT v2's pre-training"
    assert same(target, source.state_dict(), report.loaded)
    assert load_pretrained(classifier(), tmp_path / "v2.pth").expanded == 2
    for name, key in (
        ("BEiT-3", "beit3.vision_embed.proj.weight"),
        ("EVA-02", "blocks.0.attn.q_proj.weight"),
        ("a ViT without class token or positions", "blocks.0.attn.qkv.bias"),
    ):
        save_checkpoint(tmp_path / "other.pth", {"model": {key: torch.zeros(2)}})
        with pytest.raises(InputError, match=f"other.pth is {name}.*not BEiT"):
            load_pretrained(target, tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 5}, "another model.* it looks like a BEiT classifier with 2 blocks, 16 channels"),
        ({"depth": 3}, r"another model: .*blocks.2.gamma_1 absent in the file, \(16,\) in the model"),
        ({"depth": 1}, "blocks.1.* in the file, absent in the model"),
        ({"embed_dim": 32}, "0 of 33 tensors of the backbone fit"),
        ({"patch_size": 8}, "another model: it differs in 1 tensor .patch_embed.proj.weight"),
        ({"init_values": None}, "has a LayerScale and the model has none: .*--layer_scale_init_value 0.1"),
        ({"qkv_bias": False}, "another model: .*q_bias"),
    ],
)
def test_another_model_is_refused(tmp_path, options, message):
    # Breaks when a run starts from weights that are mostly noise.
    path = save(tmp_path, classifier())
    target = classifier(**options)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(InputError, match=message) as refused:
        load_pretrained(target, path)
    assert "\n" not in str(refused.value)
    assert same(target, before)


def test_a_file_without_layer_scale_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"no LayerScale and the model has one: .*--layer_scale_init_value 0\)"):
        load_pretrained(classifier(), save(tmp_path, classifier(init_values=None)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": {}, "epoch": 3}, "no weights under model, module, state_dict, model_ema; it has optimizer"),
        ({"model": {"a": torch.zeros(1), "b": torch.zeros(1)}}, "holds no BEiT: its tensors are called a, b"),
        ([torch.zeros(1)], "is of type list, not a dict of weights"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, content, message):
    save_checkpoint(tmp_path / "a.pth", content)
    with pytest.raises(InputError, match=message):
        load_pretrained(classifier(), tmp_path / "a.pth")


def test_unexpected_tensors_are_a_warning(tmp_path, caplog):
    save_checkpoint(tmp_path / "a.pth", {"model": {**classifier().state_dict(), "novelty": torch.zeros(1)}})
    report = load_pretrained(classifier(), tmp_path / "a.pth")
    assert report.unexpected == ("novelty",)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no place in the model: novelty" in caplog.text


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves ``files``; remembers the paths it was asked for."""
    monkeypatch.setattr(storage, "BACKOFF_SECONDS", 0.01)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.asked.append(self.path)
            content = self.files.get(self.path, self.files.get(self.path.partition("?")[0]))
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        Handler.files, Handler.asked = {}, []
        Handler.url = f"http://127.0.0.1:{http.server_address[1]}"
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield Handler
        http.shutdown()


NAME = "beit_base_patch16_224_pt22k_ft1k"


@pytest.fixture
def served(server, tmp_path, monkeypatch):
    """A released checkpoint whose first address is gone, and whose second is the server."""
    row = ReleasedCheckpoint(
        NAME,
        "beit_base_patch16_224",
        (f"{server.url}/gone/{NAME}.pth", f"{server.url}/{NAME}.pth"),
        num_classes=3,
        input_size=64,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        crop_pct=0.875,
    )
    monkeypatch.setitem(RELEASED, NAME, row)
    model = classifier()
    server.files[f"/{NAME}.pth"] = save(tmp_path, model, args=argparse.Namespace(nb_classes=3)).read_bytes()
    return model


@pytest.mark.parametrize(
    "source",
    [
        NAME,
        f"{NAME}.pth",
        f"https://unilm.blob.core.windows.net/beit/{NAME}.pth",
        f"https://conversationhub.blob.core.windows.net/beit-share-public/beit/{NAME}.pth?sv=2021-10-04&sig=abc%3D",
        f"https://github.com/addf400/files/releases/download/v1.0/{NAME}.pth",
    ],
)
def test_names_and_dead_addresses_lead_to_the_file(served, server, home, source, monkeypatch):
    model, metadata = open_model(source)
    assert same(model, served.state_dict())
    assert resolve(source) == home / "checkpoints" / f"{NAME}.pth"
    assert server.asked == [f"/gone/{NAME}.pth", f"/{NAME}.pth"]  # fetched once, from the address that delivers
    assert (home / "checkpoints" / f"{NAME}.pth.sha256").exists()
    assert (metadata["crop_pct"], metadata["mean"]) == (0.875, (0.5, 0.5, 0.5))
    assert metadata["args"] == {"nb_classes": 3}
    monkeypatch.setenv("BEIT_OFFLINE", "1")
    assert same(get_model(source), served.state_dict())


def test_files_of_one_name_at_two_addresses_stay_apart(server, tmp_path):
    # Breaks when runs/a/checkpoint-best.pth is taken for runs/b/checkpoint-best.pth.
    for run in "ab":
        server.files[f"/{run}/best.pth"] = save(tmp_path, classifier(), f"{run}.pth").read_bytes()
    first, second = (resolve(f"{server.url}/{run}/best.pth?token={run}") for run in "ab")
    assert first.read_bytes() == server.files["/a/best.pth"] != second.read_bytes()
    assert resolve(f"{server.url}/a/best.pth?token=another") == first


def test_files_told_apart_by_the_query_stay_apart(server, tmp_path):
    # Breaks when all that follows "?" is taken for an access token: the wrong weights load.
    for number in "12":
        server.files[f"/download?id={number}"] = save(tmp_path, classifier(), f"{number}.pth").read_bytes()
    first, second = (resolve(f"{server.url}/download?id={number}") for number in "12")
    assert first.read_bytes() == server.files["/download?id=1"] != second.read_bytes()
    signatures = "sv=2021&se=3&sp=r&sr=b&st=1&spr=https&sig=x&token=t&Expires=9&Signature=s&Key-Pair-Id=k&X-Amz-Date=7"
    assert resolve(f"{server.url}/download?{signatures}&id=1") == first


def test_a_damaged_download_is_refused_and_not_kept(server, home):
    server.files["/a.pth"] = b"PK\x03\x04 and then the line went dead" + bytes(3000)
    with pytest.raises(InputError, match="truncated download"):
        resolve(f"{server.url}/a.pth")
    assert not list(home.rglob("a.pth"))
    server.files["/b.pth"] = b"<!DOCTYPE html><title>Sign in</title>"
    with pytest.raises(InputError, match="HTML page"):
        resolve(f"{server.url}/b.pth")


def test_a_file_that_changed_in_the_cache_is_refused(served, home):
    resolve(NAME)
    with open(home / "checkpoints" / f"{NAME}.pth", "ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="has changed"):
        resolve(NAME)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no checkpoint is given"),
        ("beit_base_patch16_224_pt22k_ft1", f"did you mean '{NAME}'"),
        ("nowhere/checkpoint-best.pth", "there is no checkpoint nowhere/checkpoint-best.pth"),
        ("http://", "names no file"),
        ("hf://a/b/c", "no http or https address"),
    ],
)
def test_mistaken_names_get_a_hint(source, message):
    with pytest.raises(InputError, match=message):
        resolve(source)


def test_a_hub_id_is_fetched_and_told_apart_from_a_path(tmp_path, monkeypatch, home):
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    source = classifier()
    folder = tmp_path / "snapshot"
    folder.mkdir()
    torch.save(dialects()["huggingface"].from_official(source.state_dict(), None), folder / "pytorch_model.bin")
    calls = []

    def fake(repository, name, *, cache_dir, local_files_only, revision):
        calls.append((repository, name, cache_dir, local_files_only, revision))
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        if not (folder / name).exists():
            raise EntryNotFoundError("no such entry")
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake)
    for name in ("microsoft/beit-base", "hf-hub:microsoft/beit-base", "https://huggingface.co/microsoft/beit-base"):
        assert same(get_model(name), source.state_dict())
    assert {call[::2] for call in calls} == {("microsoft/beit-base", home / "hub", None)}
    calls.clear()
    get_model("microsoft/beit-base@v1.0")
    assert {(call[0], call[4]) for call in calls} == {("microsoft/beit-base", "v1.0")}
    monkeypatch.setenv("BEIT_OFFLINE", "1")
    with pytest.raises(InputError, match="BEIT_OFFLINE is set and it is not in the cache"):
        get_model("microsoft/beit-base")


@pytest.mark.parametrize("what", ["config.json", "preprocessor_config.json", "model-2.safetensors"])
def test_a_hub_that_is_out_of_reach_for_one_file_is_an_error(what, tmp_path, monkeypatch):
    # Breaks when that is taken for "there is no such file": the model opens with other heads, eps and images.
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    names = dialects()["huggingface"].from_official(classifier(use_rel_pos_bias=False).state_dict(), None)
    save_file(names, tmp_path / "model-2.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-2.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    failures = []

    def fake(repository, name, **_):
        if name == what and failures:
            raise failures[0]
        if not (tmp_path / name).exists():
            raise EntryNotFoundError("404")
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake)
    assert get_model("org/name").num_heads == 4
    for failure in (
        LocalEntryNotFoundError("503"),
        RuntimeError("Server disconnected\nwithout a word"),
        OSError("401"),
    ):
        failures[:] = [failure]
        with pytest.raises(InputError, match="was not downloaded from the Hugging Face hub: ") as caught:
            get_model("org/name")
        assert "\n" not in str(caught.value)
    failures[:] = [LocalEntryNotFoundError("not cached")]
    monkeypatch.setenv("BEIT_OFFLINE", "1")
    if what == "config.json":
        with pytest.raises(InputError, match=r"BEIT_OFFLINE is set and its config\.json is not in the cache"):
            get_model("org/name")
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-3.safetensors")}))
        save_file(dialects()["huggingface"].from_official(WHOLE, None), tmp_path / "model-3.safetensors")
        absent = huggingface_hub._CACHED_NO_EXIST  # the hub has said that there is no such file
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: absent)
        assert same(get_model("org/name"), WHOLE)


@pytest.mark.parametrize("name", ["..", "%2e%2e", "x/%2E%2e", "a%00b.pth", "a%1b.pth"])
def test_addresses_that_name_no_file_are_refused(name, home):
    with pytest.raises(InputError, match="names no file") as caught:
        resolve(f"http://127.0.0.1:9/{name}")
    assert str(caught.value).isprintable()
    with pytest.raises(InputError, match="no address"):
        resolve("http://[::1/x.pth")
    assert not home.exists()


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + bytes(99), b"\x1f\x8b" + bytes(99), b"PK zip", b"cut"])
def test_what_a_server_delivers_is_opened_before_it_is_kept(content, server, home, tmp_path):
    if content == b"PK zip":
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("readme", "x" * 100)
        content = (tmp_path / "a.zip").read_bytes()
    if content == b"cut":
        save_file(classifier().state_dict(), tmp_path / "whole.safetensors")
        content = (tmp_path / "whole.safetensors").read_bytes()[:-100]
    server.files["/model.safetensors"] = content
    with pytest.raises(InputError, match="was not downloaded"):
        resolve(f"{server.url}/model.safetensors")
    save_file(classifier().state_dict(), tmp_path / "whole.safetensors")
    server.files["/model.safetensors"] = (tmp_path / "whole.safetensors").read_bytes()
    get_model(f"{server.url}/model.safetensors")  # the server has been mended


def test_a_hub_id_without_the_library_or_the_network_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install huggingface_hub"):
        resolve("microsoft/beit-base")


def test_every_released_checkpoint_has_a_model_and_an_address():
    assert len(RELEASED) == 14 + 16
    for name, row in RELEASED.items():
        folder = "BEiT-v2" if name.startswith("beitv2_") else "v1.0"
        assert row.urls[0] == f"https://github.com/addf400/files/releases/download/{folder}/{name}.pth"
        with torch.device("meta"):
            classes = {} if row.num_classes is None else {"num_classes": row.num_classes}
            model = create_model(row.model, **classes, **row.overrides)
        assert model.img_size == (row.input_size,) * 2
        assert (row.num_classes is None) == hasattr(model, "lm_head")
    assert {released_for(model).model for model in list_models("*_base_*")} == set(list_models("*_base_*"))
    assert released_for("beit_base_patch16_224").name == "beit_base_patch16_224_pt22k_ft22kto1k"
    with pytest.raises(InputError, match="no checkpoint of beit_tiny_patch16_224 was released"):
        create_model("beit_tiny_patch16_224", pretrained=True)


def test_a_model_is_created_with_weights(tmp_path, monkeypatch):
    overrides = {**SIZES, "num_classes": 3}
    path = save(tmp_path, classifier())
    model = create_model("beit_tiny_patch16_224", pretrained=path, **overrides)
    assert same(model, torch.load(path, weights_only=True)["model"])
    monkeypatch.setattr(released, "resolve", None)
    monkeypatch.setattr(
        "beit.checkpoints.read.resolve", lambda source: {"beit_base_patch16_224_pt22k_ft22kto1k": path}[source]
    )
    model = beit.create_model("beit_base_patch16_224", pretrained=True, **{**overrides, "num_classes": 9})
    assert model.head.out_features == 9
    assert same(beit.get_model("beit_base_patch16_224"), torch.load(path, weights_only=True)["model"])


def test_a_created_model_knows_what_its_checkpoint_records(tmp_path):
    # Breaks when create_model forgets the metadata: inference_model would prepare images with mean 0.5 and number them.
    recorded = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "labels": ["x", "y", "z"]}
    path, image = save(tmp_path, classifier(), **recorded), torch.rand(3, 70, 80)
    model = create_model("beit_tiny_patch16_224", pretrained=path, **SIZES, num_classes=3)
    assert model.metadata["mean"] == recorded["mean"]
    assert beit.inference_model(model, image) == beit.inference_model(get_model(path), image)
    other = create_model("beit_tiny_patch16_224", pretrained=path, **SIZES, num_classes=2)
    assert other.metadata["std"] == recorded["std"]
    assert "labels" not in other.metadata
    anew = classifier()
    load_pretrained(anew, path, drop_head=True)
    assert "labels" not in anew.metadata


@pytest.mark.parametrize(
    "model",
    [
        classifier(),
        classifier(img_size=(32, 96), use_abs_pos_emb=True, use_mean_pooling=False, init_values=None, qkv_bias=False),
        classifier(patch_size=(8, 16), in_chans=1, mlp_ratio=2.5, num_classes=0),
        classifier(embed_dim=88, mlp_ratio=109.5 / 88),  # 88 * (109 / 88) is below 109
        masked(),
        masked(use_abs_pos_emb=True, use_shared_rel_pos_bias=False, num_heads=1),
    ],
    ids=[
        "classifier",
        "positions, non-square",
        "other patches",
        "odd width",
        "pre-training",
        "pre-training, positions",
    ],
)
def test_a_checkpoint_opens_as_the_model_it_is_of(model, tmp_path):
    args = {"input_size": list(model.img_size), "model_kwargs": {"num_heads": model.num_heads}}
    opened, metadata = open_model(save(tmp_path, model, args=args, labels=["x", "y", "z"]))
    assert not opened.training
    assert same(opened, model.state_dict())
    assert metadata["labels"] == ("x", "y", "z")
    images = torch.randn(1, model.patch_embed.proj.in_channels, *model.img_size)
    torch.testing.assert_close(opened.forward_features(images), model.forward_features(images))


def test_names_of_classes():
    assert class_names({"labels": ["a", "b"]}, 2) == ("a", "b")
    assert class_names({"labels": ["a", "b"]}, 3) is None
    assert class_names({}, 1000)[207] == "golden retriever"
    assert len(class_names({}, 21841)) == 21841


def test_what_a_run_recorded_is_read(tmp_path):
    args = {"imagenet_default_mean_and_std": True, "input_size": 64, "crop_pct": None}
    path = save(tmp_path, classifier(), args=args, crop_pct=0.9)
    _, metadata = read_weights(path)
    assert metadata["mean"] == (0.485, 0.456, 0.406)
    assert metadata["crop_pct"] == 0.9
    assert metadata["image_size"] == (64, 64)
    assert metadata["dialect"] == "unilm"
    assert Path(metadata["source"]) == path


WHOLE = dict(classifier().state_dict())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {name: tensor for name, tensor in WHOLE.items() if not name.startswith("patch_embed.")},
            "is not a whole model: it lacks patch_embed.proj.weight",
        ),
        (
            {name: tensor for name, tensor in WHOLE.items() if ".mlp." not in name},
            "is not a whole model: it lacks blocks.0.mlp.fc1.weight",
        ),
        (WHOLE | {"patch_embed.proj.weight": torch.zeros(16, 768)}, r"patch_embed.proj.weight of shape \(16, 768\)"),
        ({0: torch.zeros(1), 1: torch.zeros(2)}, "no weights under model, .*; it has 0, 1"),
        ({"model": {0: torch.zeros(1)}}, "holds no BEiT"),
    ],
    ids=["no patches", "no MLP", "flat patches", "numbers", "numbers below"],
)
def test_what_is_no_whole_model_is_one_line(content, message, tmp_path):
    save_checkpoint(tmp_path / "a.pth", content)
    with pytest.raises(InputError, match=message) as refused:
        get_model(tmp_path / "a.pth")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "more",
    [
        {"args": "run.py --lr 1"},
        {"args": ["--lr", "1"]},
        {"args": {"model_kwargs": "a=1"}},
        {"args": {"model_kwargs": {"num_heads": "two"}, "input_size": ["a", "b"]}},
        {"args": {"labels": 3}},
        {"args": {"interpolation": 3}},
        {"interpolation": "cubic"},
        {"mean": 0.5, "std": "0.5", "crop_pct": "most", "image_size": 0.5, "num_heads": 0, "layer_norm_eps": "small"},
        {0: "a", "labels": {"x": 0}},
    ],
    ids=str,
)
def test_what_other_programs_record_is_passed_over(more, tmp_path):
    # Breaks when a name that means something else elsewhere ends in a traceback, or in a wrong picture.
    save_checkpoint(tmp_path / "a.pth", {"model": WHOLE, **more})
    model = get_model(tmp_path / "a.pth")
    assert model.metadata.keys() <= {"source", "dialect", "args", "guessed"}
    assert beit.inference_model(model, torch.rand(3, 64, 64))["name"].startswith("class ")


def test_labels_by_number_are_taken_in_order(tmp_path):
    path = save(tmp_path, classifier(), labels={2: "c", 0: "a", 1: "b"})
    assert get_model(path).metadata["labels"] == ("a", "b", "c")


WRONG = {
    "int8": lambda t: t.to(torch.int8),
    "uint8": lambda t: t.to(torch.uint8),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "NaN": lambda t: t.clone().fill_(torch.nan),
    "minus infinity in half": lambda t: torch.full_like(t, -torch.inf, dtype=torch.float16),
    "wide": lambda t: torch.ones(1).expand(1 << 40, t.shape[-1]),
    "empty": lambda t: t[:0],
    "flat": lambda t: t.flatten(),
}


@pytest.mark.parametrize("name", ["head.weight", "blocks.1.attn.relative_position_bias_table"])
@pytest.mark.parametrize("kind", WRONG)
def test_tensors_that_are_no_weights_are_refused_by_name(kind, name, tmp_path):
    # Breaks when the values are cast, or a model is filled with NaN: wrong answers without a word.
    save_checkpoint(tmp_path / "a.pth", {"model": WHOLE | {name: WRONG[kind](WHOLE[name].detach())}})
    with pytest.raises(InputError, match=name) as refused:
        get_model(tmp_path / "a.pth")
    assert "\n" not in str(refused.value)


def test_other_tensors_of_any_kind_may_lie_beside(tmp_path):
    more = {"accuracy.total": torch.tensor(3), "seen": torch.zeros(0, dtype=torch.bool), "x": torch.tensor(torch.nan)}
    save_checkpoint(tmp_path / "a.pth", {"model": WHOLE | more})
    assert same(get_model(tmp_path / "a.pth"), WHOLE)


@pytest.mark.parametrize("name", ["blocks.100000000.x", "blocks.first.x", "blocks.-1.x", "blocks.01.x", "blocks.3.x"])
def test_blocks_that_are_not_in_a_row_are_refused_before_any_is_built(name, tmp_path):
    save_checkpoint(tmp_path / "a.pth", {"model": WHOLE | {name: torch.zeros(1)}})
    with pytest.raises(InputError, match=r"no blocks 0, 1, 2, … in a row"):
        get_model(tmp_path / "a.pth")


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (0, 0), (4,), (5, 5)])
def test_an_odd_index_buffer_is_passed_over(shape, tmp_path):
    index = torch.zeros(shape, dtype=torch.int64)
    save_checkpoint(tmp_path / "a.pth", {"model": WHOLE | {"blocks.0.attn.relative_position_index": index}})
    assert get_model(tmp_path / "a.pth").img_size == (64, 64)


PLACES = ("pretrained.model.", "net.", "student.backbone.", "module.encoder.", "a.b.c.")


@pytest.mark.parametrize("dialect", ["unilm", "huggingface", "mmpretrain"])
@pytest.mark.parametrize("prefix", PLACES)
def test_the_prefix_of_the_one_model_in_a_file_is_found(prefix, dialect, tmp_path, caplog):
    names = dialects()[dialect].from_official(WHOLE, relative_position_index((4, 4)))
    save_checkpoint(tmp_path / "a.pth", {"state_dict": {prefix + name: t for name, t in names.items()}})
    with caplog.at_level(logging.INFO):
        assert same(get_model(tmp_path / "a.pth"), WHOLE)
    assert "taking the weights below " in caplog.text


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"])
def test_wrappers_inside_names_come_off(wrapper, tmp_path):
    names = {
        name.replace("blocks.0.", f"blocks.0.{wrapper}.").replace("mlp.", f"mlp.{wrapper}."): t
        for name, t in WHOLE.items()
    }
    save_checkpoint(tmp_path / "a.pth", {"model": {f"{wrapper}.{name}": tensor for name, tensor in names.items()}})
    assert same(get_model(tmp_path / "a.pth"), WHOLE)


@pytest.mark.parametrize("prefixes", [("model.", "backbone."), ("student.", "teacher."), ("", "module."), ("", "ema.")])
def test_several_models_in_a_file_are_never_mixed(prefixes, tmp_path):
    # Breaks when names that strip to one overwrite each other: the last model wins, silently.
    other = {name: tensor + 1 for name, tensor in WHOLE.items()}
    names = {prefix + name: t for prefix, one in zip(prefixes, (WHOLE, other), strict=True) for name, t in one.items()}
    save_checkpoint(tmp_path / "a.pth", {"state_dict": names})
    with pytest.raises(InputError, match=r"weights of several models.*prefix=") as refused:
        get_model(tmp_path / "a.pth")
    assert all(prefix in str(refused.value) for prefix in prefixes)
    assert same(get_model(tmp_path / "a.pth", prefix=prefixes[1]), other)


def test_a_part_of_another_model_is_not_mixed_in(tmp_path):
    save_checkpoint(
        tmp_path / "a.pth", {"model": {f"model.{n}": t for n, t in WHOLE.items()} | {"head.bias": torch.ones(3)}}
    )
    with pytest.raises(InputError, match=r"several models, below model\.head\.bias and head\.bias"):
        get_model(tmp_path / "a.pth")


def test_usual_keys_open_with_the_keys_of_the_probe(tmp_path):
    save_checkpoint(tmp_path / "a.pth", {"state_dict": WHOLE, "arch": "beit"})
    assert read_weights(tmp_path / "a.pth", "model|module|teacher")[0].keys() == WHOLE.keys()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("reg_token", (1, 4, 16)),
        ("storage_tokens", (1, 4, 16)),
        ("norm_pre.weight", (16,)),
        ("rope.periods", (4,)),
        ("rope_embed.periods", (4,)),
        ("register_tokens", (1, 4, 16)),
    ],
)
def test_models_with_registers_or_rotary_positions_are_refused(name, shape, tmp_path):
    for prefix in ("", "student."):
        names = {prefix + key: t for key, t in (WHOLE | {name: torch.zeros(shape)}).items()}
        save_checkpoint(tmp_path / "a.pth", {"model": names})
        with pytest.raises(
            InputError, match=r"is (DINOv2 with registers, DINOv3|a CLIP tower) or another model .*not BEiT"
        ):
            get_model(tmp_path / "a.pth")


def test_a_model_without_positions_must_say_so(tmp_path):
    model = classifier(use_rel_pos_bias=False, num_heads=1)
    path = save(tmp_path, model)
    with pytest.raises(InputError, match="neither bias tables nor position embeddings"):
        get_model(path)
    assert same(
        create_model("beit_tiny_patch16_224", path, **SIZES, use_rel_pos_bias=False, num_classes=3), model.state_dict()
    )
    assert same(get_model(save(tmp_path, model, num_heads=1)), model.state_dict())


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("options", "guess"),
    [
        ({"embed_dim": 1408, "num_heads": 16}, None),
        ({"embed_dim": 192, "num_heads": 3}, None),
        ({"embed_dim": 256, "num_heads": 8}, "4 attention heads of 64 channels (num_heads= settles it)"),
        ({"embed_dim": 48, "num_heads": 4}, "1 attention head of 48 channels (num_heads= settles it)"),
    ],
)
def test_heads_that_nobody_recorded_are_a_guess(options, guess, tmp_path, caplog):
    model = classifier(**options, depth=1, use_abs_pos_emb=True, use_rel_pos_bias=False)
    recorded = {"mean": [0.5] * 3, "std": [0.5] * 3, "image_size": 64}
    opened = get_model(save(tmp_path, model, **recorded))
    assert opened.num_heads == (int(guess[0]) if guess else options["num_heads"])
    assert len(warnings_of(caplog)) == (guess is not None)
    assert guess is None or guess in caplog.text
    assert opened.metadata.get("guessed", []) == ([g for g in opened.metadata.get("guessed", []) if "head" in g])
    caplog.clear()
    assert get_model(tmp_path / "checkpoint.pth", num_heads=2).num_heads == 2
    assert not warnings_of(caplog)
    convert(tmp_path / "checkpoint.pth", tmp_path / "told.pth", "unilm", num_heads=2)
    assert get_model(tmp_path / "told.pth").num_heads == 2


@pytest.mark.parametrize(
    "options", [{"use_abs_pos_emb": True, "use_rel_pos_bias": False}, {}], ids=["positions", "tables"]
)
def test_a_models_own_grid_comes_before_a_square(options, tmp_path, caplog):
    # 2 x 8 patches are as many as 4 x 4; 13 x 5 patches have a table as long as 8 x 8: 15 * 15 = 25 * 9.
    size, square = ((32, 128), (4, 4)) if options else ((208, 80), (8, 8))
    model, same_size = classifier(img_size=size, **options), classifier(img_size=size, **options)
    report = load_pretrained(same_size, save(tmp_path, model))
    assert report.resized == {}
    assert same(same_size, model.state_dict())
    assert [f"{size[0] // 16} x {size[1] // 16} patches" in text for text in warnings_of(caplog)] == [True]
    caplog.clear()
    path = save(tmp_path, model)
    if options:
        path = save(tmp_path, model, num_heads=2)
    assert get_model(path).patch_embed.grid_size == square
    assert f"{square[0]} x {square[1]} patches" in warnings_of(caplog)[0]
    caplog.clear()
    opened = get_model(save(tmp_path, model, image_size=size, num_heads=2, mean=[0.5] * 3, std=[0.5] * 3))
    assert (opened.img_size, warnings_of(caplog)) == (size, [])


def test_mean_and_names_that_nobody_recorded_are_guesses(tmp_path, caplog):
    model = classifier(num_classes=1000)
    about = {"image_size": 64}
    opened = get_model(save(tmp_path, model, "beitv2_base.pth", **about))
    assert preprocessing_of(opened, opened.metadata).mean == (0.485, 0.456, 0.406)
    assert preprocessing_of(opened, get_model(save(tmp_path, model, **about)).metadata).mean == (0.5, 0.5, 0.5)
    texts = warnings_of(caplog)
    assert ["images of mean" in text and "1000 classes are ImageNet's" in text for text in texts] == [True, True]
    caplog.clear()
    known = {"mean": [0.1] * 3, "std": [0.2] * 3, "labels": [f"c{number}" for number in range(1000)], **about}
    assert (
        preprocessing_of(opened, get_model(save(tmp_path, model, "beitv2_base.pth", **known)).metadata).mean
        == (0.1,) * 3
    )
    get_model(save(tmp_path, model, f"{NAME}.pth", **about))  # a released name settles everything
    assert warnings_of(caplog) == []


def test_a_class_token_head_is_not_put_on_pooled_patches(tmp_path, caplog):
    path = save(tmp_path, classifier(use_mean_pooling=False))
    target = classifier()
    before = target.head.weight.clone()
    report = load_pretrained(target, path)
    assert "build the model with use_mean_pooling=False" in report.dropped["head.weight"]
    assert torch.equal(target.head.weight, before)
    assert "use_mean_pooling=False" in warnings_of(caplog)[0]


@pytest.mark.parametrize(
    ("source", "target", "warns"),
    [
        (masked(), classifier(), False),
        (classifier(), classifier(num_classes=7), False),
        (classifier(), classifier(), False),
        (classifier(use_rel_pos_bias=False, use_abs_pos_emb=True), classifier(use_abs_pos_emb=True), True),
        (classifier(), classifier(use_abs_pos_emb=True), True),
        (classifier(num_classes=0), classifier(), True),
    ],
    ids=["pre-training", "another head", "whole", "no tables", "no positions", "no head"],
)
def test_what_is_missing_is_a_warning_unless_the_task_is_another(source, target, warns, tmp_path, caplog):
    load_pretrained(target, save(tmp_path, source))
    assert any("not in the checkpoint" in text for text in warnings_of(caplog)) is warns


ODD = [
    "[]",
    "null",
    "[1]",
    '"64"',
    "64.5",
    "-1",
    "true",
    "{}",
    '{"height": 1}',
    "1e999",
    "[null]",
    '[["a"]]',
    "NaN",
    "1" * 400,
]
KEYS = {
    "config.json": ("image_size", "num_attention_heads", "layer_norm_eps", "id2label", "out_indices", "hidden_act"),
    "preprocessor_config.json": (
        *("image_mean", "image_std", "size", "crop_size", "resample", "crop_pct", "rescale_factor", "do_resize"),
        *("do_normalize", "do_rescale", "do_center_crop", "image_processor_type"),
    ),
}


def outcome(run):
    """What a call returns, as text; or its InputError."""
    try:
        return repr(run())
    except InputError as error:
        return str(error)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    save_file(dialects()["huggingface"].from_official(WHOLE, None), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("file", KEYS)
def test_odd_values_in_json_are_one_line(file, exported):
    image, any_model = Image.new("RGB", (70, 80)), classifier()

    def use():
        weights, metadata = read_weights(exported)
        architecture_of(weights, metadata)
        how = preprocessing_of(any_model, metadata)
        return normalize(how.transform(image)["image"][None], how.mean, how.std).shape

    for key in KEYS[file]:
        for value in ODD:
            (exported / file).write_text(
                f'{{"{key}": {value}, "size": 64}}' if key != "size" else f'{{"size": {value}}}'
            )
            found = outcome(use)
            assert found == "torch.Size([1, 3, 64, 64])" or ("\n" not in found and len(found) < 400), (key, value)
    (exported / file).unlink()


@pytest.mark.parametrize("value", ['"../a.safetensors"', '"/etc/passwd"', "3", "null", '["a"]', '"b/../../c"', '""'])
def test_an_index_cannot_name_files_elsewhere(value, tmp_path):
    index = tmp_path / "x" / "model.safetensors.index.json"
    index.parent.mkdir()
    save_file(WHOLE, tmp_path / "a.safetensors")
    for content in (f'{{"weight_map": {{"w": {value}}}}}', f'{{"weight_map": {value}}}', "{}"):
        index.write_text(content)
        with pytest.raises(InputError, match=r"no weight_map of tensors to files beside it|is a folder"):
            get_model(index.parent)


def test_mmpretrain_classifiers_keep_what_their_meta_records(tmp_path):
    names = dialects()["mmpretrain"].from_official(WHOLE, None)
    cfg = "data_preprocessor = dict(mean=[123.675, 116.28, 103.53], num_classes=3, std=[58.395, 57.12, 57.375])\n"
    meta = {"dataset_meta": {"classes": ("x", "y", "z")}, "cfg": cfg}
    save_checkpoint(tmp_path / "a.pth", {"state_dict": names, "meta": meta})
    metadata = get_model(tmp_path / "a.pth").metadata
    assert metadata["labels"] == ("x", "y", "z")
    assert metadata["mean"] == pytest.approx((0.485, 0.456, 0.406))
    assert metadata["std"] == pytest.approx((0.229, 0.224, 0.225))
    save_checkpoint(tmp_path / "b.pth", {"state_dict": names, "meta": {"CLASSES": ["p", "q", "r"], "cfg": 3}})
    assert get_model(tmp_path / "b.pth").metadata["labels"] == ("p", "q", "r")


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    """The bytes of one small checkpoint in each form, and of the pickle in the zip file."""
    folder = tmp_path_factory.mktemp("whole")
    content = {"model": WHOLE, "args": argparse.Namespace(input_size=64), "labels": ["a", "b", "c"], "epoch": 3}
    torch.save(content, folder / "new.pth")
    torch.save(content, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(WHOLE, folder / "model.safetensors")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {**files, "new/data.pkl": zipfile.ZipFile(folder / "new.pth").read("new/data.pkl")}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_files_are_one_line_or_whole(whole_files, tmp_path_factory, data):
    # Cut, overwritten, bits flipped, pieces moved: never another exception, and never other weights from a zip file.
    name = data.draw(st.sampled_from(sorted(whole_files)))
    content = bytearray(whole_files[name])
    for _ in range(data.draw(st.integers(1, 3))):
        # Most of a file is tensors; what describes them, at both ends, is where damage confuses a reader.
        most = data.draw(st.sampled_from([600, 6000, len(content)]))
        start = data.draw(st.integers(0, most)) * data.draw(st.sampled_from([1, -1])) % max(len(content), 1)
        piece = data.draw(st.binary(max_size=40) | st.just(bytes(4096)))
        how = data.draw(st.sampled_from(["cut", "over", "insert", "flip", "remove"]))
        if how == "cut":
            del content[start:]
        elif how == "flip" and content:
            content[start] ^= 1 << data.draw(st.integers(0, 7))
        else:
            content[start : start + len(piece) * (how != "insert")] = b"" if how == "remove" else piece
    path = tmp_path_factory.getbasetemp() / f"damaged-{Path(name).name}"
    if name == "new/data.pkl":  # with the right checksum
        path = tmp_path_factory.getbasetemp() / "damaged.pth"
        with zipfile.ZipFile(io.BytesIO(whole_files["new.pth"])) as whole, zipfile.ZipFile(path, "w") as archive:
            for entry in whole.namelist():
                archive.writestr(entry, content if entry == name else whole.read(entry))
    else:
        path.write_bytes(content)
    found = outcome(lambda: same(get_model(path), WHOLE))
    assert "\n" not in found
    assert name != "new.pth" or found != "False"


@pytest.mark.parametrize(
    ("learnt", "wanted", "rows"),
    [
        (["A", "B", "a"], ["A", "a"], [0, 2]),  # told apart by case only
        (["cat", "dog"], ["cat", "Cat"], [0, None]),
        (["Cat ", "dog"], ["DOG", "cat"], [1, 0]),
        (["e\u0301crin", "dog"], ["dog", "\u00e9crin"], [1, 0]),
        (["n01440764", "n01443537"], ["goldfish, Carassius auratus", "tench, Tinca tinca"], [1, 0]),
        (["n01440764", "n01443537"], ["Goldfish", "tench"], [1, 0]),
        (["tinca tinca", "dog"], ["n01440764"], [0]),
        (["n02012849", "n03126707"], ["crane"], [None]),  # the bird or the machine
        (["n01440764", "n99999999"], ["n99999999", "n01440764"], [1, 0]),
    ],
)
def test_rows_of_a_head_are_matched_by_name(learnt, wanted, rows):
    # Breaks if a row is taken for another class, or one class is not found that is there.
    weights = {"head.weight": torch.arange(4.0)[: len(learnt), None], "head.bias": torch.arange(4.0)[: len(learnt)]}
    own = {"head.weight": torch.full((len(wanted), 1), -1.0), "head.bias": torch.full((len(wanted),), -1.0)}
    matched, metadata, fresh = match_classes(weights, {"labels": tuple(learnt)}, own, wanted)
    assert (
        matched["head.bias"].tolist() == matched["head.weight"][:, 0].tolist() == [-1 if r is None else r for r in rows]
    )
    assert metadata["labels"] == tuple(wanted)
    assert fresh == [name for name, row in zip(wanted, rows, strict=True) if row is None]


def test_what_no_beit_is_refused_although_names_and_shapes_fit(tmp_path):
    weights = classifier().state_dict()
    wide = {**weights, "cls_token": torch.zeros(1, 1, 1792)}
    gated = {**weights, "blocks.0.mlp.fc1.weight": torch.zeros(2 * weights["blocks.0.mlp.fc2.weight"].shape[1], 8)}
    repeated = {
        f"blocks.{block}.{name[9:]}": weights[name] for name in weights for block in range(9) if "blocks.0." in name
    }
    for state, message in (
        (wide, "EVA-02 enormous"),
        (gated, "gated MLP"),
        ({**weights, **repeated}, "repeat each other"),
    ):
        torch.save(state, tmp_path / "a.pth")
        with pytest.raises(InputError, match=message):
            read_weights(tmp_path / "a.pth")


def test_labels_with_gaps_and_tiny_crops_are_passed_over(tmp_path):
    # Breaks if the names move up: class 2 would be called what class 3 is.
    for labels in ({0: "a", 1: "b", 3: "d"}, {"0": "a", "9" * 5000: "b"}):
        torch.save({"model": classifier().state_dict(), "labels": labels, "crop_pct": 1e-9}, tmp_path / "a.pth")
        assert {"labels", "crop_pct"}.isdisjoint(read_weights(tmp_path / "a.pth")[1])


@pytest.mark.parametrize(("name", "blank"), [("blocks.1.mlp.fc1.weight", True), ("head.weight", False)])
def test_a_matrix_of_zeros_in_the_backbone_is_a_warning(name, blank, tmp_path, caplog):
    # As holes of a damaged file read; a head may well be all zeros before training.
    weights = classifier().state_dict()
    weights[name].zero_()
    torch.save({"model": weights}, tmp_path / "a.pth")
    read_weights(tmp_path / "a.pth")
    assert [name in text for text in warnings_of(caplog) if "damaged" in text] == [True] * blank


def test_images_of_eva_have_clips_mean():
    found = preparation_of({"dialect": "EVA"}, (224, 224))
    assert (found["mean"], found["std"]) == (list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD))


@pytest.mark.parametrize("key", ["ema", "net", "model_state_dict"])
def test_weights_under_the_only_key_that_has_any_are_found(key, tmp_path):
    weights = classifier().state_dict()
    torch.save({key: weights, "epoch": 3, "history": {}}, tmp_path / "a.pth")
    assert torch.equal(read_weights(tmp_path / "a.pth")[0]["cls_token"], weights["cls_token"])
    torch.save({key: weights, "other": weights}, tmp_path / "b.pth")
    with pytest.raises(InputError, match=f"it has {key}, other"):
        read_weights(tmp_path / "b.pth")


def test_a_run_folder_without_a_best_checkpoint_is_its_most_advanced_whole_one(tmp_path):
    # Breaks if file times decide, which copies do not keep, or if a damaged file or a broken link ends the search.
    for name, epoch in (("checkpoint-4.pth", 5), ("checkpoint-0.pth", 1)):
        save_checkpoint(tmp_path / name, {"model": {}, "progress": {"epoch": epoch, "step": 0}})
    (tmp_path / "checkpoint-9.pth").write_bytes(b"PK\3\4cut")
    (tmp_path / "checkpoint-7.pth").symlink_to("nowhere")
    assert resolve(tmp_path) == tmp_path / "checkpoint-4.pth"
    save_checkpoint(tmp_path / "checkpoint-best.pth", {"model": {}, "epoch": 0})
    assert resolve(tmp_path) == tmp_path / "checkpoint-best.pth"
