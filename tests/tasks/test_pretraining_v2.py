"""BEiT v2's pre-training: the same job with other defaults, two losses, one view; and what it says about mistakes."""

import dataclasses
import json
import logging
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from beit.commands.visualize import open_pretrained
from beit.config import read_command_line
from beit.data.datasets import ImageDataset, index_images
from beit.data.loaders import EpochLoader
from beit.errors import InputError
from beit.launch import launch
from beit.storage import save_checkpoint
from beit.targets import MaskedPrediction, TokenTarget, with_patch_index
from beit.tasks.pretraining import (
    build_model,
    build_tokenizer,
    evaluate,
    evaluation_transform,
    initialize_from,
    main,
    second_view_size,
)
from beit.tasks.settings import PretrainingConfig, PretrainingV2Config
from beit.tokenizers.base import load_tokenizer
from beit.tokenizers.dvae import DiscreteVAE, save_dvae
from beit.tokenizers.vqkd import VQKD
from beit.training.precision import Precision
from tests.tasks.test_pretraining import HALF, TINY, overrides, random_batch

# Of beit2/run_beitv2_pretraining.py: flag -> default. Those of the flags beside them are None: what the tokenizer has.
OFFICIAL_DEFAULTS = {
    **{"batch_size": 64, "epochs": 300, "save_ckpt_freq": 20, "tokenizer_weight": None},
    **{"model": "beit_base_patch16_224_8k_vocab", "rel_pos_bias": True, "abs_pos_emb": False},
    **{"layer_scale_init_value": 0.1, "num_mask_patches": 75, "max_mask_patches_per_block": None},
    **{"min_mask_patches_per_block": 16, "input_size": 224, "second_input_size": 224, "drop_path": 0.1},
    **{"head_layers": 2, "shared_lm_head": True, "opt": "adamw", "opt_eps": 1e-8, "clip_grad": None},
    **{"momentum": 0.9, "weight_decay": 0.05, "weight_decay_end": None, "lr": 5e-4, "warmup_lr": 1e-6, "min_lr": 1e-5},
    **{"warmup_epochs": 5, "warmup_steps": -1, "decoupling_aug": False, "color_jitter": 0.4},
    **{"train_interpolation": "bicubic", "second_interpolation": "lanczos", "min_crop_scale": 0.08},
    **{"data_path": "/datasets01/imagenet_full_size/061417/", "data_set": "image_folder"},
    **{"imagenet_default_mean_and_std": False, "output_dir": "", "log_dir": None, "device": "cuda", "seed": 0},
    **{"resume": "", "auto_resume": True, "start_epoch": 0, "num_workers": 10, "pin_mem": True, "world_size": 1},
    **{"local_rank": -1, "dist_on_itp": False, "dist_url": "env://"},
}
OURS = {
    "early_layers": None,
    "codebook_size": None,
    "codebook_dim": None,
    "opt_betas": (0.9, 0.999),
}  # in effect the same
ALIASES = {
    "tokenizer_weight": "discrete_vae_weight_path",
    "tokenizer_model": "discrete_vae_type",
    "min_crop_scale": "min_crop",
}
# The command of PRETRAINING.md, after the launcher and the script.
OFFICIAL = """
    --data_set image_folder --data_path /path/to/imagenet-1k/train --output_dir /path/to/save/your_model
    --log_dir /path/to/save/your_model --model beit_base_patch16_224_8k_vocab_cls_pt --shared_lm_head True
    --early_layers 9 --head_layers 2 --num_mask_patches 75 --second_input_size 224 --second_interpolation bicubic
    --min_crop_scale 0.2 --tokenizer_model vqkd_encoder_base_decoder_3x768x12_clip
    --tokenizer_weight https://github.com/addf400/files/releases/download/BEiT-v2/vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth
    --batch_size 128 --lr 1.5e-3 --warmup_epochs 10 --clip_grad 3.0 --drop_path 0.1 --layer_scale_init_value 0.1
    --imagenet_default_mean_and_std --opt_betas 0.9 0.999 --opt_eps 1e-8 --epochs 1600 --save_ckpt_freq 20
"""


def parse(*argv) -> PretrainingV2Config:
    return read_command_line(PretrainingV2Config, [str(argument) for argument in argv], "prog", "")


def test_every_official_flag_parses_with_its_default():
    defaults = vars(parse())
    ours = {flag: defaults[ALIASES.get(flag, flag)] for flag in (*OFFICIAL_DEFAULTS, *OURS)}
    assert ours == OFFICIAL_DEFAULTS | OURS
    for flag, default in OFFICIAL_DEFAULTS.items():
        if not isinstance(default, bool):
            given = parse(f"--{flag}", 3 if default in (None, "") else default)
            assert vars(given)[ALIASES.get(flag, flag)] in (default, 3, "3")


def test_the_first_version_keeps_its_defaults():
    one, two = vars(PretrainingConfig()), vars(PretrainingV2Config())
    changed = {name: (one[name], two[name]) for name in one if one[name] != two[name]}
    assert changed == {
        "mask_strategy": ("block", "block_exact"),
        "discrete_vae_type": ("dall-e", "vqkd"),
        "second_input_size": (112, 224),
    }


def test_the_official_command_is_read_word_for_word():
    config = parse(*shlex.split(OFFICIAL))
    assert (config.early_layers, config.head_layers, config.shared_lm_head) == (9, 2, True)
    assert (config.discrete_vae_type, config.min_crop) == ("vqkd_encoder_base_decoder_3x768x12_clip", 0.2)
    assert config.mask_strategy == "block_exact"
    with torch.device("meta"):
        model = build_model(config, 8192)
    assert sum(parameter.numel() for parameter in model.parameters()) == 106_143_056
    assert second_view_size(config, TokenTarget) is None  # one resize: both views have the same pixels


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """20 images and a random tokenizer of 16 tokens, each of 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("setting")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(20):
        pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 48)).save(folder / "images" / f"{number}.png")
    torch.manual_seed(0)
    save_dvae(folder / "dvae", DiscreteVAE(image_size=32, num_tokens=16, codebook_dim=8, num_layers=3, hidden_dim=8))
    return folder


@pytest.fixture
def flags(setting, tmp_path):
    return {
        "--data_path": setting / "images",
        "--tokenizer_weight": setting / "dvae",
        "--tokenizer_model": "customized",
        "--model": "beit_base_patch16_224_8k_vocab_cls_pt",
        "--model_kwargs": overrides(TINY),
        "--early_layers": 1,
        "--input_size": 32,
        "--second_input_size": 32,
        "--second_interpolation": "bicubic",
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
    return launch(PretrainingV2Config, main, "", argv, "run_beitv2_pretraining.py")


def model_of(**options):
    options = {"early_layers": 1, **options}
    argv = [word for name, value in options.items() for word in (f"--{name}", value)]
    kwargs = ("--input_size", 32, "--model_kwargs", *overrides(TINY))
    return build_model(parse("--model", "beit_base_patch16_224_8k_vocab_cls_pt", *argv, *kwargs), 16)


@pytest.fixture
def tokenizer(setting):
    return load_tokenizer(setting / "dvae", "customized")


@pytest.mark.parametrize("shared", [True, False])
def test_the_loss_is_the_sum_of_both_over_masked_patches(tokenizer, shared):
    batch, model = random_batch(), model_of(shared_lm_head=shared).eval()
    loss, metrics = MaskedPrediction(TokenTarget(tokenizer), *HALF)(model, batch, 0)
    logits = model((batch["image"] / 255 - 0.5) / 0.5, batch["mask"], return_all_tokens=True)
    tokens = tokenizer.encode(batch["token_image"] / 255)[batch["mask"]]
    parts = [each.view(3, 4, 4, -1)[batch["mask"]] for each in logits]
    for number, part in enumerate(parts, 1):
        torch.testing.assert_close(metrics[f"loss_{number}"], F.cross_entropy(part, tokens))
        torch.testing.assert_close(metrics[f"mlm_acc_{number}"], (part.argmax(1) == tokens).float().mean())
    torch.testing.assert_close(loss, metrics["loss_1"] + metrics["loss_2"])
    assert list(metrics) == ["loss_1", "mlm_acc_1", "loss_2", "mlm_acc_2"]


def test_one_view_gives_the_tokens_and_the_masks_of_two(setting, tokenizer):
    # Breaks if a view is left out that is not the same, or leaving it out changes what the sample draws.
    shared = {"data_path": str(setting), "input_size": 32, "num_mask_patches": 6, "min_mask_patches_per_block": 2}
    target = TokenTarget(tokenizer)
    same = PretrainingV2Config(**shared, second_input_size=32, second_interpolation="bicubic")
    for other in ({"second_input_size": 64}, {"second_interpolation": "lanczos"}, {"train_interpolation": "random"}):
        assert second_view_size(PretrainingV2Config(**{**vars(same), **other}), target) is not None
    both = {"train_interpolation": "random", "second_interpolation": "random"}
    assert second_view_size(PretrainingV2Config(**{**vars(same), **both}), target) is not None
    index = index_images(setting / "images")
    masks = lambda _rng: np.eye(4, dtype=bool)  # noqa: E731
    one, two = (
        ImageDataset(index, evaluation_transform(config, target, masks), 0)[(0, 3)]
        for config in (same, PretrainingV2Config(**{**vars(same), "second_interpolation": "lanczos"}))
    )
    assert {"image", "mask"} <= one.keys()
    assert "token_image" not in one
    assert torch.equal(one["image"], two["image"])
    batch = with_patch_index({name: one[name][None] for name in ("image", "mask")})
    assert torch.equal(
        target.compute(batch, batch["patch_index"]), tokenizer.encode(one["image"][None] / 255)[0].diag()
    )


def test_evaluation_adds_up_both_losses(setting, tokenizer):
    model, target = model_of().eval(), TokenTarget(tokenizer)
    objective = MaskedPrediction(target, *HALF)
    config = PretrainingV2Config(input_size=32, second_input_size=32, second_interpolation="bicubic")
    masks = lambda rng: np.arange(16).reshape(4, 4) < rng.integers(1, 9)  # noqa: E731
    dataset = ImageDataset(index_images(setting / "images"), evaluation_transform(config, target, masks), seed=0)
    results = evaluate(
        model,
        objective,
        EpochLoader(dataset, 6, shuffle=False, drop_last=False),
        Precision(torch.float32, torch.device("cpu")),
    )
    losses, right = [[], []], [[], []]
    for index in range(20):
        sample = {name: value[None] for name, value in dataset[(0, index)].items() if torch.is_tensor(value)}
        outputs, tokens = objective.predict(model, with_patch_index(sample))
        for number, logits in enumerate(outputs):
            losses[number] += F.cross_entropy(logits, tokens, reduction="none").tolist()
            right[number] += (logits.argmax(1) == tokens).tolist()
    for number in range(2):
        assert results[f"loss_{number + 1}"] == pytest.approx(np.mean(losses[number]), rel=1e-5)
        assert results[f"mlm_acc_{number + 1}"] == pytest.approx(np.mean(right[number]))
    assert results["loss"] == pytest.approx(results["loss_1"] + results["loss_2"])


def test_a_run_logs_both_losses_and_goes_on_with_the_same_bits(flags, setting, tmp_path):
    more = {"--epochs": 2, "--eval_data_path": setting / "images", "--save_ckpt_freq": 1, "--drop_path": 0.1}
    whole = {**flags, **more, "--output_dir": tmp_path / "whole", "--log_dir": tmp_path / "tb", "--log_images": 2}
    assert call(whole) == 0
    entry = json.loads((tmp_path / "whole" / "log.txt").read_text().splitlines()[0])
    names = (
        "loss",
        "loss_1",
        "loss_2",
        "mlm_acc_1",
        "mlm_acc_2",
        "loss_scale",
        "lr",
        "min_lr",
        "weight_decay",
        "grad_norm",
    )
    assert {f"train_{name}" for name in names} <= entry.keys()
    assert {f"test_{name}" for name in names[:5]} <= entry.keys()
    assert entry["train_loss"] == pytest.approx(entry["train_loss_1"] + entry["train_loss_2"], rel=1e-5)
    assert "train_mlm_acc" not in entry
    assert call({**flags, **more}) == 0
    (tmp_path / "run" / "checkpoint-1.pth").unlink()
    (tmp_path / "run" / "checkpoint-last.pth").unlink(missing_ok=True)
    assert call({**flags, **more}) == 0
    one, two = (torch.load(tmp_path / name / "checkpoint-1.pth", weights_only=True) for name in ("whole", "run"))
    assert one["model"].keys() == two["model"].keys() >= {"cls_pt_layers.1.mlp.fc2.weight"}
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    _, model, _ = open_pretrained(tmp_path / "run" / "checkpoint-1.pth", "", torch.device("cpu"))  # to be drawn
    assert torch.equal(model.cls_pt_layers[1].mlp.fc2.weight, two["model"]["cls_pt_layers.1.mlp.fc2.weight"])


def test_weights_to_start_from_keep_both_heads_for_the_same_tokens_only(tmp_path):
    source = model_of(shared_lm_head=False)
    save_checkpoint(tmp_path / "a.pth", {"model": source.state_dict(), "target": "visual tokens", "tokenizer": "one"})
    for tokenizer in ("one", "another"):
        model = model_of(shared_lm_head=False)
        initialize_from(model, str(tmp_path / "a.pth"), {"target": "visual tokens", "tokenizer": tokenizer})
        assert torch.equal(model.cls_pt_layers[1].mlp.fc2.weight, source.cls_pt_layers[1].mlp.fc2.weight)
        for head in (model.lm_head, model.cls_pt_lm_head):
            own = source.lm_head if head is model.lm_head else source.cls_pt_lm_head
            assert torch.equal(head.weight, own.weight) is (tokenizer == "one")


@pytest.fixture(scope="module")
def vqkd(setting):
    """A random VQ-KD of 16 codes, each of 8 x 8 pixels, as an official file."""
    torch.manual_seed(0)
    model = VQKD(codebook_size=16, codebook_dim=4, img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    save_checkpoint(setting / "vqkd.pth", {"model": model.state_dict(), "num_heads": 2})
    return setting / "vqkd.pth"


@pytest.mark.slow
def test_vqkd_is_the_tokenizer_unless_another_is_named(flags, vqkd):
    with_vqkd = {**flags, "--tokenizer_weight": vqkd, "--codebook_size": 16, "--codebook_dim": 4}
    for kind in ("vqkd", "vqkd_encoder_base_decoder_3x768x12_clip"):
        assert call({**with_vqkd, "--tokenizer_model": kind, "--output_dir": flags["--output_dir"] / kind}) == 0
    del with_vqkd["--tokenizer_model"]
    assert call(with_vqkd) == 0
    state = torch.load(flags["--output_dir"] / "checkpoint-0.pth", weights_only=True)
    assert state["tokenizer"] == load_tokenizer(vqkd).fingerprint()


def test_the_official_address_is_downloaded(monkeypatch):
    asked = []
    monkeypatch.setattr("beit.tokenizers.vqkd.download", lambda url, *_args, **_options: asked.append(url) or Path())
    config = parse(*shlex.split(OFFICIAL), "--device", "cpu")
    cpu = torch.device("cpu")
    with pytest.raises(InputError):
        build_tokenizer(config, cpu)
    assert asked == [config.discrete_vae_weight_path]
    with pytest.raises(InputError, match="there is no released tokenizer vqkd_mine: give a file, or one of vqkd_"):
        build_tokenizer(dataclasses.replace(config, discrete_vae_weight_path="https://x.org/vqkd_mine-1.pth"), cpu)


MISTAKES = {
    "VQ-KD of another dimension": (
        {"--tokenizer_weight": "VQKD", "--codebook_dim": 32},
        ["--codebook_dim 32", "has 4"],
    ),
    "VQ-KD where the first version's was named": (
        {"--tokenizer_weight": "VQKD", "--tokenizer_model": "dall-e"},
        ["vqkd.pth"],
    ),
    "the first version's where VQ-KD was named": ({"--tokenizer_model": "vqkd"}, ["dvae is", "customized"]),
    "another codebook": ({"--codebook_size": 8192}, ["--codebook_size 8192", "has 16"]),
    "a tokenizer of the first version": ({"--second_input_size": 64}, ["64×64", "second_input_size to 32"]),
    "no such block": ({"--early_layers": 3}, ["early_layers 3", "1 to 2"]),
    "fewer than no further blocks": ({"--head_layers": -1}, ["--head_layers -1"]),
    "a classifier": ({"--model": "beit_base_patch16_224"}, ["classifier", "beit_base_patch16_224_8k_vocab"]),
    "no tokenizer": ({"--tokenizer_weight": "nowhere"}, ["nowhere"]),
    "none named": ({"--tokenizer_weight": ""}, ["(--tokenizer_weight) is missing", "folder. run_vqkd_training.py"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_status_2(mistake, flags, vqkd, capsys):
    changes, parts = MISTAKES[mistake]
    changed = {**flags, **changes}
    if changed["--tokenizer_weight"] == "VQKD":
        changed = {**changed, "--tokenizer_weight": vqkd, "--tokenizer_model": changes.get("--tokenizer_model", "vqkd")}
    assert call(changed) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(part in errors[0] for part in parts), errors[0]


def test_flags_of_further_blocks_are_said_to_have_no_effect_on_a_model_without(flags, caplog):
    with caplog.at_level(logging.WARNING):
        assert call({**flags, "--model": "beit_base_patch16_224_8k_vocab", "--shared_lm_head": False}) == 0
    assert "no effect with --model beit_base_patch16_224_8k_vocab: --early_layers, --shared_lm_head" in caplog.text
    assert "_cls_pt" in caplog.text
