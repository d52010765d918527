"""The linear probe: its flags, its frozen backbone, its heads and their evaluation."""

import json
import logging
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from beit.config import read_command_line
from beit.data.classification import ClassificationEvalTransform, find_images, labelled_dataset
from beit.data.loaders import EpochLoader
from beit.errors import InputError
from beit.features import FrozenFeatures
from beit.launch import launch
from beit.storage import load_checkpoint, save_checkpoint, weights_fingerprint
from beit.tasks.linear_probe import LinearHeads, LinearProbe, SideBySide, build_backbone, evaluate, main
from beit.tasks.settings import LinearProbeConfig
from beit.training.precision import Precision
from beit.training.session import Session
from beit.zoo import create_model

CPU = torch.device("cpu")
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
KWARGS = ("--model_kwargs", "embed_dim=32", "depth=3", "num_heads=2", "--patch_size", "8", "--input_size", "32")
NAMED = ("--model", "beit_tiny_patch16_224", *KWARGS)

NAMES = {  # official name → ours
    "checkpoint_key": "model_key",
    "pretrained_weights": "checkpoint",
    "num_labels": "nb_classes",
    "batch_size_per_gpu": "batch_size",
    "optimizer": "opt",
    "val_freq": "eval_freq",
}


def parse(*argv) -> LinearProbeConfig:
    return read_command_line(LinearProbeConfig, [str(argument) for argument in argv], "prog", "")


def test_every_official_flag_parses_with_its_default(golden):
    flags = json.loads((golden / "official_cli.json").read_text())["run_linear_eval"]
    defaults = parse()
    assert len(flags) == 24
    for flag in flags:
        (spelling,) = flag["flags"]
        name = NAMES.get(flag["dest"], flag["dest"])
        assert getattr(defaults, name) == flag["default"], spelling
        if flag["type"] == "bool_flag":
            assert getattr(parse(spelling, "false"), name) is False
            assert getattr(parse(spelling, "1"), name) is True
        elif flag["kind"] == "Store":
            value = flag["default"] if flag["default"] not in (None, "") else 3
            parsed = getattr(parse(spelling, value), name)
            assert type(parsed)(value) == parsed
        else:
            assert getattr(parse(spelling), name) is (flag["kind"] == "StoreTrue")


def test_the_published_run():
    # 4e-3 is what the rule gives for 8 GPUs of 128 images; broken by a rule that leaves the processes out.
    config = parse(*shlex.split("--model beit_base_patch16_224 --lr 4e-3 --batch_size_per_gpu 128 --epochs 100"))

    def peak_lr(config, world_size):
        task = LinearProbe(config)
        task.session = SimpleNamespace(world_size=world_size)
        return task.peak_lr()

    assert peak_lr(config, 8) == 4e-3
    assert peak_lr(parse(), 8) == pytest.approx(4e-3)
    assert peak_lr(parse("--update_freq", 4), 2) == pytest.approx(4e-3)
    recipe = parse("--config", "linear_probe_base")
    assert (recipe.lr, recipe.batch_size, recipe.epochs, recipe.opt) == (4e-3, 128, 100, "adamw")
    groups = optimizer_of(recipe, small_heads()).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(4e-3, 1e-4)]
    sgd = optimizer_of(parse("--optimizer", "sgd"), small_heads())
    assert [group["weight_decay"] for group in sgd.param_groups] == [0.0]
    assert isinstance(sgd, torch.optim.SGD)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seven classes told by coarse patterns: 6 images each to train on, 3 to validate."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (7, 3, 3, 3))
    for split, count in (("train", 6), ("val", 3)):
        for label, pattern in enumerate(patterns):
            (folder / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                pixels = (pattern + rng.integers(0, 56, (3, 3, 3))).astype(np.uint8)
                image = Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC)
                image.save(folder / split / f"class{label}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A pre-training checkpoint with a shared bias, and a fine-tuned one; none of their weights is zero."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    pretrained = create_model("beit_tiny_patch16_224_8k_vocab", vocab_size=16, **TINY)
    finetuned = create_model("beit_tiny_patch16_224", num_classes=5, **TINY)
    for name, model in (("pretrained", pretrained), ("finetuned", finetuned)):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        save_checkpoint(folder / f"{name}.pth", {"model": model.state_dict(), "args": {"model_kwargs": TINY}})
    return {"pretrained": (folder / "pretrained.pth", pretrained), "finetuned": (folder / "finetuned.pth", finetuned)}


def frozen(model, **options):
    return FrozenFeatures(model, **{**HALF, **options}, precision=Precision(torch.float32, CPU))


def small_heads(pools=("cls_mean",), classes=7):
    torch.manual_seed(1)
    return LinearHeads(frozen(create_model("beit_tiny_patch16_224", **TINY), pools=pools).features, classes)


# The backbone


@pytest.mark.parametrize("flags", [NAMED, ("--model", "auto")])
@pytest.mark.parametrize("kind", ["pretrained", "finetuned"])
def test_checkpoints_are_read_directly(checkpoints, kind, flags):
    # Broken by a shared bias that is not carried into the blocks, a head in the way, or a block too few.
    path, model = checkpoints[kind]
    backbone = build_backbone(parse(*flags, "--pretrained_weights", path)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    for ours, theirs in zip(
        backbone.get_intermediate_layers(pixels), model.eval().get_intermediate_layers(pixels), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_checkpoint_of_another_size_is_resized(checkpoints):
    path, _ = checkpoints["pretrained"]
    for flags in (NAMED, ("--model", "auto")):
        backbone = build_backbone(parse(*flags, "--pretrained_weights", path, "--input_size", "48x64"))
        assert backbone.img_size == (48, 64)


def test_without_weights_it_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        build_backbone(parse(*NAMED))
    assert "untrained" in caplog.text


def test_another_mean_than_the_checkpoints_is_said(checkpoints, tmp_path, caplog):
    _, model = checkpoints["finetuned"]
    args = {"imagenet_default_mean_and_std": True, "model_kwargs": TINY}
    save_checkpoint(tmp_path / "m.pth", {"model": model.state_dict(), "args": args, "image_size": model.img_size})
    with caplog.at_level(logging.WARNING):
        build_backbone(parse("--model", "auto", "--pretrained_weights", tmp_path / "m.pth"))
        assert "--imagenet_default_mean_and_std" in caplog.text
        caplog.clear()
        flags = ("--model", "auto", "--pretrained_weights", tmp_path / "m.pth", "--imagenet_default_mean_and_std", "1")
        build_backbone(parse(*flags))
        assert not caplog.text


@pytest.mark.parametrize(
    ("recorded", "flags", "told"),
    [
        ({"crop_mode": "squash"}, (), "crop_mode squash, and gets center"),
        ({"interpolation": "bilinear"}, (), "interpolation bilinear, and gets bicubic"),
        ({"crop_pct": 1.0}, (), "crop_pct 1.0, and gets 0.875: check --crop_pct"),
        ({"crop_pct": 1.0}, ("--crop_pct", "1"), ""),
        ({"crop_pct": 1.0, "image_size": (64, 64)}, (), ""),  # at another size another crop is usual
    ],
)
def test_another_preparation_than_the_checkpoints_is_said(checkpoints, tmp_path, caplog, recorded, flags, told):
    _, model = checkpoints["finetuned"]
    content = {"model": model.state_dict(), "args": {"model_kwargs": TINY}, "image_size": model.img_size}
    save_checkpoint(tmp_path / "m.pth", {**content, **recorded})
    with caplog.at_level(logging.WARNING, "beit.tasks"):
        build_backbone(parse("--model", "auto", "--pretrained_weights", tmp_path / "m.pth", *flags))
    said = [record.getMessage() for record in caplog.records if record.name == "beit.tasks.base"]
    assert [told in line for line in said] == [True] * bool(told)


def test_features_are_the_class_token_and_the_mean_of_the_patches():
    model = create_model("beit_tiny_patch16_224", **TINY)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        blocks = model.eval().get_intermediate_layers((images / 255 - 0.5) / 0.5)
    found = frozen(model, pools=("cls_mean", "mean"))(images)
    assert list(found) == [f"layer{layer}_{pool}" for layer in range(3) for pool in ("cls_mean", "mean")]
    for layer, tokens in enumerate(blocks):
        expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
        torch.testing.assert_close(found[f"layer{layer}_cls_mean"], expected)
    some = frozen(model, layers=(-1, 0), pools=("cls",))
    assert [(f.name, f.size) for f in some.features] == [("layer0_cls", 32), ("layer2_cls", 32)]
    torch.testing.assert_close(some(images)["layer2_cls"], blocks[2][:, 0])


@pytest.mark.parametrize(
    ("flags", "pools"),
    [
        ((), ["cls_mean"]),
        (("--avgpool_patchtokens", "false"), ["cls"]),
        (("--pool", "cls", "mean"), ["cls", "mean"]),
    ],
)
def test_what_the_heads_read(flags, pools, images):
    task = LinearProbe(parse(*NAMED, *flags, "--data_path", images))
    task.device = CPU
    task.prepare()
    assert [feature.pool for feature in task.features.features] == pools * 3
    assert task.features.precision.dtype == torch.float32


# The heads


def batch_of(labels):
    torch.manual_seed(2)
    return {"image": torch.randint(0, 256, (len(labels), 3, 32, 32), dtype=torch.uint8), "label": torch.tensor(labels)}


def optimizer_of(config, heads):
    task = LinearProbe(config)
    task.model, task.session = heads, Session(CPU, 0, 1, None)
    return task.build_optimizer()


def loop_settings_of(config):
    task = LinearProbe(config)
    task.loader = EpochLoader([0] * 1000, 10)
    return task.loop_settings()


def train(features, heads, steps=4):
    heads = heads.train()
    objective = SideBySide(features)
    optimizer = optimizer_of(parse("--lr", "0.01"), heads)
    precision = Precision(torch.float32, CPU)
    for _ in range(steps):
        loss, metrics = objective(heads, batch_of([0, 1, 2, 3, 4, 5]), 0)
        precision.backward(loss)
        precision.step(optimizer, heads.parameters(), loop_settings_of(parse()).clip_grad)
    return loss, metrics


def test_heads_know_nothing_of_each_other():
    # Broken by a mean over heads in the loss (with SGD), a clipped common gradient, or a shared parameter.
    model = create_model("beit_tiny_patch16_224", **TINY)
    together = small_heads()
    start = {name: tensor.clone() for name, tensor in together.state_dict().items()}
    train(frozen(model, pools=("cls_mean",)), together)
    for layer in range(3):
        features = frozen(model, pools=("cls_mean",), layers=(layer,))
        alone = LinearHeads(features.features, 7)
        alone.load_state_dict({name: start[name] for name in alone.state_dict()})
        train(features, alone)
        for name, tensor in alone.state_dict().items():
            assert not torch.equal(tensor, start[name])
            torch.testing.assert_close(together.state_dict()[name], tensor)


def test_the_loss_is_the_sum_over_the_heads():
    features = frozen(create_model("beit_tiny_patch16_224", **TINY), pools=("cls_mean",))
    heads, batch = small_heads(), batch_of([3, 1, 4])
    logits = heads(features(batch["image"]))
    loss, metrics = SideBySide(features)(heads, batch, 0)
    torch.testing.assert_close(loss, sum(F.cross_entropy(output, batch["label"]) for output in logits.values()))
    right = [(output.argmax(1) == batch["label"]).float().mean() for output in logits.values()]
    torch.testing.assert_close(metrics["class_acc"], torch.stack(right).mean())


def test_the_backbone_stays_as_it_is():
    # Broken by a backbone that learns, or drops anything out, or whose graph is kept.
    model = create_model("beit_tiny_patch16_224", drop_rate=0.5, drop_path_rate=0.5, **TINY)
    before = weights_fingerprint(model)
    features = frozen(model.train(), pools=("cls_mean",))
    images = batch_of([0, 1])["image"]
    assert torch.equal(features(images)["layer2_cls_mean"], features(images)["layer2_cls_mean"])
    train(features, small_heads())
    assert weights_fingerprint(model) == before
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        model.blocks[2].attn.v_bias[3] += 1e-6
    assert weights_fingerprint(model) != before


def test_evaluation_equals_a_naive_count(images, caplog):
    # Broken by images left out of the last batch, by means of batch means, or by the scores of another layer.
    features = frozen(create_model("beit_tiny_patch16_224", **TINY), pools=("cls_mean",))
    heads = small_heads()
    for head in heads.heads.values():
        torch.nn.init.normal_(head.weight, std=5.0)
    dataset = labelled_dataset(find_images("IMNET", str(images), train=False), ClassificationEvalTransform(32), seed=0)
    with caplog.at_level(logging.INFO):
        results = evaluate(heads, features, EpochLoader(dataset, 4, shuffle=False, drop_last=False))
    expected, samples = {}, [dataset[(0, index)] for index in range(len(dataset))]
    read = features(torch.stack([sample["image"] for sample in samples]))
    for name, head in heads.heads.items():
        first, among, losses = [], [], []
        for sample, feature in zip(samples, read[name], strict=True):
            logits = head(feature)
            label = int(sample["label"])
            rank = (logits > logits[label]).sum().item()
            first.append(rank == 0)
            among.append(rank < 5)
            losses.append(F.cross_entropy(logits[None], sample["label"][None]).item())
        expected[name] = {"acc1": 100 * np.mean(first), "acc5": 100 * np.mean(among), "loss": np.mean(losses)}
        assert results[f"{name}_acc1"] == pytest.approx(expected[name]["acc1"])
        assert results[f"{name}_acc5"] == pytest.approx(expected[name]["acc5"])
    assert len(losses) == 21
    best = f"layer{results['best_layer']}_cls_mean"
    assert expected[best]["acc1"] == max(scores["acc1"] for scores in expected.values())
    assert {key: results[key] for key in ("acc1", "acc5", "loss")} == pytest.approx(expected[best], rel=1e-5)
    assert "* Acc@1" in caplog.text


def test_an_image_that_cannot_be_read_is_left_out_of_the_evaluation(images, tmp_path):
    # Breaks if the picture that takes its place is counted, under whichever label.
    features = frozen(create_model("beit_tiny_patch16_224", **TINY), pools=("cls_mean",))
    heads = small_heads()
    for head in heads.heads.values():
        torch.nn.init.normal_(head.weight, std=5.0)
    scores = []
    for name in ("damaged", "without"):
        shutil.copytree(images, tmp_path / name)
        victim = tmp_path / name / "val/class3/1.png"
        victim.write_bytes(b"no image") if name == "damaged" else victim.unlink()
        val = find_images("IMNET", str(tmp_path / name), train=False)
        dataset = labelled_dataset(val, ClassificationEvalTransform(32), 0, strict=True)
        scores.append(evaluate(heads, features, EpochLoader(dataset, 4, shuffle=False, drop_last=False)))
    assert scores[0] == pytest.approx(scores[1])


# The job


@pytest.fixture
def good_flags(images, checkpoints, tmp_path):
    return {
        "--data_path": images,
        "--model": "auto",
        "--pretrained_weights": checkpoints["pretrained"][0],
        "--batch_size_per_gpu": 14,
        "--epochs": 2,
        "--num_workers": 0,
        "--device": "cpu",
        "--output_dir": tmp_path / "run",
    }


def call(flags, *more):
    argv = [str(part) for flag, value in flags.items() for part in (flag, value)]
    return launch(LinearProbeConfig, main, "", [*argv, *map(str, more)], "run_linear_eval.py")


def test_a_run_writes_what_is_promised(good_flags, caplog):
    assert call({**good_flags, "--lr": 1e-3, "--min_lr": 2e-3}) == 0
    assert "the learning rate rises from 0.001 to --min_lr 0.002" in caplog.text
    folder = good_flags["--output_dir"]
    entries = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [entry["epoch"] for entry in entries] == [0, 1]
    for entry in entries:
        scores = [entry[f"test_layer{layer}_cls_mean_acc1"] for layer in range(3)]
        assert entry["test_acc1"] == max(scores) == scores[entry["test_best_layer"]]
        assert entry["n_parameters"] == 3 * (64 * 7 + 7)
    best = load_checkpoint(folder / "checkpoint-best.pth")
    assert best["labels"] == [f"class{label}" for label in range(7)]
    assert best["best"]["acc1"] == max(entry["test_acc1"] for entry in entries[: best["epoch"] + 1])
    assert set(best["model"]) == {f"heads.layer{i}_cls_mean.{part}" for i in range(3) for part in ("weight", "bias")}
    assert (folder / "checkpoint-1.pth").exists()


def test_heads_do_not_go_on_with_another_backbone(good_flags, checkpoints, capsys):
    # --output_dir is the current folder by default: the next checkpoint is easily probed in the same place.
    assert call(good_flags) == 0
    other = {**good_flags, "--epochs": 3, "--pretrained_weights": checkpoints["finetuned"][0]}
    assert call(other) == 2
    assert "trained with another backbone: resume with the same --checkpoint" in capsys.readouterr().err
    assert call(other, "--no_auto_resume") == 0


MISTAKES = {
    "missing folder": ({"--data_path": "nowhere"}, ["nowhere"]),
    "no such checkpoint": ({"--pretrained_weights": "nowhere.pth"}, ["nowhere.pth"]),
    "another model": ({"--model": "beit_tiny_patch16_224"}, ["another model", "--model auto"]),
    "nothing to read the model off": ({"--pretrained_weights": ""}, ["--model auto", "--checkpoint"]),
    "a pre-training model": (
        {"--model": "beit_tiny_patch16_224_8k_vocab"},
        ["pre-training", "needs beit_tiny_patch16_224"],
    ),
    "unknown model": ({"--model": "beit_tinny_patch16_224"}, ["did you mean 'beit_tiny_patch16_224'"]),
    "other classes": ({"--num_labels": 10}, ["--nb_classes 10", "7 classes"]),
    "negative classes": ({"--num_labels": -1}, ["--nb_classes -1"]),
    "no such key": ({"--checkpoint_key": "teacher"}, ["teacher"]),
    "no such block": ({"--layers": 3}, ["3 blocks"]),
    "unknown pool": ({"--pool": "avg"}, ["unknown pool 'avg'"]),
    "no vector": ({"--pool": "map"}, ["no vector"]),
    "unknown optimizer": ({"--optimizer": "adamvv"}, ["adam"]),
    "true or false expected": ({"--avgpool_patchtokens": "maybe"}, ["'maybe'"]),
    "no images": ({"--batch_size_per_gpu": 0}, ["--batch_size 0"]),
    "batch larger than the data": ({"--batch_size_per_gpu": 43}, ["42 images"]),
    "an image size that patches do not divide": ({"--input_size": 33}, ["33"]),
    "unwritable output": ({"--output_dir": "FILE/run"}, ["FILE/run"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_status_2(mistake, good_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    changes, parts = MISTAKES[mistake]
    assert call({**good_flags, **changes}) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(part in errors[0] for part in parts), errors[0]


def test_any_number_of_classes_may_be_told(good_flags, images, checkpoints):
    for labels in (0, 7, 1000):
        task = LinearProbe(parse(*NAMED, "--data_path", images, "--num_labels", labels))
        task.device = CPU
        task.prepare()
        assert len(task.class_names) == 7
    with pytest.raises(InputError, match="8"):
        LinearProbe(parse("--data_path", images, "--num_labels", 8)).prepare()
