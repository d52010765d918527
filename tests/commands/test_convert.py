"""The command `beit convert`: round trips through files, graphs checked against the model, mistakes in one line."""

import argparse
import importlib.util
import json
import re

import pytest
import torch

from beit.__main__ import main
from beit.checkpoints.export import convert
from beit.checkpoints.graphs import Features, export_graph
from beit.checkpoints.pieces import STATE_FILE, write_pieces
from beit.checkpoints.read import read_weights
from beit.errors import InputError
from beit.modeling import VisionTransformer, VisionTransformerForMaskedImageModeling
from beit.storage import load_checkpoint, save_checkpoint
from beit.tokenizers.dvae import DiscreteVAE, QuantizedAutoencoder, RelaxedAutoencoder, save_dvae
from beit.tokenizers.vqkd import VQKD
from beit.zoo import get_model
from semantic_segmentation.modeling import build_segmentor

SIZES = {"img_size": (32, 48), "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.1}


def random_(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def classifier(**options):
    options = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "num_classes": 3, **options}
    return random_(VisionTransformer(**{**SIZES, **options}))


def masked():
    options = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "vocab_size": 8, "img_size": 32}
    return random_(VisionTransformerForMaskedImageModeling(**{**SIZES, **options}))


def official(folder, model):
    """A file as the official code writes it: index buffers, an argparse.Namespace."""
    save_checkpoint(folder / "ours.pth", {"model": model.state_dict(), "args": {"input_size": list(model.img_size)}})
    convert(folder / "ours.pth", folder / "official.pth", "unilm")
    content = load_checkpoint(folder / "official.pth")
    assert any(name.endswith("relative_position_index") for name in content["model"])
    content["args"] = argparse.Namespace(**content["args"])
    save_checkpoint(folder / "official.pth", content)
    return folder / "official.pth"


@pytest.mark.parametrize("to", ["huggingface", "timm", "timm folder", "mmpretrain", "unilm"])
@pytest.mark.parametrize("build", [lambda: classifier(img_size=32), masked], ids=["classifier", "pre-training"])
def test_official_files_come_back_bit_identical(build, to, tmp_path):
    source = official(tmp_path, build())
    file = tmp_path / (to if to in ("huggingface", "timm folder") else f"{to}.pth")
    assert main(["convert", str(source), str(file), "--to", to.split()[0]]) == 0
    assert main(["convert", str(file), str(tmp_path / "back.pth"), "--to", "unilm"]) == 0
    before, after = load_checkpoint(source)["model"], load_checkpoint(tmp_path / "back.pth")["model"]
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_checkpoint_in_pieces_alone_is_converted_with_its_settings(tmp_path):
    # As a run of --shard fsdp leaves it, its plain file lost.
    model = classifier(img_size=32)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    rest = {"optimizer": {"state": {}, "param_groups": []}, "args": {"crop_pct": 0.9}, "labels": ["x", "y", "z"]}
    save_checkpoint(tmp_path / "checkpoint-3" / STATE_FILE, rest)
    write_pieces(tmp_path / "checkpoint-3", tensors)
    assert main(["convert", str(tmp_path / "checkpoint-3"), str(tmp_path / "x.pth"), "--to", "unilm"]) == 0
    written = load_checkpoint(tmp_path / "x.pth")
    assert all(torch.equal(written["model"][name], tensor) for name, tensor in model.state_dict().items())
    assert (written["labels"], written["args"]) == (["x", "y", "z"], {"crop_pct": 0.9})


def test_the_dtype_of_the_weights_stays(tmp_path):
    # Breaks when a conversion goes through a float32 model: a half-precision file would double.
    save_checkpoint(tmp_path / "half.pth", {"model": classifier(img_size=32).half().state_dict()})
    convert(tmp_path / "half.pth", tmp_path / "timm.pth", "timm")
    assert {tensor.dtype for tensor in load_checkpoint(tmp_path / "timm.pth")["state_dict"].values()} == {torch.float16}


def test_a_non_square_model_keeps_its_size(tmp_path):
    model = classifier()
    convert(official(tmp_path, model), tmp_path / "mm.pth", "mmpretrain")
    assert get_model(tmp_path / "mm.pth").img_size == (32, 48)
    convert(tmp_path / "mm.pth", tmp_path / "back.pth", "unilm")
    images = torch.randn(1, 3, 32, 48)
    assert torch.equal(get_model(tmp_path / "back.pth")(images), model(images))


def test_labels_and_settings_travel(tmp_path):
    content = {"model": classifier(img_size=32).state_dict(), "labels": ["x", "y", "z"], "args": {"crop_pct": 1.0}}
    save_checkpoint(tmp_path / "a.pth", content)
    convert(tmp_path / "a.pth", tmp_path / "b.pth", "unilm")
    assert load_checkpoint(tmp_path / "b.pth")["labels"] == ["x", "y", "z"]
    convert(tmp_path / "b.pth", tmp_path / "hf", "huggingface")
    assert json.loads((tmp_path / "hf/config.json").read_text())["id2label"] == {"0": "x", "1": "y", "2": "z"}
    assert json.loads((tmp_path / "hf/preprocessor_config.json").read_text())["size"] == {"shortest_edge": 32}


def test_imagenet_classes_get_their_names(tmp_path):
    save_checkpoint(tmp_path / "a.pth", {"model": classifier(img_size=32, num_classes=1000).state_dict()})
    convert(tmp_path / "a.pth", tmp_path / "hf", "huggingface")
    assert json.loads((tmp_path / "hf/config.json").read_text())["id2label"]["207"] == "golden retriever"


def segmentor(folder, **options):
    """A run's checkpoint of a segmentor that transformers can compute."""
    sizes = {**SIZES, "img_size": 32, "depth": 4, "use_abs_pos_emb": False, "use_rel_pos_bias": True}
    heads = {"num_classes": 3, "channels": 32, "auxiliary_channels": 8, "out_indices": (0, 1, 2, 3)}
    model = random_(build_segmentor(**{**sizes, **heads, **options}))
    path = folder / "segmentor.pth"
    save_checkpoint(path, {"model": model.state_dict(), "labels": ["x", "y", "z"], "args": {"head_channels": 32}})
    return path


@pytest.mark.parametrize("chain", [("mmsegmentation",), ("huggingface",), ("huggingface", "mmsegmentation", "unilm")])
def test_segmentors_come_back_bit_identical(chain, tmp_path):
    # Through every format, on the command line; the last file is one that the official code reads.
    source = segmentor(tmp_path)
    for step, to in enumerate((*chain, "unilm")):
        there = tmp_path / (f"{step}.pth" if to != "huggingface" else f"folder{step}")
        assert main(["convert", str(source), str(there), "--to", to]) == 0
        source = there
    content = load_checkpoint(source)
    assert list(content["meta"]["CLASSES"]) == ["x", "y", "z"]
    before = load_checkpoint(tmp_path / "segmentor.pth")["model"]
    after = {k: v for k, v in content["state_dict"].items() if not k.endswith("relative_position_index")}
    assert len(content["state_dict"]) == len(after) + 4
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_segmentor_in_half_precision_stays_so(tmp_path):
    content = load_checkpoint(segmentor(tmp_path))
    weights = {name: t.half() if t.is_floating_point() else t for name, t in content["model"].items()}
    save_checkpoint(tmp_path / "half.pth", {"model": weights})
    convert(tmp_path / "half.pth", tmp_path / "hf", "huggingface")
    types = {name.rpartition(".")[2]: tensor.dtype for name, tensor in read_weights(tmp_path / "hf")[0].items()}
    assert (types.pop("num_batches_tracked"), set(types.values())) == (torch.int64, {torch.float16})


def test_a_file_without_names_of_classes_says_so_to_mmsegmentation_0(tmp_path):
    # Its code reads both keys without asking whether they are there.
    weights = load_checkpoint(segmentor(tmp_path))["model"]
    save_checkpoint(tmp_path / "unnamed.pth", {"model": weights, "labels": ["too", "few"]})
    convert(tmp_path / "unnamed.pth", tmp_path / "official.pth", "unilm")
    assert load_checkpoint(tmp_path / "official.pth")["meta"] == {"CLASSES": None, "PALETTE": None}
    assert "labels" not in read_weights(tmp_path / "official.pth")[1]


@pytest.mark.parametrize("to", ["timm", "mmpretrain", "onnx", "torch_export"])
def test_formats_without_segmentation_refuse_a_segmentor(to, tmp_path, capsys):
    # Breaks when the backbone alone is written, which opens and is not what was asked for.
    file = tmp_path / {"onnx": "a.onnx", "torch_export": "a.pt2"}.get(to, "a.pth")
    assert main(["convert", str(segmentor(tmp_path)), str(file), "--to", to]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"is a segmentor, which --to {to} cannot hold: choose unilm" in error
    assert not file.exists()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("decode_head.lateral_convs.1", "it lacks decode_head.lateral_convs.1.conv.weight and 4 more"),
        ("decode_head.conv_seg", "it lacks decode_head.conv_seg.weight and "),
        ("backbone.fpn2", "it lacks fpn2.0.weight and 1 more"),
        ("backbone.blocks.2.mlp", "is not a whole model: it lacks blocks.2.mlp.fc1.weight and 3 more"),
    ],
)
def test_a_segmentor_that_lacks_a_part_is_not_written(part, message, tmp_path):
    weights = load_checkpoint(segmentor(tmp_path))["model"]
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(f"{part}.")}
    save_checkpoint(tmp_path / "part.pth", {"model": kept})
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "part.pth", tmp_path / "b.pth", "unilm")


# Seconds each: what is exported does not depend on the format, so each of both is met once.
@pytest.mark.parametrize(
    ("to", "features"), [("torch_export", True), pytest.param("onnx", False, marks=pytest.mark.slow)]
)
def test_graphs_compute_what_the_model_computes(to, features, tmp_path):
    # For other batch sizes too: an example's size baked in shows only then.
    model = classifier(depth=1)
    file = tmp_path / ("model.pt2" if to == "torch_export" else "model.onnx")
    flags = ["--features"] if features else []
    assert main(["convert", str(official(tmp_path, model)), str(file), "--to", to, *flags]) == 0
    images = torch.randn(5, 3, 32, 48)
    with torch.no_grad():
        expected = model.forward_features(images) if features else model(images)
    if to == "torch_export":
        output = torch.export.load(file).module()(images)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        output = torch.from_numpy(session.run(["output"], {"images": images.numpy()})[0])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_a_pre_training_model_becomes_a_graph_of_its_tokens(tmp_path):
    model = masked()
    export_graph(official(tmp_path, model), tmp_path / "tokens.pt2", "torch_export")
    images = torch.randn(3, 3, 32, 32)
    output = torch.export.load(tmp_path / "tokens.pt2").module()(images)
    torch.testing.assert_close(output, model.forward_features(images), rtol=1e-4, atol=1e-5)


def test_a_graph_that_computes_something_else_is_not_left_behind(tmp_path, monkeypatch):
    path = official(tmp_path, classifier())
    monkeypatch.setattr(Features, "forward", lambda self, images: torch.rand(images.shape[0], 32))
    with pytest.raises(InputError, match="differs from the model"):
        export_graph(path, tmp_path / "a.pt2", "torch_export", features=True)
    assert not (tmp_path / "a.pt2").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.pth", "b"], "--to is missing: one of unilm, huggingface"),
        (["a.pth", "b", "--to", "tensorflow"], "--to: cannot use 'tensorflow': choose "),
        (["nowhere.pth", "b.pth", "--to", "unilm"], "there is no checkpoint nowhere.pth"),
        (["a.pth", "b.pth", "--to", "huggingface"], "writes a folder"),
        (["a.pth", "b", "--to", "mmpretrain"], "writes one file: name it b.pth"),
        (["a.pth", "b.pth", "--to", "onnx"], "name it b.onnx"),
        (["a.pth", "b.pth", "--to", "unilm", "--features"], "--features is for onnx and torch_export"),
        (["a.pth", "a.txt", "--to", "huggingface"], "a.txt is a file"),
        (["part.pth", "b.pth", "--to", "unilm"], "not a whole model: it lacks"),
        (["wide.pth", "b", "--to", "timm"], "32 x 48 pixels: write a file, b.safetensors"),
        (["positions.pth", "b.pth", "--to", "mmsegmentation"], "no absolute positions"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = classifier(img_size=32).state_dict()
    save_checkpoint("a.pth", {"model": weights})
    (tmp_path / "a.txt").touch()
    save_checkpoint("part.pth", {"model": {n: t for n, t in weights.items() if not n.startswith("blocks.1.mlp")}})
    save_checkpoint("wide.pth", {"model": classifier().state_dict(), "args": {"input_size": [32, 48]}})
    positions = random_(VisionTransformer(**{**SIZES, "img_size": 32})).state_dict()
    save_checkpoint("positions.pth", {"model": positions, "args": {"model_kwargs": {"num_heads": 2}}})
    assert main(["convert", *arguments]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error


@pytest.mark.parametrize("to", ["unilm", "mmpretrain", "timm"])
@pytest.mark.parametrize(
    "destination",
    ["a.pth", "./a.pth", "link.pth", "hard.pth", "run/checkpoint-0.pth", "lightning.pth", "bare.pth", "notes.pth"],
)
def test_what_is_converted_and_what_was_trained_are_never_replaced(destination, to, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("a.pth", {"model": classifier(img_size=32).state_dict(), "optimizer": {"state": {}}, "epoch": 3})
    (tmp_path / "link.pth").symlink_to("a.pth")
    (tmp_path / "hard.pth").hardlink_to("a.pth")
    (tmp_path / "run").mkdir()
    save_checkpoint("run/checkpoint-0.pth", {"model": {}, "optimizer": {"state": {}}})
    save_checkpoint("lightning.pth", {"state_dict": {}, "optimizer_states": []})
    save_checkpoint("bare.pth", torch.optim.SGD([torch.zeros(1)]).state_dict())
    (tmp_path / "notes.pth").write_text("what I tried")
    before = (tmp_path / destination).read_bytes()
    assert main(["convert", "a.pth", destination, "--to", to]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "write to another name" in error
    assert (tmp_path / destination).read_bytes() == before
    assert main(["convert", "a.pth", "b.pth", "--to", to]) == 0
    assert main(["convert", "a.pth", "b.pth", "--to", to]) == 0  # what no run needs may be replaced


def test_a_folder_is_not_converted_onto_itself(tmp_path):
    save_checkpoint(tmp_path / "a.pth", {"model": classifier(img_size=32).state_dict()})
    convert(tmp_path / "a.pth", tmp_path / "hf", "huggingface")
    before = (tmp_path / "hf/config.json").read_bytes()
    for source in (tmp_path / "hf", tmp_path / "hf/model.safetensors"):
        for to, name in (("huggingface", "hf"), ("timm", "hf"), ("timm", "hf/model.safetensors")):
            with pytest.raises(InputError, match="is what is to be converted"):
                convert(source, tmp_path / name, to)
    assert (tmp_path / "hf/config.json").read_bytes() == before


@pytest.mark.parametrize("to", ["huggingface", "timm"])
def test_an_export_takes_the_place_of_no_other_folder(tmp_path, to):
    source = tmp_path / "a.pth"
    save_checkpoint(source, {"model": classifier(img_size=32).state_dict()})
    for name in ("config.json", "checkpoint-3.pth", "pytorch_model.bin"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(
            InputError, match=rf"{folder} holds {name}, which no export replaces: write to another name"
        ):
            convert(source, folder, to)
        assert [path.name for path in folder.iterdir()] == [name]
    for _ in range(2):  # an export may be made anew
        convert(source, tmp_path / "new", to)


def test_inspect_shows_what_is_recorded_and_what_is_assumed(tmp_path, capsys):
    weights = {f"net.{name}": tensor for name, tensor in classifier(img_size=32).half().state_dict().items()}
    del weights["net.head.bias"]
    weights["net.novelty"] = torch.zeros(2)
    save_checkpoint(tmp_path / "a.pth", {"model": weights, "crop_pct": 0.9})
    assert main(["inspect", str(tmp_path / "a.pth")]) == 0
    lines = dict(re.split(r":\s+", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["dialect"] == "unilm"
    assert lines["model"].startswith("a BEiT classifier with 2 blocks, 32 channels, patches of 16 x 16")
    assert lines["model"].endswith("2 heads, for images of 32 x 32 pixels")
    assert re.fullmatch(r"[\d,]+ in \d+ tensors of float16, float32", lines["parameters"])
    assert (lines["recorded crop_pct"], lines["missing"], lines["other tensors"]) == ("0.9", "head.bias", "novelty")
    assert "2 x 2 patches" in lines["assumed"]
    assert "images of mean [0.5, 0.5, 0.5]" in lines["assumed"]
    assert main(["inspect", str(tmp_path / "b.pth")]) == 2


def inspected(capsys, *words):
    assert main(["inspect", *map(str, words)]) == 0
    return dict(re.split(r":\s+", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_inspect_shows_tokenizers_of_each_kind(tmp_path, capsys):
    sizes = {"codebook_size": 32, "codebook_dim": 8, "num_layers": 2, "hidden_dim": 16}
    vae = DiscreteVAE(16, *sizes.values())
    save_dvae(tmp_path / "vae", vae)
    relaxed, quantized = RelaxedAutoencoder(vae), QuantizedAutoencoder(vae)
    for quantizer, average in {"gumbel": relaxed, "vq": quantized}.items():
        state = {"quantizer": quantizer, "args": {"input_size": 16, **sizes}, "model_ema": average.state_dict()}
        save_checkpoint(tmp_path / f"{quantizer}.pth", state)
    assert main(["inspect", str(tmp_path / "vq.pth")]) == 2  # it has no codes yet
    state["model_ema"]["started"] = torch.tensor(True)
    save_checkpoint(tmp_path / "vq.pth", state)
    for source in ("vae", "gumbel.pth", "vq.pth"):
        lines = inspected(capsys, tmp_path / source)
        assert (lines["tokenizer"], lines["tokens"]) == ("customized", "32, each of 4 x 4 pixels")
    assert lines["parameters"].startswith(f"{sum(tensor.numel() for tensor in vae.state_dict().values()):,} in")
    model = VQKD(img_size=32, embed_dim=48, depth=2, num_heads=4, codebook_size=32, codebook_dim=8)
    save_checkpoint(tmp_path / "vqkd.pth", {"model": model.state_dict()})
    lines = inspected(capsys, tmp_path / "vqkd.pth", "--num_heads", 4)
    assert (lines["tokenizer"], lines["tokens"]) == ("vqkd", "32, each of 16 x 16 pixels")
    assert lines["encoder"] == "2 blocks, 48 channels, 4 heads, for images of 32 x 32 pixels"


@pytest.mark.parametrize("shared", [True, False])
def test_inspect_shows_a_second_prediction(shared, tmp_path, capsys):
    further = {"head_layers": 1, "early_layers": 1, "shared_lm_head": shared}
    model = VisionTransformerForMaskedImageModeling(**{**SIZES, **further, "img_size": 32})
    save_checkpoint(tmp_path / "v2.pth", {"model": model.state_dict(), "args": {"early_layers": 1}})
    lines = inspected(capsys, tmp_path / "v2.pth")
    head = "the same" if shared else "an own"
    assert lines["second prediction"] == f"1 block on the patches of block 1, with {head} head"


def test_inspect_takes_segmentors_and_folders(tmp_path, capsys):
    convert(segmentor(tmp_path), tmp_path / "hf", "huggingface")
    for source in (tmp_path / "segmentor.pth", tmp_path / "hf"):
        assert main(["inspect", str(source)]) == 0
        text = capsys.readouterr().out
        assert "a BEiT segmentor with 4 blocks, 32 channels" in text
        assert "missing" not in text
        assert "other tensors" not in text


def test_one_of_several_models_is_converted_by_its_prefix(tmp_path, capsys):
    one = classifier(img_size=32).state_dict()
    two = {f"teacher.{name}": tensor + 1 for name, tensor in one.items()}
    save_checkpoint(tmp_path / "a.pth", {"model": {f"student.{n}": t for n, t in one.items()} | two})
    arguments = [str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--to", "unilm"]
    assert main(["convert", *arguments]) == 2
    assert "below 'student.' and 'teacher.'" in capsys.readouterr().err
    assert main(["convert", *arguments, "--model_prefix", "teacher."]) == 0
    assert torch.equal(load_checkpoint(tmp_path / "b.pth")["model"]["head.bias"], two["teacher.head.bias"])


def test_onnx_without_its_libraries_is_one_line(tmp_path, monkeypatch):
    path = official(tmp_path, classifier())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(InputError, match="pip install onnxscript;"):
        export_graph(path, tmp_path / "a.onnx", "onnx")
