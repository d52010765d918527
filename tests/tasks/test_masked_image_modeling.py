"""The pre-training job: flags, objective, evaluation, and what it says about mistakes."""

import json
import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from beit.config import read_command_line
from beit.data.datasets import ImageDataset, index_images
from beit.data.loaders import EpochLoader
from beit.data.transforms import MaskedImageModelingEvalTransform
from beit.dvae import DiscreteVAE
from beit.errors import InputError
from beit.masking import BlockwiseMaskGenerator
from beit.storage import save_checkpoint
from beit.targets import TokenTarget
from beit.tasks.launch import launch
from beit.tasks.masked_image_modeling import (
    MaskedPrediction,
    PretrainingConfig,
    build_model,
    evaluate,
    initialize_from,
    main,
    with_patch_index,
)
from beit.tokenizer import load_tokenizer, save_dvae
from beit.training.precision import Precision

CPU = torch.device("cpu")
HALF = ((0.5,) * 3, (0.5,) * 3)
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def parse(*argv) -> PretrainingConfig:
    return read_command_line(PretrainingConfig, [str(argument) for argument in argv], "prog", "")


def test_every_official_flag_parses_with_its_default(golden):
    flags = json.loads((golden / "official_cli.json").read_text())["run_beit_pretraining"]
    defaults = parse()
    assert len(flags) == 47
    for flag in flags:
        (spelling,) = flag["flags"]
        default = getattr(defaults, flag["dest"])
        assert (list(default) if isinstance(default, tuple) else default) == flag["default"], spelling
        if flag["kind"] == "Store":
            value = flag["default"] if flag["default"] not in (None, "") else 3
            values = value if isinstance(value, list) else [value]
            parsed = getattr(parse(spelling, *values), flag["dest"])
            assert type(parsed)(value) == parsed
        else:
            assert getattr(parse(spelling), flag["dest"]) is (flag["kind"] == "StoreTrue")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """20 images, a random tokenizer of 16 tokens, a model of 4 x 4 patches."""
    folder = tmp_path_factory.mktemp("setting")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(20):
        pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 48)).save(folder / "images" / f"{number}.png")
    torch.manual_seed(0)
    save_dvae(folder / "dvae", DiscreteVAE(image_size=32, num_tokens=16, codebook_dim=8, num_layers=3, hidden_dim=8))
    tokenizer = load_tokenizer(str(folder / "dvae"), "customized", CPU)
    config = parse("--model", "beit_tiny_patch16_224_8k_vocab", "--input_size", 32, "--model_kwargs", *overrides(TINY))
    return folder, tokenizer, build_model(config, 16)


def overrides(options):
    return [f"{key}={value}" for key, value in options.items()]


def random_batch(masks=2):
    torch.manual_seed(1)
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[:, 1, :masks] = True
    mask[2, 3] = True
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    return with_patch_index({"image": images, "token_image": images.flip(3), "mask": mask})


def test_the_loss_is_the_mean_over_masked_patches(setting):
    # Breaks if unmasked patches enter the loss, or the views, their scaling or the order of patches are mixed up.
    _, tokenizer, model = setting
    batch = random_batch()
    loss, metrics = MaskedPrediction(TokenTarget(tokenizer), *HALF)(model.eval(), batch, 0)
    logits = model((batch["image"] / 255 - 0.5) / 0.5, batch["mask"], return_all_tokens=True)
    tokens = tokenizer.encode(batch["token_image"] / 255).flatten(1)
    terms, right = [], []
    for image in range(3):
        for patch in range(16):
            if batch["mask"].flatten(1)[image, patch]:
                terms.append(F.cross_entropy(logits[image, patch], tokens[image, patch]))
                right.append(logits[image, patch].argmax() == tokens[image, patch])
    assert len(terms) == 10
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    torch.testing.assert_close(metrics["mlm_acc"], torch.stack(right).float().mean())


def test_no_gradient_reaches_the_tokenizer(setting):
    _, tokenizer, model = setting
    MaskedPrediction(TokenTarget(tokenizer), *HALF)(model.train(), random_batch(), 0)[0].backward()
    assert all(parameter.grad is None for parameter in tokenizer.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_evaluation_equals_a_naive_count(setting):
    folder, tokenizer, model = setting
    objective = MaskedPrediction(TokenTarget(tokenizer), *HALF)
    transform = MaskedImageModelingEvalTransform(32, 32, mask_generator=BlockwiseMaskGenerator((4, 4), 6, 2))
    dataset = ImageDataset(index_images(folder / "images"), transform, seed=0)
    loader = EpochLoader(dataset, 6, shuffle=False, drop_last=False)
    results = evaluate(model, objective, loader, Precision(torch.float32, CPU))
    right, losses, seen = [], [], []
    for index in range(20):
        sample = {name: value[None] for name, value in dataset[(0, index)].items() if torch.is_tensor(value)}
        logits, tokens = objective.predict(model.eval(), with_patch_index(sample))
        right += (logits.argmax(1) == tokens).tolist()
        losses += F.cross_entropy(logits, tokens, reduction="none").tolist()
        seen += tokens.tolist()
    assert results["mlm_acc"] == pytest.approx(sum(right) / len(right))
    assert results["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert results["most_frequent_acc"] == pytest.approx(max(map(seen.count, seen)) / len(seen))


def test_weights_to_start_from_keep_everything_but_a_head_of_another_vocabulary(setting, tmp_path, caplog):
    _, _, model = setting
    save_checkpoint(tmp_path / "source.pth", {"model": model.state_dict(), "epoch": 3})
    config = parse("--model", "beit_tiny_patch16_224_8k_vocab", "--input_size", 32, "--model_kwargs", *overrides(TINY))
    other = build_model(config, 99)
    with caplog.at_level(logging.INFO):
        initialize_from(other, str(tmp_path / "source.pth"))
    assert "another vocabulary" in caplog.text
    theirs = dict(other.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in model.named_parameters() if not name.startswith("lm_head"))
    larger = build_model(parse("--input_size", 32, "--model_kwargs", *overrides({**TINY, "depth": 3})), 16)
    with pytest.raises(InputError, match="another model"):
        initialize_from(larger, str(tmp_path / "source.pth"))


def test_first_loss_is_the_logarithm_of_the_vocabulary(setting):
    _, tokenizer, _ = setting
    config = parse("--model", "beit_tiny_patch16_224_8k_vocab", "--input_size", 32, "--model_kwargs", *overrides(TINY))
    loss, _ = MaskedPrediction(TokenTarget(tokenizer), *HALF)(build_model(config, 16), random_batch(), 0)
    assert loss.item() == pytest.approx(math.log(16), abs=0.2)


@pytest.fixture
def good_flags(setting, tmp_path):
    folder, *_ = setting
    return {
        "--data_path": folder / "images",
        "--discrete_vae_weight_path": folder / "dvae",
        "--discrete_vae_type": "customized",
        "--model": "beit_tiny_patch16_224_8k_vocab",
        "--model_kwargs": overrides(TINY),
        "--input_size": 32,
        "--second_input_size": 32,
        "--num_mask_patches": 6,
        "--min_mask_patches_per_block": 2,
        "--batch_size": 8,
        "--epochs": 1,
        "--num_workers": 0,
        "--device": "cpu",
        "--output_dir": tmp_path / "run",
    }


def call(flags):
    argv = []
    for flag, value in flags.items():
        argv += [flag, *(map(str, value) if isinstance(value, list) else [str(value)])]
    return launch(PretrainingConfig, main, "", argv, "run_beit_pretraining.py")


def test_the_good_flags_are_good(good_flags):
    assert call(good_flags) == 0
    assert (good_flags["--output_dir"] / "checkpoint-0.pth").exists()


MISTAKES = {
    "missing folder": ({"--data_path": "nowhere"}, ["nowhere"]),
    "folder without images": ({"--data_path": "EMPTY"}, ["EMPTY", "no image"]),
    "unknown model": ({"--model": "beit_tiny_patch16_224_8k_vocap"}, ["did you mean 'beit_tiny_patch16_224_8k_vocab'"]),
    "a classifier": ({"--model": "beit_tiny_patch16_224", "--model_kwargs": []}, ["classifier", "_8k_vocab"]),
    "unknown constructor argument": ({"--model_kwargs": ["embed_dims=3"]}, ["embed_dims"]),
    "wrong tokenizer path": ({"--discrete_vae_weight_path": "nowhere"}, ["nowhere"]),
    "no tokenizer path": ({"--discrete_vae_weight_path": ""}, ["beit download tokenizer"]),
    "unknown kind of tokenizer": ({"--discrete_vae_type": "customised"}, ["customized"]),
    "mismatched grids": ({"--second_input_size": 64}, ["8×8", "4×4", "second_input_size to 32"]),
    "no masked patch": ({"--num_mask_patches": 0}, ["--num_mask_patches 0"]),
    "more masked patches than patches": ({"--num_mask_patches": 17}, ["17", "16"]),
    "no block can fit": ({"--min_mask_patches_per_block": 16, "--num_mask_patches": 16}, ["block"]),
    "batch larger than the data": ({"--batch_size": 21}, ["21", "20"]),
    "unwritable output": ({"--output_dir": "FILE/run"}, ["FILE/run"]),
    "unknown key in a YAML": ({"--config": "BADYAML"}, ["unknown key 'epoch'", "epochs"]),
    "checkpoint of another model": ({"--resume": "OTHER.pth"}, ["OTHER.pth", "another model"]),
    "a checkpoint that is no checkpoint": ({"--resume": "FILE"}, ["FILE"]),
    "half precision on the CPU": ({"--amp_dtype": "fp16"}, ["fp16"]),
    "unknown optimizer": ({"--opt": "adamvv"}, ["adam"]),
    "image size that patches do not divide": ({"--input_size": 33}, ["33"]),
    "no evaluation ever": ({"--eval_freq": 0}, ["--eval_freq 0"]),
    "a negative seed": ({"--seed": -1}, ["--seed -1"]),
    "an epoch before the first": ({"--start_epoch": -1}, ["--start_epoch -1"]),
    "a negative learning rate": ({"--lr": -1}, ["--lr -1"]),
    "a learning rate that is none": ({"--lr": "nan"}, ["--lr nan"]),
    "one beta": ({"--opt_betas": 0.9}, ["--opt_betas 0.9"]),
    "a drop rate above 1": ({"--drop_path": 1.5}, ["--drop_path 1.5"]),
    "gradients clipped to nothing": ({"--clip_grad": 0}, ["--clip_grad 0"]),
    "unknown device": ({"--device": "gpu"}, ["--device gpu"]),
    "unwritable log folder": ({"--log_dir": "FILE/tb"}, ["--log_dir FILE/tb"]),
    "zero epochs": ({"--epochs": 0}, ["--epochs 0"]),
    "unknown interpolation": ({"--train_interpolation": "cubic"}, ["bicubic"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_status_2(mistake, good_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("not a checkpoint")
    (tmp_path / "BADYAML").write_text("epoch: 3\n")
    other = torch.nn.Linear(2, 2)
    save_checkpoint(tmp_path / "OTHER.pth", {"model": other.state_dict(), "optimizer": {}, "epoch": 0})
    changes, parts = MISTAKES[mistake]
    flags = {**good_flags, **changes}
    assert call({flag: value for flag, value in flags.items() if value != []}) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(part in errors[0] for part in parts), errors[0]


def test_out_of_memory_says_what_to_lower(good_flags, monkeypatch, capsys):
    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MaskedPrediction, "__call__", full)
    assert call(good_flags) == 1
    assert "lower --batch_size" in capsys.readouterr().err


def test_a_full_disk_says_what_to_free(good_flags, monkeypatch, capsys):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert call(good_flags) in (1, 2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "space" in line
    assert "free" in line


@pytest.mark.parametrize(("lr", "warns"), [(1.5e-3 * 8 / 2048, False), (1.5e-3, True)])
def test_an_lr_that_does_not_fit_the_batch_is_said_and_not_changed(good_flags, caplog, lr, warns):
    with caplog.at_level(logging.INFO):
        call({**good_flags, "--lr": lr, "--warmup_epochs": 0})
    assert ("lr/batch is" in caplog.text) is warns
    state = torch.load(good_flags["--output_dir"] / "checkpoint-0.pth", weights_only=True)
    assert state["args"]["lr"] == lr
