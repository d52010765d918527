"""The pre-training job: flags, objective, evaluation, and what it says about mistakes."""

import dataclasses
import io
import json
import logging
import math
import random
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from beit.checkpoints.load import load_pretrained
from beit.config import read_command_line
from beit.data.datasets import ImageDataset, index_images
from beit.data.loaders import EpochLoader
from beit.data.transforms import MaskedImageModelingEvalTransform
from beit.errors import InputError
from beit.launch import launch
from beit.masking import BlockwiseMaskGenerator
from beit.storage import save_checkpoint
from beit.targets import VISUAL_TOKENS, PixelTarget, TokenTarget
from beit.tasks.pretraining import (
    MaskedPrediction,
    PretrainingConfig,
    build_mask_generator,
    build_model,
    describe_masks,
    evaluate,
    initialize_from,
    main,
    meaning_of,
    with_patch_index,
)
from beit.tokenizers.base import load_tokenizer
from beit.tokenizers.dvae import DiscreteVAE, save_dvae
from beit.training.meaning import compare
from beit.training.precision import Precision
from beit.visualization.reconstructions import reconstruction_picture, spread_samples
from beit.zoo import create_model

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
        (logits,), tokens = objective.predict(model.eval(), with_patch_index(sample))
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
    "mismatched grids": ({"--second_input_size": 64}, ["64×64", "4×4", "second_input_size to 32"]),
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
    "a learning rate that is none": ({"--lr": "nan"}, ["--lr: cannot use 'nan': expected a finite number"]),
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


def test_a_run_starts_from_a_vit_with_its_mask_token(good_flags, tmp_path):
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    vit = timm.create_model("vit_small_patch14_dinov2", img_size=32, patch_size=8, **sizes).state_dict()
    save_checkpoint(tmp_path / "vit.pth", {**vit, "mask_token": torch.full((1, 32), 2.0)})
    assert call({**good_flags, "--init_from": tmp_path / "vit.pth", "--lr": 0, "--min_lr": 0, "--epochs": 1}) == 0
    weights = torch.load(good_flags["--output_dir"] / "checkpoint-0.pth", weights_only=True)["model"]
    assert torch.equal(weights["pos_embed"], vit["pos_embed"])
    assert torch.equal(weights["blocks.1.gamma_2"], vit["blocks.1.ls2.gamma"])
    assert torch.equal(weights["mask_token"], torch.full((1, 1, 32), 2.0))
    assert not [name for name in weights if "relative" in name]


def test_a_run_learns_from_a_teacher_and_goes_on_with_no_other(good_flags, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nobody is asked for timm's weights
    for name, seed in (("teacher", 0), ("other", 1)):
        torch.manual_seed(seed)
        model = create_model("beit_tiny_patch16_224", img_size=32, num_classes=0, **TINY)
        save_checkpoint(tmp_path / f"{name}.pth", {"model": model.state_dict(), "args": {"model_kwargs": TINY}})
    flags = {name: value for name, value in good_flags.items() if "discrete" not in name and "second" not in name}
    flags |= {"--target": "features", "--teacher": tmp_path / "teacher.pth"}
    with caplog.at_level(logging.INFO):
        assert call(flags) == 0
    assert "predicting features of a teacher: 32 numbers per patch" in caplog.text
    assert "no effect" not in caplog.text
    (entry,) = [json.loads(line) for line in (flags["--output_dir"] / "log.txt").read_text().splitlines()]
    assert 0 < entry["train_loss"] < 1
    assert call({**flags, "--teacher": tmp_path / "other.pth", "--epochs": 2}) == 2
    assert "was trained with another teacher: resume with the same --teacher" in capsys.readouterr().err
    assert call({**flags, "--epochs": 2}) == 0
    for wrong, message in (("", "--teacher is missing"), ("resnet10t", "cannot teach|cannot be opened")):
        given = {**flags, "--output_dir": tmp_path / "none", "--teacher": wrong}
        assert call({flag: value for flag, value in given.items() if value != ""}) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert re.search(message, line)


def test_a_run_is_watched_for_the_variety_of_its_tokens(good_flags, tmp_path):
    images = sorted(good_flags["--data_path"].iterdir())
    for number, path in enumerate(images):
        folder = tmp_path / "classes" / "ab"[number // 10]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).symlink_to(path)
    held_out = {"--probe_data_path": tmp_path / "classes", "--eval_data_path": tmp_path / "classes"}
    assert call({**good_flags, **held_out}) == 0
    (entry,) = [json.loads(line) for line in (good_flags["--output_dir"] / "log.txt").read_text().splitlines()]
    assert entry["test_codebook_perplexity"] == pytest.approx(math.exp(entry["test_unigram_entropy"]))
    for name in ("codebook_perplexity", "token_entropy"):
        assert entry[f"test_probe_{name}"] == entry[f"test_{name}"]
    assert 0 <= entry["test_token_entropy"] <= math.log(16)


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


@pytest.mark.parametrize(
    ("grid", "options", "line", "warns"),
    [
        (14, {}, " of 196 patches on average (38 %)", False),
        (28, {}, " of 784 patches on average (9 %)", True),  # the default, with 8-pixel patches: 10 %
        (8, {"mask_strategy": "random", "num_mask_patches": 64}, "masks: 64.0 of 64 patches on average (100 %)", True),
        (8, {"mask_strategy": "random", "num_mask_patches": 30}, "masks: 30.0 of 64 patches on average (47 %)", False),
        (14, {"max_mask_patches_per_block": 5}, " of 196 patches on average (5 %)", True),
        ((2, 50), {"num_mask_patches": 40, "min_mask_patches_per_block": 2}, " of 100 patches on average (", True),
    ],
)
def test_the_start_says_how_much_is_masked_and_warns_of_too_much_or_too_little(grid, options, line, warns, caplog):
    masks = build_mask_generator(
        dataclasses.replace(parse(), **options), (grid, grid) if isinstance(grid, int) else grid
    )
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    said = describe_masks(masks)
    assert line in said
    mean = float(said.split()[1])
    assert abs(mean - np.mean([masks(np.random.default_rng(i)).sum() for i in range(200)])) < 1
    assert said == describe_masks(masks)
    assert bool(caplog.records) is warns
    assert all("usual are 20 to 60 %" in record.getMessage() for record in caplog.records)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_run_says_its_masks(good_flags, caplog):
    with caplog.at_level(logging.INFO):
        call(good_flags)
    assert re.search(r"masks: \d\.\d of 16 patches on average \(\d\d %\)", caplog.text)
    assert caplog.text.count("20 images in 1 folder") == 1


class TestOtherTargets:
    """Runs that predict pixels, or all patches, or hide patches one by one; and what each leaves behind."""

    @pytest.fixture
    def pixel_flags(self, good_flags):
        tokenizer = ("--discrete_vae_weight_path", "--discrete_vae_type", "--second_input_size")
        return {**{f: v for f, v in good_flags.items() if f not in tokenizer}, "--target": "pixels"}

    @staticmethod
    def checkpoint(flags):
        return torch.load(flags["--output_dir"] / "checkpoint-0.pth", weights_only=True)

    @staticmethod
    def error_of(flags, capsys):
        assert call(flags) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    def test_pixels_need_no_tokenizer_and_no_second_view(self, pixel_flags, setting, monkeypatch):
        folder, *_ = setting
        views = []
        original = MaskedPrediction.__call__
        monkeypatch.setattr(
            MaskedPrediction, "__call__", lambda self, *a: views.append(set(a[1])) or original(self, *a)
        )
        assert call({**pixel_flags, "--eval_data_path": folder / "images"}) == 0
        assert views == [{"image", "mask", "patch_index"}] * 2
        entry = json.loads((pixel_flags["--output_dir"] / "log.txt").read_text())
        assert {"train_loss", "train_r2", "test_loss", "test_r2"} <= entry.keys()
        assert not [name for name in entry if "mlm" in name or "frequent" in name]
        state = self.checkpoint(pixel_flags)
        assert state["target"] == "pixels normalised per patch"
        assert state["model"]["lm_head.weight"].shape == (8 * 8 * 3, 32)

    def test_a_checkpoint_of_tokens_says_so(self, good_flags):
        assert call(good_flags) == 0
        assert self.checkpoint(good_flags)["target"] == "visual tokens"

    def test_flags_that_the_target_does_not_read_are_said_once(self, good_flags, pixel_flags, caplog):
        with caplog.at_level(logging.WARNING):
            call({**pixel_flags, "--second_input_size": 64, "--discrete_vae_type": "customized"})
        assert caplog.text.count("no effect") == 1
        assert "no effect with --target pixels: --discrete_vae_type, --second_input_size" in caplog.text
        caplog.clear()
        run = good_flags["--output_dir"]
        call(
            {
                **good_flags,
                "--mask_strategy": "random",
                "--no_pixel_norm": [],
                "--teacher": "no.pth",
                "--output_dir": run / "random",
            }
        )
        assert "no effect with --target tokens: --pixel_norm, --teacher" in caplog.text
        assert "no effect with --mask_strategy random: --min_mask_patches_per_block" in caplog.text
        caplog.clear()
        call({**good_flags, "--output_dir": run / "good"})
        assert "no effect" not in caplog.text

    @pytest.mark.parametrize("other", [{"--target": "tokens"}, {"--no_pixel_norm": []}], ids=["tokens", "raw pixels"])
    def test_a_run_goes_on_with_the_same_target_only(self, pixel_flags, good_flags, other, capsys):
        # The heads of normalised and raw pixels have the same shapes, so shapes alone would let this pass.
        assert call(pixel_flags) == 0
        tokenizer = ("--discrete_vae_weight_path", "--discrete_vae_type", "--second_input_size")
        flags = {**pixel_flags, **{name: good_flags[name] for name in tokenizer}, **other, "--epochs": 2}
        line = self.error_of(flags, capsys)
        assert "another prediction target (pixels normalised per patch there" in line
        assert "--init_from" in line
        assert call({**pixel_flags, "--epochs": 2}) == 0

    def test_weights_of_another_target_come_without_their_head(self, pixel_flags, tmp_path, caplog):
        assert call(pixel_flags) == 0
        source = str(pixel_flags["--output_dir"] / "checkpoint-0.pth")
        config = parse("--input_size", 32, "--model_kwargs", *overrides(TINY))
        theirs = self.checkpoint(pixel_flags)["model"]
        for name, anew in (("pixels normalised per patch", False), ("raw pixels", True)):
            model = build_model(config, 192)  # as many outputs as theirs
            with caplog.at_level(logging.INFO):
                initialize_from(model, source, {"target": name})
            assert torch.equal(model.blocks[1].mlp.fc1.weight, theirs["blocks.1.mlp.fc1.weight"])
            assert torch.equal(model.lm_head.weight, theirs["lm_head.weight"]) is not anew
        assert "another prediction target (pixels normalised per patch there, raw pixels here)" in caplog.text

    def test_fine_tuning_says_what_the_weights_learned_to_predict(self, pixel_flags):
        assert call(pixel_flags) == 0
        source = str(pixel_flags["--output_dir"] / "checkpoint-0.pth")
        sizes = {"img_size": 32, "num_classes": 3, **TINY}
        classifier = create_model("beit_tiny_patch16_224", **sizes)
        report = load_pretrained(classifier, source)
        assert "dropped (of pre-training on pixels normalised per patch): " in report.summary()
        assert classifier.metadata["target"] == "pixels normalised per patch"
        assert torch.equal(
            classifier.blocks[0].attn.qkv.weight, self.checkpoint(pixel_flags)["model"]["blocks.0.attn.qkv.weight"]
        )

    def test_raw_pixels_and_all_patches_train_and_stop_and_go_on(self, pixel_flags, tmp_path):
        flags = {**pixel_flags, "--no_pixel_norm": [], "--predict": "all", "--mask_strategy": "random", "--epochs": 2}
        assert call({**flags, "--output_dir": tmp_path / "whole"}) == 0
        assert call({**flags, "--save_ckpt_freq": 1}) == 0
        (tmp_path / "run" / "checkpoint-1.pth").unlink()
        assert call(flags) == 0
        one, two = (torch.load(tmp_path / name / "checkpoint-1.pth", weights_only=True) for name in ("whole", "run"))
        assert two["target"] == "raw pixels"
        assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())

    def test_the_evaluation_of_pixels_equals_a_naive_one(self, setting):
        folder, *_ = setting
        target = PixelTarget((8, 8), *HALF)
        objective = MaskedPrediction(target, *HALF)
        model = build_model(parse("--input_size", 32, "--model_kwargs", *overrides(TINY)), target.output_size).eval()
        transform = MaskedImageModelingEvalTransform(32, None, mask_generator=BlockwiseMaskGenerator((4, 4), 6, 2))
        dataset = ImageDataset(index_images(folder / "images"), transform, seed=0)
        results = evaluate(
            model, objective, EpochLoader(dataset, 6, shuffle=False, drop_last=False), Precision(torch.float32, CPU)
        )
        outputs, truth = [], []
        for index in range(20):
            sample = {name: value[None] for name, value in dataset[(0, index)].items() if torch.is_tensor(value)}
            with torch.no_grad():
                (output,), targets = objective.predict(model, with_patch_index(sample))
            outputs += output.numpy().tolist()
            truth += targets.numpy().tolist()
        errors = (np.array(outputs) - np.array(truth)) ** 2
        assert results["loss"] == pytest.approx(errors.mean(), rel=1e-5)
        assert results["r2"] == pytest.approx(1 - errors.mean() / np.array(truth).var(), abs=1e-4)

    def test_random_masks_hide_exactly_as_many_patches(self):
        config = parse("--mask_strategy", "random", "--num_mask_patches", 75)
        generator, rng = build_mask_generator(config, (14, 14)), np.random.default_rng(0)
        masks = np.stack([generator(rng) for _ in range(400)])
        assert (masks.sum((1, 2)) == 75).all()
        # Neighbours are hidden together as often as any two patches, 75/196 * 74/195 = 0.1452; in blocks more often.
        assert (masks[:, 1:] & masks[:, :-1]).mean() == pytest.approx(0.1452, abs=0.005)
        blocks = build_mask_generator(parse(), (14, 14))
        assert np.mean([(m[1:] & m[:-1]).mean() for m in (blocks(rng) for _ in range(100))]) > 0.25


ABLATIONS = {
    "no shared bias": ({"--disable_rel_pos_bias": []}, lambda names: "rel_pos_bias" not in " ".join(names)),
    "no LayerScale": ({"--layer_scale_init_value": 0}, lambda names: "gamma" not in " ".join(names)),
    "no stochastic depth": ({"--drop_path": 0}, lambda names: len(names) == 39),
    "positions": ({"--abs_pos_emb": []}, lambda names: "pos_embed" in names),
    "all": ({}, lambda names: len(names) == 39 and "blocks.0.gamma_1" in names and "pos_embed" not in names),
}


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_parts_of_the_architecture_can_be_left_out(ablation, good_flags):
    changes, as_expected = ABLATIONS[ablation]
    assert call({**good_flags, **changes}) == 0
    state = torch.load(good_flags["--output_dir"] / "checkpoint-0.pth", weights_only=True)
    assert as_expected(list(state["model"])), list(state["model"])


def test_without_stochastic_depth_the_loss_of_training_is_that_of_evaluation(setting):
    _, tokenizer, _ = setting
    sizes = ("--input_size", 32, "--model_kwargs", *overrides(TINY))
    losses = {}
    for rate in (0, 0.9):
        torch.manual_seed(0)
        model = build_model(parse("--drop_path", rate, *sizes), 16)
        objective = MaskedPrediction(TokenTarget(tokenizer), *HALF)
        losses[rate] = [objective(model.train(mode), random_batch(), 0)[0].item() for mode in (True, False)]
    assert losses[0][0] == losses[0][1]
    assert losses[0.9][0] != losses[0.9][1]


class TestImageLog:
    @pytest.mark.slow
    @pytest.mark.parametrize("target", ["tokens", "pixels"])
    def test_the_run_is_the_same_with_and_without_images(self, good_flags, setting, tmp_path, target):
        # Whatever drawing does, to generators, to the model's mode or to samples, training must not see it.
        folder, *_ = setting
        flags = {**good_flags, "--target": target, "--epochs": 2, "--drop_path": 0.5}
        assert call({**flags, "--output_dir": tmp_path / "without", "--log_dir": tmp_path / "without/tb"}) == 0
        logged = {"--output_dir": tmp_path / "with", "--log_dir": tmp_path / "with/tb", "--log_images": 3}
        assert call({**flags, **logged, "--eval_data_path": folder / "images"}) == 0
        one, two = (torch.load(tmp_path / name / "checkpoint-1.pth", weights_only=True) for name in ("without", "with"))
        assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
        assert one["averages"] == two["averages"]
        pictures = images_in(tmp_path / "with/tb")
        assert [step for step, _ in pictures] == [0, 1]
        columns = 5 if target == "tokens" else 3
        assert {picture.size for _, picture in pictures} == {(columns * 34 + 2, 3 * 34 + 2)}  # 32 pixels and the gaps
        assert images_in(tmp_path / "without/tb") == []

    def test_the_columns_are_image_masked_image_and_prediction(self, setting):
        folder, *_ = setting
        target = PixelTarget((8, 8), *HALF)
        objective = MaskedPrediction(target, *HALF)
        model = build_model(parse("--input_size", 32, "--model_kwargs", *overrides(TINY)), target.output_size)
        masks = BlockwiseMaskGenerator((4, 4), 6, 2)
        dataset = ImageDataset(
            index_images(folder / "images"), MaskedImageModelingEvalTransform(32, None, mask_generator=masks), seed=0
        )
        samples = spread_samples(dataset, 5)
        assert torch.equal(samples["image"][1], dataset[0, 4]["image"])  # every fourth of 20
        picture = reconstruction_picture(model.train(), objective.outputs_of_all, target, samples)
        assert model.training
        tiles = [
            [picture[:, 2 + 34 * row :, 2 + 34 * column :][:, :32, :32] for column in range(3)] for row in range(5)
        ]
        for row, (image, masked, predicted) in enumerate(tiles):
            hidden = samples["mask"][row].repeat_interleave(8, 0).repeat_interleave(8, 1)
            torch.testing.assert_close(image, samples["image"][row] / 255)
            assert torch.equal(masked[:, ~hidden], image[:, ~hidden])
            assert (masked[:, hidden] == 0.5).all()
            torch.testing.assert_close(predicted[:, ~hidden], image[:, ~hidden])
            assert not torch.allclose(predicted[:, hidden], image[:, hidden])

    def test_what_cannot_be_drawn_is_said_at_the_start(self, good_flags, tmp_path, capsys, caplog):
        assert call({**good_flags, "--log_images": -1, "--log_dir": tmp_path / "tb"}) == 2
        assert "--log_images -1" in capsys.readouterr().err
        with caplog.at_level(logging.WARNING):
            assert call({**good_flags, "--log_images": 2}) == 0
        assert "--log_images has no effect without --log_dir" in caplog.text


def images_in(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    if "reconstructions" not in events.Tags()["images"]:
        return []
    pictures = events.Images("reconstructions")
    return [(event.step, Image.open(io.BytesIO(event.encoded_image_string))) for event in pictures]


def test_a_checkpoint_of_another_tokenizer_of_the_same_size_is_refused():
    # Breaks if only the size of the vocabulary is compared: the same number would mean another token.
    class Tokenizer:
        vocab_size = 8

        def __init__(self, name):
            self.fingerprint = lambda: name

    recorded = meaning_of(TokenTarget(Tokenizer("a")))
    assert compare(recorded, recorded, "a.pth") == frozenset()
    with pytest.raises(InputError, match="another tokenizer"):
        compare(recorded, meaning_of(TokenTarget(Tokenizer("b"))), "a.pth")


def test_a_head_that_predicts_other_tokens_is_not_started_from(setting, tmp_path, caplog):
    # Breaks if the head is kept because its size fits: the same number would mean another token.
    _, _, model = setting
    save_checkpoint(tmp_path / "a.pth", {"model": model.state_dict(), "tokenizer": "a", "target": VISUAL_TOKENS})
    config = parse("--model", "beit_tiny_patch16_224_8k_vocab", "--input_size", 32, "--model_kwargs", *overrides(TINY))
    for tokenizer, kept in (("a", True), ("b", False)):
        other = build_model(config, 16)
        with caplog.at_level(logging.INFO):
            initialize_from(other, str(tmp_path / "a.pth"), {"target": VISUAL_TOKENS, "tokenizer": tokenizer})
        assert torch.equal(other.lm_head.weight, model.lm_head.weight) == kept
    assert "learned another tokenizer (a there, b here): the head is initialised from scratch" in caplog.text
    save_checkpoint(tmp_path / "official.pth", {"model": model.state_dict()})
    initialize_from(build_model(config, 16), str(tmp_path / "official.pth"), {"tokenizer": "a"})
    assert "official.pth does not record its tokenizer" in caplog.messages[-1]
