"""From a tokenizer over pre-training and fine-tuning to a prediction, on images of one channel and of five."""

import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from beit.__main__ import main as beit
from beit.inference import extract_feat, inference_model
from beit.storage import load_checkpoint
from beit.tokenizers.base import load_tokenizer
from beit.zoo import get_model

TINY = ("--model_kwargs", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2", "--input_size", "32")
QUIET = ("--device", "cpu", "--num_workers", "0", "--batch_size", "4", "--epochs", "1")
MASKS = ("--num_mask_patches", "6", "--min_mask_patches_per_block", "2")
STATISTICS = {1: ("--mean", "0.4", "--std", "0.2"), 5: ("--mean", "0.1", "0.2", "0.3", "0.4", "0.5", "--std", "0.3")}


@pytest.fixture(params=[1, 5])
def site(request, tmp_path):
    """Images of 16 bits; of five channels all are TIFF files."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "xy":
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                values = rng.integers(65536, size=(request.param, 40, 44), dtype=np.uint16)
                path = tmp_path / split / name / f"{number}"
                if request.param == 1:
                    Image.fromarray(values[0]).save(path.with_suffix(".png"))
                else:
                    tifffile.imwrite(path.with_suffix(".tif"), values, photometric="minisblack")
    return tmp_path, request.param


@pytest.mark.slow
def test_the_whole_chain(site, capsys):
    folder, channels = site
    run = ("--data_path", str(folder / "train"), *QUIET, "--in_chans", str(channels))
    small = ("--codebook_size", "16", "--codebook_dim", "8", "--hidden_dim", "8", "--input_size", "32")
    assert beit(["dvae", *run, *small, "--quantizer", "gumbel", "--output_dir", str(folder / "dvae")]) == 0
    tokenizer = load_tokenizer(folder / "dvae")
    images = torch.rand(1, channels, 32, 32)
    assert tokenizer.decode(tokenizer.encode(images)).shape == (1, channels, 32, 32)
    of_run = load_tokenizer(folder / "dvae" / "checkpoint-0.pth")
    assert torch.equal(of_run.encode(images), tokenizer.encode(images))
    with Image.open(folder / "dvae" / "reconstructions.png") as picture:
        assert picture.mode == "RGB"
    pretrain = ["pretrain", *run, *TINY, *MASKS, "--warmup_epochs", "0", *STATISTICS[channels]]
    tokens = ("--discrete_vae_weight_path", str(folder / "dvae"), "--discrete_vae_type", "customized")
    tokens += ("--second_input_size", "32", "--log_dir", str(folder / "board"), "--log_images", "2")
    assert beit([*pretrain, *tokens, "--output_dir", str(folder / "tokens")]) == 0
    for target in ("pixels", "hog"):
        assert beit([*pretrain, "--target", target, "--output_dir", str(folder / target)]) == 0
    finetune = ["finetune", *run, *TINY, "--data_path", str(folder), "--warmup_epochs", "0", *STATISTICS[channels]]
    start = ("--init_from", str(folder / "tokens" / "checkpoint-0.pth"))
    assert beit([*finetune, *start, "--output_dir", str(folder / "tuned")]) == 0
    tuned = folder / "tuned" / "checkpoint-0.pth"
    probe = ["probe", *run, *TINY, "--data_path", str(folder), "--patch_size", "8", *STATISTICS[channels]]
    assert beit([*probe, "--checkpoint", str(tuned), "--output_dir", str(folder / "probe")]) == 0
    capsys.readouterr()

    assert (get_model(tuned).metadata["mean"], get_model(tuned).metadata["std"]) == (
        tuple(map(float, STATISTICS[channels][1 : 1 + channels])),
        (float(STATISTICS[channels][-1]),) * channels,
    )
    paths = sorted(map(str, (folder / "val").glob("*/*")))
    assert beit(["predict", *paths, "--checkpoint", str(tuned), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    pixels = tifffile.imread(paths[0]) if channels > 1 else np.asarray(Image.open(paths[0]), dtype=np.uint16)
    assert inference_model(tuned, pixels)["score"] == pytest.approx(rows[0]["score"], abs=1e-6)
    assert inference_model(tuned, torch.rand(2, channels, 40, 44))[1]["name"] in ("x", "y")
    assert extract_feat(tuned, paths).shape == (8, 32)
    assert beit(["knn", "--checkpoint", str(tuned), "--data_path", str(folder), "--num_workers", "0", "--k", "2"]) == 0
    assert beit(["convert", str(tuned), str(folder / "hf"), "--to", "huggingface"]) == 0
    again = get_model(folder / "hf")
    assert inference_model(again, pixels)["score"] == pytest.approx(rows[0]["score"], abs=1e-6)
    attention = ["visualize", "attention", paths[0], "--checkpoint", str(tuned), "-o", str(folder / "attention.png")]
    assert beit(attention) == 0
    reconstruct = ["visualize", "reconstruct", "--checkpoint", str(folder / "tokens" / "checkpoint-0.pth")]
    assert beit([*reconstruct, "--images", *paths[:2], "-o", str(folder / "reconstructed.png")]) == 0
    assert load_checkpoint(folder / "tokens" / "checkpoint-0.pth")["args"]["in_chans"] == channels


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--in_chans", "1", "--mean", "0.1", "0.2"), "--mean: 2 numbers for 1 channel"),
        (("--in_chans", "1", "--imagenet_default_mean_and_std"), "give --mean and --std"),
        (("--in_chans", "1", "--target", "features", "--teacher", "x"), "a teacher sees images of 3 channels"),
        (("--model_kwargs", "in_chans=1"), "--in_chans sets it"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, message, capsys):
    Image.new("L", (32, 32)).save(tmp_path / "a.png")
    assert beit(["pretrain", "--data_path", str(tmp_path), "--target", "pixels", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err
