"""Segmentors in the names of other libraries: equal logits with transformers, tensors that come back bit by bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, BeitConfig, BeitForSemanticSegmentation

from beit.checkpoints.export import convert
from beit.checkpoints.formats import dialects, recognise, to_official
from beit.checkpoints.formats.segmentation import heads_of, incomplete, taps_of
from beit.checkpoints.read import read_weights
from beit.errors import InputError
from beit.relative_position import relative_position_index
from beit.storage import load_checkpoint, save_checkpoint
from beit.zoo import get_model
from semantic_segmentation.modeling import build_segmentor, segmentor_from

SIZES = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 5, "num_heads": 2, "init_values": 0.1}
TABLES = {"use_abs_pos_emb": False, "use_rel_pos_bias": True}
SHARED = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True}
HEADS = {"num_classes": 6, "channels": 32, "auxiliary_channels": 16}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
NAMES = ("wall", "sky", "tree, green", "road", "lamp", "cat")
COLOURS = [[10 * k, 20, 250 - k] for k in range(6)]
HF_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 16,
    "num_labels": 6,
    "auxiliary_channels": 16,
}


def randomise(model):
    """Draws every parameter and every statistic, so that a name taken for another shows in the outputs."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            module.num_batches_tracked.fill_(7)
    return model.eval()


def segmentor(taps=(0, 2, 3, 4), **options):
    return randomise(build_segmentor(out_indices=taps, **{**SIZES, **TABLES, **HEADS, **options}))


def saved(model, path, **recorded):
    taps = list(model.backbone.out_indices)
    args = {"out_indices": taps, "crop_size": 64, "model_kwargs": {"num_heads": 2}}
    save_checkpoint(path, {"model": model.state_dict(), "args": args, **recorded})
    return path


def opened(source):
    return segmentor_from(*read_weights(source))


@torch.no_grad()
def both_logits(model):
    levels = model.backbone(IMAGES)
    return model.decode_head(levels), None if model.auxiliary_head is None else model.auxiliary_head(levels)


@torch.no_grad()
def both_logits_of_transformers(peer):
    seen = []
    if peer.auxiliary_head is not None:
        peer.auxiliary_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    logits = peer.eval()(IMAGES).logits
    return logits, seen[0] if seen else None


def assert_equal_logits(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("taps", "options"),
    [
        ((0, 1, 2, 3), {}),
        ((1, 2, 3, 4), {}),
        ((0, 2, 3, 4), SHARED | {"use_rel_pos_bias": False}),
        ((0, 2, 3, 4), {"init_values": None}),
        ((0, 1, 2, 4), {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "auxiliary_channels": 0}),
        ((0, 1, 2, 3), {"pool_scales": (1, 2)}),
    ],
    ids=["before the last", "the last block", "shared table", "no LayerScale", "positions", "other pooling"],
)
def test_transformers_opens_our_export_with_equal_logits(taps, options, tmp_path):
    # Breaks when taps are not shifted, the last block has no layer after it, or a name is wrong (filled with noise).
    model = segmentor(taps, **options)
    scales = {"pool_scales": list(options["pool_scales"])} if "pool_scales" in options else {}
    convert(saved(model, tmp_path / "ours.pth", **scales), tmp_path / "hf", "huggingface")
    peer, info = BeitForSemanticSegmentation.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_equal_logits(both_logits(model), both_logits_of_transformers(peer))
    assert peer.config.num_hidden_layers == 5 + (taps[-1] == 4)
    assert peer.config.layer_norm_eps == 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"use_relative_position_bias": True, "out_indices": [2, 3, 4, 5]},
        {"use_relative_position_bias": True, "out_indices": [2, 3, 4, 5], "layer_scale_init_value": 0.0},
        {"use_shared_relative_position_bias": True, "out_indices": [2, 3, 4, 5], "layer_norm_eps": 1e-3},
        {"use_absolute_position_embeddings": True, "out_indices": [2, 3, 4, 5], "use_auxiliary_head": False},
        {"out_indices": [2, 3, 4, 5], "use_mean_pooling": False, "use_mask_token": True, "pool_scales": [1, 4]},
    ],
    ids=["tables", "no LayerScale", "shared table, eps", "positions, no auxiliary head", "norm and mask token"],
)
def test_we_open_a_segmentor_that_transformers_saved(options, tmp_path):
    # Breaks with a wrong tap (each block's output differs), and when eps or the scales of its config are not taken.
    peer = randomise(BeitForSemanticSegmentation(BeitConfig(**HF_SIZES, **options)))
    peer.save_pretrained(tmp_path)
    model = opened(tmp_path)
    assert model.backbone.out_indices == (0, 1, 2, 3)
    assert_equal_logits(both_logits(model), both_logits_of_transformers(peer))


def test_documented_taps_of_transformers_are_two_blocks_earlier(tmp_path, caplog):
    # Its [3, 5, 7, 11] reads like the official blocks of that number, and is not what it computes.
    config = BeitConfig(
        **{**HF_SIZES, "num_hidden_layers": 12}, use_relative_position_bias=True, out_indices=[3, 5, 7, 11]
    )
    peer = randomise(BeitForSemanticSegmentation(config))
    peer.save_pretrained(tmp_path)
    weights, metadata = read_weights(tmp_path)
    assert metadata["out_indices"] == (1, 3, 5, 9)
    assert "official file learnt with blocks (3, 5, 7, 11): [5, 7, 9, 13] in config.json" in caplog.text
    assert_equal_logits(both_logits(segmentor_from(weights, metadata)), both_logits_of_transformers(peer))
    described = json.loads((tmp_path / "config.json").read_text())
    del described["out_indices"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert read_weights(tmp_path)[1]["out_indices"] == (1, 3, 5, 9)
    (tmp_path / "config.json").write_text(json.dumps(described | {"out_indices": [5, 7, 9, 13]}))
    assert read_weights(tmp_path)[1]["out_indices"] == (3, 5, 7, 11)
    (tmp_path / "config.json").write_text(json.dumps(described | {"out_indices": [1, 3, 5, 11]}))
    with pytest.raises(InputError, match=r"out_indices \[1, 3, 5, 11\]: needed are four different ones"):
        read_weights(tmp_path)


def test_our_export_has_the_names_of_the_librarys_own_files(tmp_path):
    # The file names, not those in memory: fpn at the top level, conv_seg as classifier.
    convert(saved(segmentor(), tmp_path / "ours.pth"), tmp_path / "hf", "huggingface")
    peer = BeitForSemanticSegmentation(BeitConfig.from_pretrained(tmp_path / "hf"))
    peer.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "theirs"))
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}


def test_the_inert_layer_comes_and_goes(tmp_path):
    # Breaks when a layer that somebody trained is taken for the inert one, or the inert one stays with the model.
    convert(saved(segmentor(), tmp_path / "ours.pth"), tmp_path / "hf", "huggingface")
    file = tmp_path / "hf" / "model.safetensors"
    written = load_file(file)
    assert not any(written[f"beit.encoder.layer.5.lambda_{n}"].any() for n in (1, 2))
    weights, metadata = read_weights(tmp_path / "hf")
    assert metadata["out_indices"] == (0, 2, 3, 4)
    assert not any(name.startswith("blocks.5.") for name in weights)
    written["beit.encoder.layer.5.lambda_1"].fill_(0.1)
    save_file(written, file, {"format": "pt"})
    assert any(name.startswith("blocks.5.") for name in read_weights(tmp_path / "hf")[0])


def test_names_colours_and_preparation_travel_through_transformers(tmp_path):
    recorded = {"labels": list(NAMES), "palette": COLOURS, "reduce_zero_label": True, "pool_scales": [1, 2, 3, 6]}
    convert(saved(segmentor(), tmp_path / "ours.pth", **recorded), tmp_path / "hf", "huggingface")
    config = BeitConfig.from_pretrained(tmp_path / "hf")
    assert [config.id2label[index] for index in range(6)] == list(NAMES)
    assert (config.semantic_loss_ignore_index, config.auxiliary_channels) == (255, 16)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    black, unlabelled = torch.zeros(3, 40, 90, dtype=torch.uint8), torch.zeros(40, 90, dtype=torch.uint8)
    prepared = processor(images=black, segmentation_maps=unlabelled, return_tensors="pt")
    assert prepared["pixel_values"].shape == (1, 3, 64, 64)
    torch.testing.assert_close(prepared["pixel_values"][0, 0, 0, 0].item(), -0.485 / 0.229)  # of mmsegmentation
    assert prepared["labels"][0].unique().tolist() == [255]
    _, metadata = read_weights(tmp_path / "hf")
    assert metadata["labels"] == NAMES
    assert metadata["palette"] == tuple(map(tuple, COLOURS))
    assert metadata["reduce_zero_label"] is True
    assert metadata["pool_scales"] == (1, 2, 3, 6)


@pytest.mark.parametrize(
    ("recorded", "classes", "zero"),
    [
        ({}, 150, True),  # as a released file: ADE20K's
        ({}, 6, False),
        ({"reduce_zero_label": False, "interpolation": "bicubic"}, 150, False),
        ({"reduce_zero_label": True, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}, 6, True),
    ],
)
def test_transformers_is_told_to_prepare_images_and_label_maps_as_in_training(tmp_path, recorded, classes, zero):
    # Broken by a backbone's bicubic resizing, and by labels that are one off since a released file records nothing.
    convert(saved(segmentor(num_classes=classes), tmp_path / "ours.pth", **recorded), tmp_path / "hf", "huggingface")
    described = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert described["resample"] == 2  # Pillow's number of "bilinear"
    assert described["do_reduce_labels"] is zero
    assert described["size"] == {"height": 64, "width": 64}
    assert described["image_mean"] == recorded.get("mean", [0.485, 0.456, 0.406])
    assert described["image_std"] == recorded.get("std", [0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"channels": 48}, "have one width there, and here 48 and 32 channels"),
        ({"patch_size": 8}, "the one for patches of 16 pixels, and these are of 8"),
        ({"decode_head": "setr_pup"}, "its only decode head is UPerNet, and this one is setr_pup"),
        ({"img_size": (64, 96)}, "takes tables and positions for a square"),
        ({"img_size": (64, 96), "use_rel_pos_bias": False}, r"only segments square images, not \[64, 96\] pixels"),
        ({"pool_scales": (1, 2)}, "the 2 scales at which UPerNet pools are not recorded"),
    ],
)
def test_what_transformers_cannot_compute_is_refused(model, message, tmp_path):
    path = saved(segmentor(**model), tmp_path / "ours.pth", image_size=model.get("img_size", 64))
    with pytest.raises(InputError, match=message):
        convert(path, tmp_path / "hf", "huggingface")
    assert not (tmp_path / "hf").exists()


INDEX = relative_position_index((4, 4))


@pytest.mark.parametrize("patch_size", [16, 8])
@pytest.mark.parametrize("dialect", ["unilm", "mmsegmentation", "huggingface"])
def test_there_and_back_is_bit_identical(dialect, patch_size):
    # Breaks when two names collide, or the one upsampling of patches of 8 pixels is taken for the other.
    model = segmentor(patch_size=patch_size).state_dict()
    weights = to_official(model, recognise(model))
    there = dialects()[dialect].from_official(weights, INDEX)
    assert recognise(there) == dialect
    back = to_official(there, dialect)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


MMSEGMENTATION = {
    "backbone.blocks.1.mlp.fc1.weight": "backbone.layers.1.ffn.layers.0.0.weight",
    "backbone.blocks.1.norm1.bias": "backbone.layers.1.ln1.bias",
    "backbone.fpn1.0.weight": "neck.upsample_4x.0.weight",
    "backbone.fpn1.1.running_var": "neck.upsample_4x.1.running_var",
    "backbone.fpn1.3.bias": "neck.upsample_4x.3.bias",
    "backbone.fpn2.0.weight": "neck.upsample_2x.0.weight",
    "decode_head.psp_modules.3.1.conv.weight": "decode_head.psp_modules.3.1.conv.weight",
    "decode_head.conv_seg.bias": "decode_head.conv_seg.bias",
    "auxiliary_head.convs.0.bn.weight": "auxiliary_head.convs.0.bn.weight",
}


def test_names_of_mmsegmentation_are_those_of_its_modules():
    # The reference is its code (BEiT, Feature2Pyramid, UPerHead, FCNHead): the library is not installed here.
    model = segmentor().state_dict()
    there = dialects()["mmsegmentation"].from_official(to_official(model, "unilm"), INDEX)
    assert all(torch.equal(there[theirs], model[ours]) for ours, theirs in MMSEGMENTATION.items())
    assert len(there) == len(model) + SIZES["depth"]  # and an index buffer in every block
    small = segmentor(patch_size=8).state_dict()
    there = dialects()["mmsegmentation"].from_official(to_official(small, "unilm"), INDEX)
    assert torch.equal(there["neck.upsample_2x.0.weight"], small["backbone.fpn1.0.weight"])


@pytest.fixture
def official(golden, tmp_path):
    """A file of the official code: names below ``backbone``, index buffers, ``state_dict`` and ``meta``."""
    stored = torch.load(golden / "seg_small.pt", weights_only=True)
    config = "backbone=dict(type='BEiT',\n out_indices=[0, 1,\n 2, 3]), decode_head=dict(pool_scales=(1, 2, 3, 6))"
    config += ", in_index=[0, 1, 2, 3]\nreduce_zero_label=True, out_indices=[9]"
    meta = {"CLASSES": tuple("abcdefghij"), "PALETTE": [[k, k, k] for k in range(10)], "config": config}
    path = tmp_path / "official.pth"
    save_checkpoint(path, {"state_dict": stored["state_dict"], "meta": meta})
    return path


@pytest.mark.parametrize("to", ["unilm", "mmsegmentation"])
def test_the_official_file_passes_through_each_version(official, golden, to, tmp_path):
    # Logits are those of the reference implementation, so that a wrong name shows even if it is wrong both ways.
    convert(official, tmp_path / "there.pth", to)
    convert(tmp_path / "there.pth", tmp_path / "back.pth", "unilm")
    before, after = (load_checkpoint(path)["state_dict"] for path in (official, tmp_path / "back.pth"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    meta = load_checkpoint(tmp_path / "back.pth")["meta"]
    assert (tuple(meta["CLASSES"]), meta["PALETTE"][9]) == (tuple("abcdefghij"), [9, 9, 9])

    stored = torch.load(golden / "seg_small.pt", weights_only=True)
    weights, metadata = read_weights(tmp_path / "there.pth")
    assert (metadata["out_indices"], metadata["pool_scales"]) == ((0, 1, 2, 3), (1, 2, 3, 6))
    assert metadata["reduce_zero_label"] is True
    model = segmentor_from(weights, metadata)
    with torch.no_grad():
        levels = model.backbone(stored["input"])
        torch.testing.assert_close(model.decode_head(levels), stored["decode_logits"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.auxiliary_head(levels), stored["aux_logits"], rtol=1e-5, atol=1e-5)


def test_an_official_file_comes_back_from_transformers_bit_identical(tmp_path):
    # The stored one has a head of another width, which transformers does not know; this one taps the last block, too.
    model = segmentor()
    convert(saved(model, tmp_path / "ours.pth"), tmp_path / "official.pth", "unilm")
    convert(tmp_path / "official.pth", tmp_path / "hf", "huggingface")
    convert(tmp_path / "hf", tmp_path / "back.pth", "unilm")
    before, after = (load_checkpoint(tmp_path / f"{name}.pth")["state_dict"] for name in ("official", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert_equal_logits(both_logits(opened(tmp_path / "back.pth")), both_logits(model))


def test_the_stored_model_is_too_narrow_for_transformers(official, tmp_path):
    with pytest.raises(InputError, match="here 32 and 48 channels"):
        convert(official, tmp_path / "hf", "huggingface")


def test_files_of_mmsegmentation_1_are_described_by_their_dataset_meta(tmp_path):
    weights = to_official(segmentor().state_dict(), "unilm")
    there = dialects()["mmsegmentation"].from_official(weights, INDEX)
    meta = {"dataset_meta": {"classes": NAMES, "palette": COLOURS}, "cfg": "backbone=dict(out_indices=(0, 2, 3, 4))"}
    save_checkpoint(tmp_path / "mm.pth", {"state_dict": there, "meta": meta})
    _, metadata = read_weights(tmp_path / "mm.pth")
    assert (metadata["labels"], metadata["out_indices"]) == (NAMES, (0, 2, 3, 4))
    assert metadata["palette"][5] == tuple(COLOURS[5])
    assert metadata["dialect"] == "mmsegmentation"
    convert(tmp_path / "mm.pth", tmp_path / "again.pth", "mmsegmentation")
    assert load_checkpoint(tmp_path / "again.pth")["meta"]["dataset_meta"]["classes"] == list(NAMES)
    assert_equal_logits(both_logits(opened(tmp_path / "again.pth")), both_logits(segmentor()))


def test_a_shared_table_is_copied_into_the_blocks_of_mmsegmentation(tmp_path):
    model = segmentor(**SHARED, use_rel_pos_bias=False)
    convert(saved(model, tmp_path / "ours.pth"), tmp_path / "mm.pth", "mmsegmentation")
    assert_equal_logits(both_logits(opened(tmp_path / "mm.pth")), both_logits(model))


def test_taps_that_no_file_records_are_the_published_ones():
    blocks = {f"blocks.{index}.norm1.weight": torch.zeros(1) for index in range(24)}
    assert taps_of(blocks, {}) == (7, 11, 15, 23)
    assert taps_of({name: t for name, t in blocks.items() if int(name.split(".")[1]) < 12}, {}) == (3, 5, 7, 11)
    assert taps_of({name: t for name, t in blocks.items() if int(name.split(".")[1]) < 6}, {}) == (0, 2, 3, 5)
    assert taps_of(blocks, {"out_indices": (1, 2, 3, 4)}) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    "options",
    [{}, {"patch_size": 8}, {"auxiliary_channels": 0}, {"decode_head": "setr_pup"}],
    ids=["UPerNet", "patches of 8", "no auxiliary head", "SETR-PUP"],
)
def test_every_tensor_of_pyramid_and_heads_is_asked_for(options):
    # Breaks when a file without some tensor is taken for a whole one; the truth is the model itself.
    model = segmentor(**options)
    weights = to_official(model.state_dict(), "unilm")
    patch_size = options.get("patch_size", 16)
    assert incomplete(weights, patch_size) == []
    parts = [name for name in weights if name.startswith(("fpn", "decode_head", "auxiliary_head"))]
    for name in parts:
        if not name.endswith("num_batches_tracked"):
            without = {other: tensor for other, tensor in weights.items() if other != name}
            assert incomplete(without, patch_size), name
    assert heads_of(weights).num_classes == 6


def test_a_segmentor_opens_as_its_backbone(tmp_path, caplog):
    caplog.set_level("INFO")
    model = segmentor(taps=(0, 1, 2, 3))
    backbone = get_model(saved(model, tmp_path / "ours.pth", labels=list(NAMES)))
    assert "is a segmentor: only its backbone is loaded" in caplog.text
    assert backbone.num_classes == 0
    images = IMAGES[:1]
    with torch.no_grad():
        ours, theirs = (m.get_intermediate_layers(images) for m in (backbone, model.backbone))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
