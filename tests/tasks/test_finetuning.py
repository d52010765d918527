"""The fine-tuning job: flags, objective, evaluation, best checkpoints, and what it says about mistakes."""

import json
import logging
import math
import re
import shutil
from importlib import resources
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo
from transformers import ViTConfig, ViTModel

from beit.config import read_command_line
from beit.data.classification import CIFAR, ClassificationEvalTransform, find_images, labelled_dataset
from beit.data.loaders import EpochLoader
from beit.errors import InputError
from beit.launch import launch
from beit.modeling import VisionTransformer, VisionTransformerForMaskedImageModeling
from beit.storage import load_checkpoint, save_checkpoint
from beit.tasks.base import find_labelled
from beit.tasks.finetuning import (
    Classification,
    Finetuning,
    build_model,
    evaluate,
    evaluate_checkpoint,
    main,
)
from beit.tasks.settings import FinetuningConfig
from beit.training.loop import seed_step
from beit.training.precision import Precision
from beit.zoo import create_model, get_model
from tests.data.test_classification import write_cifar

CPU = torch.device("cpu")
HALF = ((0.5,) * 3, (0.5,) * 3)
TINY = ("patch_size=8", "embed_dim=32", "depth=2", "num_heads=2")
MODEL = ("--model", "beit_tiny_patch16_224", "--model_kwargs", *TINY, "--input_size", 40)
PLAIN = ("--aa", "none", "--color_jitter", 0, "--reprob", 0, "--drop_path", 0)


def test_a_moving_average_that_is_too_slow_for_the_run_is_warned_of(caplog):
    for decay, warned in ((0.9999, True), (0.9, False)):
        task = Finetuning(FinetuningConfig(model_ema=True, model_ema_decay=decay, epochs=12))
        task.model, task.loader = torch.nn.Linear(1, 1), SimpleNamespace(batches_per_epoch=3)
        task.precision, task.class_names = Precision(torch.float32, CPU), ("a", "b")
        caplog.clear()
        assert len(list(task.summary())) == 2
        assert ("the average ends as 100 % weights of the start; for 36 steps try 0.7222" in caplog.text) is warned


def parse(*argv) -> FinetuningConfig:
    return read_command_line(FinetuningConfig, [str(argument) for argument in argv], "prog", "")


def test_every_official_flag_parses_with_its_default(golden):
    flags = json.loads((golden / "official_cli.json").read_text())["run_class_finetuning"]
    defaults = parse()
    assert len(flags) == 77
    for flag in flags:
        (spelling,) = flag["flags"]
        name = {"finetune": "init_from"}.get(flag["dest"], flag["dest"])
        default = getattr(defaults, name)
        assert (list(default) if isinstance(default, tuple) else default) == flag["default"], spelling
        if flag["kind"] == "Store":
            value = (
                flag["default"]
                if flag["default"] not in (None, "")
                else {"opt_betas": 0.5, "cutmix_minmax": 0.5}.get(name, 3)
            )
            values = value if isinstance(value, list) else [value]
            parsed = getattr(parse(spelling, *values), name)
            parsed = parsed[0] if isinstance(parsed, tuple) else parsed
            assert type(parsed)(value) == parsed
            for choice in flag["choices"] or ():
                assert getattr(parse(spelling, choice), name) == choice
        else:
            assert getattr(parse(spelling), name) is (flag["kind"] == "StoreTrue")


def photo(label, seed):
    """A noisy image whose colour tells its class."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 100, (6, 6, 3))
    pixels[..., label % 3] += 60 + 60 * (label // 3 % 2)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).resize((60, 48), Image.Resampling.BICUBIC)


def write_data(folder, classes, train=8, val=4):
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            (folder / split / f"class{label:02}").mkdir(parents=True)
            for number in range(count):
                image = photo(label, 1000 * label + 10 * number + (split == "val"))
                image.save(folder / split / f"class{label:02}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), classes=6)


@pytest.fixture
def good_flags(data, tmp_path):
    return {
        "--data_path": data,
        "--model": "beit_tiny_patch16_224",
        "--model_kwargs": list(TINY),
        "--input_size": 40,
        "--batch_size": 8,
        "--epochs": 2,
        "--warmup_epochs": 0,
        "--lr": 1e-3,
        "--num_workers": 0,
        "--device": "cpu",
        "--output_dir": tmp_path / "run",
    }


def call(flags, **changes):
    argv = []
    for flag, value in {**flags, **{f"--{name}": value for name, value in changes.items()}}.items():
        argv += [flag, *(map(str, value) if isinstance(value, list) else [] if value is True else [str(value)])]
    return launch(FinetuningConfig, main, "", argv, "run_class_finetuning.py")


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def task_of(config, classes=6) -> Finetuning:
    """A task as it is before training, without images and without a session."""
    task = Finetuning(config)
    task.class_names = tuple(f"class{label:02}" for label in range(classes))
    (task.mean, task.std), task.device = HALF, CPU
    task.model = build_model(config, classes)
    return task


# The objective


@pytest.mark.parametrize(
    ("smoothing", "expected"), [(0.0, "loss_ce"), (0.1, "loss_label_smoothing_0.1"), ("soft", "loss_soft_target")]
)
def test_losses_equal_the_reference(golden, smoothing, expected):
    stored = torch.load(golden / "cls_small.pt", weights_only=True)
    variant = stored["variants"]["meanpool_perlayer"]
    model = VisionTransformer(**variant["config"])
    model.load_state_dict(variant["state_dict"])
    batch = {"image": stored["input"], "label": stored["labels"]}  # floating point: normalised already
    mixup = (lambda images, _labels: (images, stored["soft_targets"])) if smoothing == "soft" else None
    objective = Classification(*HALF, smoothing=0.1 if mixup else smoothing, mixup=mixup)
    loss, metrics = objective(model.eval(), batch, 0)
    assert loss.item() == pytest.approx(variant[expected], rel=1e-5)
    if mixup is None:
        assert metrics["class_acc"] == (variant["logits"].argmax(1) == stored["labels"]).float().mean()
    else:
        assert metrics == {}


def random_batch(size=8, classes=6):
    torch.manual_seed(1)
    return {
        "image": torch.randint(0, 256, (size, 3, 40, 40), dtype=torch.uint8),
        "label": torch.arange(size) % classes,
    }


def test_bytes_are_normalised_and_normalised_images_are_taken_as_they_are():
    model = build_model(parse(*MODEL), 6).eval()
    batch = random_batch()
    normalised = {**batch, "image": (batch["image"] / 255 - 0.5) / 0.5}
    objective = Classification(*HALF)
    torch.testing.assert_close(objective(model, batch, 0)[0], objective(model, normalised, 0)[0])


@pytest.mark.parametrize("options", [("--mixup", 0.8), ("--cutmix", 1.0), ("--cutmix_minmax", 0.3, 0.6)])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixing_follows_from_the_seed_of_the_step(options, mode):
    # Breaks if mixup draws from a generator that the loop does not seed: a resumed run would mix differently.
    config = parse(*MODEL, *options, "--mixup_mode", mode)
    task = task_of(config)
    model, objective = task.model.eval(), task.build_objective()
    torch.nn.init.normal_(model.head.weight)
    losses = []
    for step in (3, 3, 4):
        seed_step(0, step, 0)
        losses.append(objective(model, random_batch(), step)[0].item())
    assert losses[0] == losses[1] != losses[2]


def test_mixed_targets_are_smoothed_and_add_up_to_one():
    objective = task_of(parse(*MODEL, "--mixup", 0.8, "--smoothing", 0.2)).build_objective()
    seed_step(0, 0, 0)
    _, targets = objective.mixup(torch.rand(8, 3, 4, 4), torch.arange(8) % 6)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert targets.min().item() == pytest.approx(0.2 / 6)


# The parts


def test_optimizer_groups_equal_the_reference(golden):
    stored = json.loads((golden / "optim_groups.json").read_text())
    size = ("patch_size=16", "embed_dim=48", "depth=3", "num_heads=4")
    flags = ("--input_size", 64, "--layer_decay", 0.65, "--weight_decay", 0.05, "--model_kwargs", *size)
    for case, more in (
        ("finetune_ld0.65_wd0.05", ()),
        ("finetune_ld0.65_wd0.05_disable_wd_relpos", ("--disable_weight_decay_on_rel_pos_bias",)),
    ):
        task = task_of(parse(*flags, *more), 10)
        names = {id(parameter): name for name, parameter in task.model.named_parameters()}
        ours = {
            names[id(parameter)]: (pytest.approx(group["lr_scale"]), group["weight_decay"])
            for group in task.build_optimizer().param_groups
            for parameter in group["params"]
        }
        expected = {
            name: (facts["lr_scale"], facts["weight_decay"]) for name, facts in stored[case]["per_param"].items()
        }
        assert ours == expected


def test_without_layer_decay_all_layers_learn_alike():
    groups = task_of(parse(*MODEL, "--layer_decay", 1.0)).build_optimizer().param_groups
    assert {group["lr_scale"] for group in groups} == {1.0}


def test_input_size_really_sets_the_model_s_size(caplog):
    with caplog.at_level(logging.INFO):
        model = build_model(
            parse("--model", "beit_tiny_patch16_224", "--input_size", "32x64", "--model_kwargs", *TINY), 6
        )
    assert model.img_size == (32, 64)
    assert model(torch.zeros(1, 3, 32, 64)).shape == (1, 6)
    assert "at 32 x 64 pixels" in caplog.text


def test_flags_of_the_model_reach_it():
    flags = ("--use_cls", "--drop", 0.1, "--attn_drop_rate", 0.2, "--drop_path", 0.3, "--layer_scale_init_value", 0)
    model = build_model(parse(*MODEL, *flags, "--disable_rel_pos_bias", "--abs_pos_emb", "--grad_checkpointing"), 6)
    assert model.fc_norm is None
    assert model.pos_embed is not None
    assert model.blocks[1].gamma_1 is None
    assert model.blocks[1].attn.relative_position_bias_table is None
    assert model.blocks[1].attn.attn_drop.p == 0.2
    assert model.blocks[1].attn.proj_drop.p == 0.1
    assert model.blocks[1].drop_path.drop_prob == pytest.approx(0.3)
    assert model.grad_checkpointing
    loud, quiet = (
        build_model(parse(*MODEL, "--init_scale", scale), 6).head.weight.std().item() for scale in (1.0, 0.001)
    )
    assert loud / quiet == pytest.approx(1000, rel=0.5)


def test_a_moving_average_in_host_memory():
    config = parse(*MODEL, "--model_ema", "--model_ema_force_cpu", "--model_ema_decay", 0.5)
    ema = task_of(config).build_average()
    assert next(ema.module.parameters()).device == CPU
    assert ema.decay == 0.5
    assert task_of(parse(*MODEL)).build_average() is None


# The evaluation


@pytest.mark.parametrize(("classes", "batch_size"), [(6, 5), (6, 24), (3, 5)])
def test_evaluation_equals_a_naive_count(data, classes, batch_size):
    # Breaks if the last, smaller batch weighs as much as the others, or images are left out.
    source = find_images("IMNET", str(data), train=False)
    dataset = labelled_dataset(source, ClassificationEvalTransform(40), 0)
    torch.manual_seed(3)
    model = build_model(parse(*MODEL, "--init_scale", 1.0), 6)
    torch.nn.init.normal_(model.head.weight)
    if classes == 3:
        model.reset_classifier(3)
        torch.nn.init.normal_(model.head.weight)
        dataset = [{**dataset[(0, i)], "label": dataset[(0, i)]["label"] % 3} for i in range(24)]
        dataset = type("Keyed", (list,), {"__getitem__": lambda self, key: dict(list.__getitem__(self, key[1]))})(
            dataset
        )
    results = evaluate(
        model, EpochLoader(dataset, batch_size, shuffle=False, drop_last=False), FP32, mean=HALF[0], std=HALF[1]
    )
    ranks, losses = [], []
    for index in range(24):
        sample = dataset[(0, index)]
        with torch.no_grad():
            logits = model.eval()((sample["image"][None] / 255 - 0.5) / 0.5)[0]
        ranks.append((logits > logits[sample["label"]]).sum().item())
        losses.append(F.cross_entropy(logits, sample["label"]).item())
    assert results["acc1"] == pytest.approx(100 * sum(rank < 1 for rank in ranks) / 24)
    assert results["acc5"] == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 24)
    assert results["loss"] == pytest.approx(sum(losses) / 24, rel=1e-5)
    if classes == 3:
        assert results["acc5"] == 100


FP32 = Precision(torch.float32, CPU)


def class_names(config):
    *_, names = find_labelled(config, config.nb_classes)
    return names


# Whole runs


def test_a_run_learns_and_eval_reports_what_training_reported(good_flags, caplog):
    # Breaks if evaluation depends on anything that training leaves behind.
    with caplog.at_level(logging.INFO):
        assert call(good_flags, epochs=6, model_ema=True, model_ema_decay=0.5, lr=5e-3, save_ckpt_freq=3) == 0
    folder = good_flags["--output_dir"]
    entries = log_of(folder)
    names = ("loss", "class_acc", "loss_scale", "lr", "min_lr", "weight_decay", "grad_norm")
    assert {f"train_{name}" for name in names} | {"epoch", "n_parameters"} <= entries[0].keys()
    assert {"test_loss", "test_acc1", "test_acc5", "test_ema_acc1"} <= entries[0].keys()
    assert max(entry["test_acc1"] for entry in entries) > 50  # chance is 17
    assert {path.name for path in folder.glob("*.pth")} == {
        "checkpoint-2.pth",
        "checkpoint-5.pth",
        "checkpoint-best.pth",
        "checkpoint-best-ema.pth",
        "checkpoint-last.pth",
    }
    # Every checkpoint, and every way to name it, gives the numbers of its epoch.
    best, best_ema = (max(entries, key=lambda entry, name=name: entry[name]) for name in ("test_acc1", "test_ema_acc1"))
    expected = {
        "checkpoint-5.pth": (entries[5], "test_"),
        "checkpoint-best.pth": (best, "test_"),
        "checkpoint-best-ema.pth": (best_ema, "test_ema_"),
    }
    flags = ("--data_path", good_flags["--data_path"], *MODEL, "--batch_size", 8, "--num_workers", 0, "--device", "cpu")
    for name, (entry, prefix) in expected.items():
        results = evaluate_checkpoint(parse("--eval", "--resume", folder / name, *flags))
        assert results == {key: entry[f"{prefix}{key}"] for key in ("loss", "acc1", "acc5")}, name
    for source in (("--output_dir", folder), ("--finetune", folder / "checkpoint-5.pth")):
        assert evaluate_checkpoint(parse("--eval", *source, *flags))["acc1"] == entries[5]["test_acc1"]
    average = evaluate_checkpoint(parse("--eval", "--output_dir", folder, "--model_key", "model_ema", *flags))
    assert average["acc1"] == entries[5]["test_ema_acc1"]
    # And the command says so, in the official words, last.
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert call(good_flags, eval=True, model_ema=True) == 0
    lines = [message for message in caplog.messages if message.startswith("* Acc@1")]
    assert [float(re.match(r"\* Acc@1 ([\d.]+) Acc@5 [\d.]+ loss [\d.]+$", line)[1]) for line in lines] == [
        pytest.approx(entries[5][name], abs=5e-4) for name in ("test_ema_acc1", "test_acc1")
    ]
    assert caplog.messages[-1] == lines[-1]


def test_a_checkpoint_says_what_its_model_is(good_flags):
    call(good_flags, epochs=1, crop_pct=0.9, imagenet_default_mean_and_std=True)
    state = torch.load(good_flags["--output_dir"] / "checkpoint-0.pth", weights_only=True)
    assert state["labels"] == [f"class{label:02}" for label in range(6)]
    assert (state["crop_pct"], state["interpolation"]) == (0.9, "bicubic")
    assert state["mean"] == [0.485, 0.456, 0.406]
    assert state["args"]["input_size"] == 40


def final_weights(folder):
    return load_checkpoint(max(folder.glob("checkpoint-?.pth")))["model"]


@pytest.mark.parametrize(("opt", "lr"), [("adamw", 2e-4), ("sgd", 0.05)])
def test_four_batches_of_two_equal_one_of_eight(good_flags, tmp_path, opt, lr):
    # Breaks if a step's gradients are not the mean over its batches (SGD sees their scale), or its samples are others.
    plain = {flag: str(value) for flag, value in zip(PLAIN[::2], PLAIN[1::2], strict=True)}
    for name, epochs, batch_size, update_freq in (("start", 1, 8, 1), ("large", 2, 8, 1), ("small", 2, 2, 4)):
        flags = {**good_flags, **plain, "--output_dir": tmp_path / name, "--init_scale": 1.0, "--opt": opt}
        rate = 0 if name == "start" else lr
        assert call(flags, lr=rate, min_lr=rate, epochs=epochs, batch_size=batch_size, update_freq=update_freq) == 0
    start, large, small = (final_weights(tmp_path / name) for name in ("start", "large", "small"))
    assert largest_difference(large, small) < 1e-6
    assert largest_difference(large, start) > 1e-3


def largest_difference(ours, theirs):
    return max((ours[name] - tensor).abs().max().item() for name, tensor in theirs.items())


def test_no_evaluation_needs_no_validation_images(good_flags, tmp_path):
    train = write_data(tmp_path / "data", 3, val=0)
    for label in range(3):
        (train / "val" / f"class{label:02}").rmdir()
    assert call(good_flags, data_path=train, disable_eval_during_finetuning=True) == 0
    assert "test_acc1" not in log_of(good_flags["--output_dir"])[0]
    assert not (good_flags["--output_dir"] / "checkpoint-best.pth").exists()


@pytest.mark.parametrize("data_set", CIFAR)
def test_cifar_is_fine_tuned_on_at_its_own_size(good_flags, tmp_path, monkeypatch, data_set):
    names = ["cat", "dog", "bird"]
    write_cifar(tmp_path, CIFAR[data_set], monkeypatch, names)
    changes = {"data_set": data_set, "data_path": tmp_path, "input_size": 32, "batch_size": 4, "epochs": 1}
    assert call(good_flags, nb_classes=3, mixup=0.8, **changes) == 0
    assert load_checkpoint(good_flags["--output_dir"] / "checkpoint-0.pth")["labels"] == names
    assert log_of(good_flags["--output_dir"])[0]["test_acc5"] == 100  # of three classes, all are among the first five


@pytest.mark.slow
def test_nothing_is_saved_where_nothing_is_to_be(good_flags):
    assert call(good_flags, no_save_ckpt=True) == 0
    assert len(log_of(good_flags["--output_dir"])) == 2
    assert list(good_flags["--output_dir"].glob("*.pth")) == []


def test_a_non_square_run_from_pretraining(good_flags, tmp_path, caplog):
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.1, "use_abs_pos_emb": False}
    source = VisionTransformerForMaskedImageModeling(img_size=40, vocab_size=16, use_shared_rel_pos_bias=True, **sizes)
    torch.nn.init.normal_(source.rel_pos_bias.relative_position_bias_table)
    save_checkpoint(tmp_path / "mim.pth", {"model": source.state_dict(), "epoch": 0})
    with caplog.at_level(logging.INFO):
        assert call(good_flags, finetune=tmp_path / "mim.pth", input_size="40x64", epochs=1, lr=0, min_lr=0) == 0
    weights = final_weights(good_flags["--output_dir"])
    assert torch.equal(weights["blocks.1.mlp.fc1.weight"], source.state_dict()["blocks.1.mlp.fc1.weight"])
    tables = [weights[f"blocks.{block}.attn.relative_position_bias_table"] for block in range(2)]
    assert torch.equal(*tables)
    assert tables[0].std() > 0.5
    assert len(tables[0]) == (2 * 5 - 1) * (2 * 8 - 1) + 3


def test_a_run_starts_from_a_vit_and_is_evaluated_like_any_other(good_flags, tmp_path, caplog):
    # Breaks when the run's model has tables instead of the ViT's positions, or its checkpoints forget the ViT's eps.
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(**sizes, image_size=40, patch_size=8, layer_norm_eps=1e-12)).eval()
    vit.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit/preprocessor_config.json").write_text('{"image_mean": [0.485, 0.456, 0.406]}')
    with caplog.at_level(logging.INFO):
        assert call(good_flags, finetune=tmp_path / "vit", lr=0, min_lr=0, epochs=1) == 0
    assert "built as with --abs_pos_emb --disable_rel_pos_bias --layer_scale_init_value 0" in caplog.text
    assert "gets (0.5, 0.5, 0.5): check --imagenet_default_mean_and_std" in caplog.text
    source = good_flags["--output_dir"] / "checkpoint-0.pth"
    assert load_checkpoint(source)["args"]["abs_pos_emb"] is True
    trained = get_model(source)
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        tokens = vit.layernorm(trained.forward_blocks(trained.embed(images))[0])
        torch.testing.assert_close(tokens, vit(images).last_hidden_state, rtol=1e-5, atol=1e-5)
    assert call(good_flags, finetune=tmp_path / "vit", eval=True) == 0
    form = {"abs_pos_emb": True, "disable_rel_pos_bias": True, "layer_scale_init_value": 0}
    assert call(good_flags, eval=True, resume=source, **form) == 0


def test_a_head_of_other_classes_is_dropped_to_finetune_and_refused_to_evaluate_or_resume(
    good_flags, tmp_path, caplog, capsys
):
    assert call(good_flags, epochs=1) == 0
    other = write_data(tmp_path / "other", classes=3)
    checkpoint = good_flags["--output_dir"] / "checkpoint-0.pth"
    flags = {**good_flags, "--data_path": other, "--output_dir": tmp_path / "second", "--epochs": 1}
    with caplog.at_level(logging.INFO):
        assert call(flags, finetune=checkpoint) == 0
    assert re.search(r"dropped .*head.weight", caplog.text)
    assert final_weights(tmp_path / "second")["head.weight"].shape == (3, 32)
    capsys.readouterr()
    (other / "val" / "class00").rename(other / "val" / "zebra")
    (other / "train" / "class00").rename(other / "train" / "zebra")
    assert call(flags, eval=True, resume=checkpoint) == 2
    assert "checkpoint-0.pth has not learnt 1 of the data's classes: zebra" in capsys.readouterr().err
    assert call(flags, resume=checkpoint) == 2
    assert "other classes (6 there, 3 here)" in capsys.readouterr().err


def test_official_flags_without_effect_are_accepted_and_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        parse("--dist_eval", "--resplit", "--warmup_lr", 1e-5, "--world_size", 8)
    assert sorted(re.match(r"--(\w+) has no effect", message)[1] for message in caplog.messages) == [
        "dist_eval",
        "resplit",
        "warmup_lr",
        "world_size",
    ]


MISTAKES = {
    "missing folder": ({"--data_path": "nowhere"}, ["nowhere/train"]),
    "the training images alone": ({"--data_path": "TRAIN"}, ["--data_path TRAIN: has no folder train", "image_folder"]),
    "wrong class count": ({"--nb_classes": 10}, ["--nb_classes 10", "6 classes", "class00", "--nb_classes 6"]),
    "negative class count": ({"--nb_classes": -1}, ["--nb_classes -1"]),
    "no validation images": ({"--data_set": "image_folder"}, ["--eval_data_path is missing"]),
    "empty validation folder": (
        {"--data_set": "image_folder", "--data_path": "TRAIN", "--eval_data_path": "EMPTY"},
        ["EMPTY", "no images"],
    ),
    "classes that differ": (
        {"--data_set": "image_folder", "--data_path": "TRAIN", "--eval_data_path": "OTHER"},
        ["different classes", "class03", "OTHER"],
    ),
    "images without classes": ({"--data_set": "image_folder", "--data_path": "LOOSE"}, ["LOOSE", "without a class"]),
    "mixup with one class": (
        {"--data_set": "image_folder", "--data_path": "ONE", "--eval_data_path": "ONE", "--mixup": 0.8},
        ["two classes", "ONE has one"],
    ),
    "mixup with an odd batch": ({"--mixup": 0.8, "--batch_size": 7}, ["--batch_size 7", "even"]),
    "unknown way to mix": ({"--mixup": 0.8, "--mixup_mode": "each"}, ["--mixup_mode", "'each'", "pair"]),
    "one number for cutmix": ({"--cutmix_minmax": 0.5}, ["--cutmix_minmax", "two"]),
    "smoothing": ({"--smoothing": 1.0}, ["--smoothing 1.0"]),
    "layer decay": ({"--layer_decay": 0.0}, ["--layer_decay 0.0"]),
    "unknown data set": ({"--data_set": "CIFAR1000"}, ["CIFAR", "IMNET", "image_folder"]),
    "missing archive": ({"--data_set": "CIFAR"}, ["cifar-100-python", "--download_data"]),
    "unknown policy": ({"--aa": "rant-m9"}, ["policy 'rant-m9'"]),
    "unknown model": ({"--model": "beit_tiny_patch16_244"}, ["did you mean 'beit_tiny_patch16_224'"]),
    "a pre-training model": ({"--model": "beit_tiny_patch16_224_8k_vocab"}, ["pre-training", "beit_tiny_patch16_224"]),
    "unknown constructor argument": ({"--model_kwargs": ["embed_dims=3"]}, ["embed_dims"]),
    "image size that patches do not divide": ({"--input_size": 33}, ["33"]),
    "nothing to evaluate": ({"--eval": True, "--output_dir": "EMPTY"}, ["--eval", "--resume"]),
    "a checkpoint that is none": ({"--eval": True, "--resume": "FILE"}, ["FILE"]),
    "weights that are not there": ({"--finetune": "nowhere.pth"}, ["nowhere.pth"]),
    "batch larger than the data": ({"--batch_size": 50}, ["50", "48"]),
    "zero epochs": ({"--epochs": 0}, ["--epochs 0"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_status_2(mistake, good_flags, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("not a checkpoint")
    (tmp_path / "TRAIN").symlink_to(data / "train")
    (tmp_path / "LOOSE").mkdir()
    photo(0, 0).save(tmp_path / "LOOSE" / "0.png")
    (tmp_path / "ONE" / "only").mkdir(parents=True)
    photo(0, 0).save(tmp_path / "ONE" / "only" / "0.png")
    if mistake == "classes that differ":
        (write_data(tmp_path / "fewer", 3, train=1) / "val").rename(tmp_path / "OTHER")
    changes, parts = MISTAKES[mistake]
    assert call({**good_flags, **changes}) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(part in errors[0] for part in parts), errors[0]


def test_the_first_loss_is_the_logarithm_of_the_classes():
    loss, _ = Classification(*HALF)(build_model(parse(*MODEL), 6), random_batch(), 0)
    assert loss.item() == pytest.approx(math.log(6), abs=0.01)


def test_evaluate_checkpoint_refuses_a_part_of_a_model(good_flags, tmp_path):
    save_checkpoint(tmp_path / "part.pth", {"model": {"fc_norm.weight": torch.zeros(32)}})
    with pytest.raises(InputError):
        evaluate_checkpoint(
            parse("--eval", "--resume", tmp_path / "part.pth", "--data_path", good_flags["--data_path"], *MODEL)
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["ant", "bee"]}, "has not learnt 2 of the data's classes: class04, class05"),
        ({"flags": ["--disable_rel_pos_bias"]}, "no place in the model: blocks.0.attn.rel"),
    ],
)
def test_evaluation_refuses_a_checkpoint_of_other_classes_or_another_network(good_flags, tmp_path, changes, message):
    # Breaks if only what is missing counts: the numbers would be those of something else.
    flags = ("--data_path", good_flags["--data_path"], *MODEL)
    names = class_names(parse(*flags))
    weights = build_model(parse(*flags), len(names)).state_dict()
    labels = [*changes.get("labels", []), *names][: len(names)] if "labels" in changes else list(names)
    save_checkpoint(tmp_path / "other.pth", {"model": weights, "labels": labels})
    with pytest.raises(InputError, match=message):
        evaluate_checkpoint(parse("--eval", "--resume", tmp_path / "other.pth", *flags, *changes.get("flags", [])))


def test_an_image_that_cannot_be_read_is_left_out_of_the_evaluation(good_flags, tmp_path, caplog):
    # Breaks if another image is counted in its place, as training does.
    shutil.copytree(good_flags["--data_path"], tmp_path / "data")
    flags = ("--data_path", tmp_path / "data", "--num_workers", 0, *MODEL)
    names = class_names(parse(*flags))
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "model.pth", {"model": build_model(parse(*flags), len(names)).state_dict()})
    pictures = sorted(path for path in (tmp_path / "data" / "val").rglob("*.*"))
    pictures[0].write_bytes(b"no image")
    damaged = evaluate_checkpoint(parse("--eval", "--resume", tmp_path / "model.pth", *flags))
    pictures[0].unlink()
    without = evaluate_checkpoint(parse("--eval", "--resume", tmp_path / "model.pth", *flags))
    assert damaged == pytest.approx(without)
    assert "unreadable image" in caplog.text
    for picture in pictures[1:]:
        picture.write_bytes(b"no image")
    with pytest.raises(InputError, match="none of the validation images can be read"):
        evaluate_checkpoint(parse("--eval", "--max_unreadable", 99, "--resume", tmp_path / "model.pth", *flags))


def test_a_folder_to_resume_is_its_newest_checkpoint(good_flags, tmp_path, caplog, capsys):
    # Breaks if it is the best one, as where a checkpoint is only read: trained epochs would be lost.
    caplog.set_level(logging.INFO, "beit")
    assert call(good_flags, save_ckpt_freq=1) == 0
    run = good_flags["--output_dir"]
    shutil.copy(run / "checkpoint-0.pth", run / "checkpoint-best.pth")
    assert call(good_flags, output_dir=tmp_path / "longer", resume=run, epochs=3) == 0
    assert f"resuming {run / 'checkpoint-1.pth'} at epoch 2, step 0" in caplog.text
    assert [entry["epoch"] for entry in log_of(tmp_path / "longer")] == [2]
    (tmp_path / "empty").mkdir()
    assert call(good_flags, output_dir=tmp_path / "other", resume=tmp_path / "empty") == 2
    assert f"--resume {tmp_path / 'empty'}: the folder holds no checkpoint of a run" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_classes(good_flags, tmp_path, capsys):
    # Breaks if classes count by position: accuracy would fall from 100 to 0, under wrong names.
    data = tmp_path / "data"
    shutil.copytree(good_flags["--data_path"], data)
    flags = {**good_flags, "--data_path": data}
    assert call(flags, epochs=1) == 0
    for split in ("train", "val"):
        (data / split / "class00").rename(data / split / "zebra")
    assert call(flags, epochs=2) == 2
    assert "other classes (number 0 is 'class00' there, 'class01' here)" in capsys.readouterr().err
    assert not (good_flags["--output_dir"] / "checkpoint-1.pth").exists()


def test_heads_are_matched_by_name(good_flags, tmp_path, caplog):
    flags = ("--data_path", good_flags["--data_path"], "--num_workers", 0, *MODEL)
    names = class_names(parse(*flags))
    torch.manual_seed(0)
    weights = build_model(parse(*flags), 8).state_dict()
    weights["head.weight"].normal_()
    learnt = ["whale", *reversed(names), "zebra"]
    save_checkpoint(tmp_path / "wider.pth", {"model": weights, "labels": learnt})
    backwards = {**weights, **{f"head.{key}": weights[f"head.{key}"][1:7] for key in ("weight", "bias")}}
    save_checkpoint(tmp_path / "backwards.pth", {"model": backwards, "labels": [*learnt[1:6], "zebra"]})
    task = Finetuning(parse("--finetune", tmp_path / "backwards.pth", *flags))
    task.class_names = names
    head = task.build_model().head.weight
    assert torch.equal(head[1:], weights["head.weight"][1:6].flip(0))
    assert not torch.equal(head[0], weights["head.weight"][6])  # of the zebra
    assert (
        "5 of 6 classes matched by name; from scratch: class00; 1 of its 6 classes are not in the data" in caplog.text
    )
    ordered = {**weights, **{f"head.{key}": weights[f"head.{key}"][1:7].flip(0) for key in ("weight", "bias")}}
    save_checkpoint(tmp_path / "exact.pth", {"model": ordered, "labels": names})
    scores = [
        evaluate_checkpoint(parse("--eval", "--resume", tmp_path / name, *flags)) for name in ("wider.pth", "exact.pth")
    ]
    assert scores[0] == scores[1]


def test_an_evaluation_crops_as_recorded(good_flags, tmp_path, caplog):
    flags = ("--data_path", good_flags["--data_path"], "--num_workers", 0, *MODEL)
    torch.manual_seed(0)
    weights = build_model(parse(*flags), 6).state_dict()
    weights["head.weight"].normal_()
    save_checkpoint(tmp_path / "plain.pth", {"model": weights})
    save_checkpoint(tmp_path / "cropped.pth", {"model": weights, "crop_pct": 0.3, "image_size": (40, 40)})
    plain, asked, recorded, other = (
        evaluate_checkpoint(parse("--eval", "--resume", tmp_path / name, *flags, *more))["loss"]
        for name, more in (
            ("plain.pth", ()),
            ("plain.pth", ("--crop_pct", 0.3)),
            ("cropped.pth", ()),
            ("cropped.pth", ("--crop_pct", 0.875)),
        )
    )
    assert plain == other != recorded == asked
    assert "--crop_pct 0.875, where" in caplog.text


@pytest.mark.parametrize("variant", ["imagenet_r", "imagenet_a"])
def test_a_robustness_test_lets_the_200_classes_of_its_images_compete(variant, tmp_path, capsys):
    # Breaks if the other 800 classes compete, or rows of the head are taken in the order of the folders.
    every = ImageNetInfo("imagenet-1k").label_names()
    theirs = (resources.files("timm.data") / f"_info/{variant}_synsets.txt").read_text().split()
    pixels = np.random.default_rng(0).integers(0, 256, (200, 16, 16, 3), dtype=np.uint8)
    for name, image in zip(theirs, pixels, strict=True):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / "val" / name / "0.png")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    model = create_model("beit_base_patch16_224", **sizes, num_classes=1000, init_scale=30.0).eval()
    save_checkpoint(tmp_path / "beit.pth", {"model": model.state_dict()})  # which names no classes, as released ones
    flags = ("--robust_test", variant, "--data_set", "image_folder", "--data_path", tmp_path / "val", "--device", "cpu")
    flags += ("--eval_data_path", tmp_path / "val", "--nb_classes", 200, "--num_workers", 0, "--crop_pct", 1)
    flags += ("--input_size", 16, "--model_kwargs", "patch_size=8", "embed_dim=16", "depth=1", "num_heads=2")
    results = evaluate_checkpoint(parse("--eval", "--finetune", tmp_path / "beit.pth", *flags))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 * 2 - 1
    with torch.no_grad():
        logits = model(images)[:, [every.index(name) for name in theirs]]
    assert results["loss"] == pytest.approx(F.cross_entropy(logits, torch.arange(200)).item(), rel=1e-4)
    assert results["acc1"] == pytest.approx(100 * (logits.argmax(1) == torch.arange(200)).float().mean().item())

    assert launch(FinetuningConfig, main, "", list(map(str, flags)), "prog") == 2
    assert f"--robust_test {variant}: is a way to evaluate; give --eval too" in capsys.readouterr().err
    (tmp_path / "val" / theirs[3]).rename(tmp_path / "val" / "cat")
    resume = ("--eval", "--finetune", tmp_path / "beit.pth")
    assert launch(FinetuningConfig, main, "", list(map(str, (*resume, *flags))), "prog") == 2
    line = (
        f"error: --robust_test {variant}: needs its 200 classes, each a folder named by its WordNet id; 2 are missing"
    )
    assert line in capsys.readouterr().err
