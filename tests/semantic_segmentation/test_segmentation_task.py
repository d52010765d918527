"""Training of segmentors: what learns how fast, what the loss is the mean of, what a checkpoint says."""

import logging
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beit.checkpoints.read import read_weights
from beit.config import to_plain
from beit.tasks.base import resolve_batch
from beit.training.optim import apply_schedules
from beit.training.state import Period
from semantic_segmentation.config import TrainConfig, segmentor_arguments
from semantic_segmentation.data import ImagePairs, named_classes
from semantic_segmentation.modeling import build_segmentor, segmentor_from
from semantic_segmentation.task import (
    PixelClassification,
    Segmentation,
    model_input,
    pixel_accuracy,
    pixel_loss,
    start_from,
)
from tests.command_lines import read_train

BASE = "upernet_beit_base_12_512_slide_160k_ade20k_pt"
LARGE = "upernet_beit_large_24_512_slide_160k_ade20k_pt2ft"
LARGE_640 = "upernet_beit_large_24_640_slide_160k_ade20k_pt2ft"
PUBLISHED = {BASE: (7e-4, 0.65, 12), LARGE: (2e-5, 0.95, 24)}
TOLD_APART = ("model_kwargs", "out_indices", "crop_size")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_each_evaluation_logs_what_every_class_scores(monkeypatch, caplog):
    # Broken by a table of other names, of another order, or at no level that a run shows.
    task = Segmentation(read_train([BASE]))
    task.session = task.precision = None
    task.val, task.classes = ImagePairs((), (), Path()), named_classes(("wall", "sky"))
    confusion = torch.tensor([[6, 2], [0, 8]])  # a row for each label
    monkeypatch.setattr("semantic_segmentation.task.build_test", lambda *_: lambda _segmentor: confusion)
    evaluation = task.build_evaluation()
    with caplog.at_level(logging.INFO), torch.device("meta"):
        results = evaluation(build_segmentor(**segmentor_arguments(task.config, 2)), 0)
    assert results == pytest.approx({"mIoU": (6 / 8 + 8 / 10) / 2, "mAcc": (6 / 8 + 1) / 2, "aAcc": 14 / 16})
    (table,) = [message for message in caplog.messages if message.startswith("per class, in percent:")]
    rows = [line.split() for line in table.splitlines()[1:]]
    assert rows[:3] == [["class", "IoU", "Acc"], ["wall", "75.00", "75.00"], ["sky", "80.00", "100.00"]]


# Learning rates and weight decay


def official_layer(name: str, depth: int) -> int:
    """The layer of a parameter: 0 for what makes tokens, then the blocks, then everything after or beside them."""
    if name in ("backbone.cls_token", "backbone.mask_token", "backbone.pos_embed"):
        return 0
    if name.startswith("backbone.patch_embed"):
        return 0
    if name.startswith("backbone.blocks."):
        return int(name.split(".")[2]) + 1
    return depth + 1


def optimizer_of(config: TrainConfig) -> tuple[torch.optim.Optimizer, dict[str, dict], nn.Module]:
    """The optimizer of a config, and the group of every parameter by its name."""
    with torch.device("meta"):
        segmentor = build_segmentor(**segmentor_arguments(config, 150))
    task = Segmentation(config)
    task.model, task.device = segmentor, torch.device("cpu")
    optimizer = task.build_optimizer()
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    return optimizer, {name: group_of[id(parameter)] for name, parameter in segmentor.named_parameters()}, segmentor


def learning_rate(config):
    task = Segmentation(config)
    return task.schedules(task.loop_settings())[0]


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request):
    config = read_train([request.param])
    return config, *optimizer_of(config), *PUBLISHED[request.param]


@pytest.mark.parametrize("iteration", [0, 1, 750, 1500, 80000])
def test_the_learning_rate_of_every_parameter_is_the_published_one(published, iteration):
    # Broken by a warm-up that replaces the decay, starts at 0 or ends one iteration off, and by a scale one layer off.
    config, optimizer, groups, _, base, decay, depth = published
    apply_schedules(optimizer, iteration, learning_rate(config), None)
    expected = base * (1 - iteration / 160000)
    if iteration < 1500:
        expected *= 1 - (1 - iteration / 1500) * (1 - 1e-6)
    for name, group in groups.items():
        scale = decay ** (depth + 2 - official_layer(name, depth) - 1)
        assert group["lr"] == pytest.approx(expected * scale, rel=1e-9), name


def test_biases_and_norms_do_not_decay_but_class_token_and_tables_do(published):
    config, _, groups, segmentor, *_ = published
    assert config.weight_decay == 0.05
    shapes = {name: parameter.ndim for name, parameter in segmentor.named_parameters()}
    for name, group in groups.items():
        decays = not name.endswith("bias") and shapes[name] > 1
        assert group["weight_decay"] == (0.05 if decays else 0), name
    assert groups["backbone.cls_token"]["weight_decay"] == 0.05
    assert groups["backbone.blocks.3.attn.relative_position_bias_table"]["weight_decay"] == 0.05
    for name in ("backbone.blocks.0.norm1.weight", "backbone.blocks.0.gamma_1", "decode_head.conv_seg.bias"):
        assert groups[name]["weight_decay"] == 0


def test_a_position_embedding_decays_as_in_the_official_code():
    # There it is compared by a name without "backbone.", which no parameter of a segmentor has.
    _, groups, _ = optimizer_of(read_train([BASE, "--abs_pos_emb"]))
    assert groups["backbone.pos_embed"]["weight_decay"] == 0.05
    assert groups["backbone.pos_embed"]["lr_scale"] == pytest.approx(0.65**13)


def test_a_step_of_several_batches_has_the_rate_of_the_last_of_them():
    # mmcv counts iterations, and its optimizer steps where an iteration's number, from 1, is a multiple of two.
    config = resolve_batch(read_train([LARGE_640]), 8)
    assert (config.batch_size, config.update_freq, config.max_steps, config.warmup_steps) == (1, 2, 160000, 1500)
    rate = learning_rate(config)
    for step in (0, 1, 749, 1500, 80000, 159999):
        iteration = 2 * (step + 1) - 1
        expected = 2e-5 * (1 - iteration / 320000)
        if iteration < 3000:
            expected *= 1 - (1 - iteration / 3000) * (1 - 1e-6)
        assert rate(step) == pytest.approx(expected, rel=1e-9)


def test_durations_given_in_batches_are_steps():
    flags = "--max_iters 24 --eval_interval 6 --checkpoint_interval 8 --update_freq 2 --save_ckpt_steps 3 --clip_grad 1"
    settings = Segmentation(read_train([BASE, *flags.split()])).loop_settings()
    assert (settings.total_steps, settings.evaluate_every, settings.save_every) == (12, 3, 4)
    assert (settings.update_freq, settings.save_last_every, settings.clip_grad) == (2, 3, 1)
    assert settings.period == Period("step")
    assert settings.best_metric == "mIoU"


# The objective


def naive_loss(logits: torch.Tensor, labels: torch.Tensor, average: str) -> float:
    """Cross-entropy pixel by pixel."""
    losses = []
    for image, rows in enumerate(labels.tolist()):
        for y, row in enumerate(rows):
            for x, label in enumerate(row):
                if label != 255:
                    scores = logits[image, :, y, x].tolist()
                    losses.append(math.log(sum(map(math.exp, scores))) - scores[label])
    count = labels.numel() if average == "all" else max(1, len(losses))
    return sum(losses) / count


def random_batch(ignored: float, classes: int = 3, size: tuple[int, ...] = (2, 5, 7)):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(size[0], classes, *size[1:], generator=generator)
    labels = torch.randint(classes, size, generator=generator)
    return logits, labels.masked_fill(torch.rand(size, generator=generator) < ignored, 255)


@pytest.mark.parametrize("ignored", [0, 0.4, 1])
@pytest.mark.parametrize("average", ["all", "valid"])
def test_the_loss_is_the_mean_over_all_or_over_labelled_pixels(average, ignored):
    logits, labels = random_batch(ignored)
    assert (labels == 255).any() == (ignored > 0)
    logits.requires_grad_()
    loss = pixel_loss(logits, labels, average)
    assert loss.item() == pytest.approx(naive_loss(logits.detach(), labels, average), rel=1e-5)
    loss.backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad.permute(1, 0, 2, 3)[:, labels == 255].any()


@pytest.mark.parametrize("ignored", [0.4, 1])
def test_accuracy_is_that_of_labelled_pixels(ignored):
    logits, labels = random_batch(ignored)
    guesses = logits.argmax(dim=1)
    pairs = torch.stack([guesses, labels]).flatten(1).T.tolist()
    right = [guess == label for guess, label in pairs if label != 255]
    expected = sum(right) / max(1, len(right))
    assert pixel_accuracy(logits, labels).item() == pytest.approx(expected)


class StandIn(nn.Module):
    """Gives logits of a half and a quarter of the images' size, whatever they show."""

    def __init__(self, auxiliary: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.logits = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.bfloat16)
        self.auxiliary = torch.randn(2, 3, 2, 2, generator=generator) if auxiliary else None

    def forward(self, _images):
        return self.logits, self.auxiliary


@pytest.mark.parametrize("average", ["all", "valid"])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_both_heads_learn_at_the_size_of_the_labels(auxiliary, average):
    # Broken by labels that are made smaller instead, by a loss in bfloat16, and by another weight.
    _, labels = random_batch(0.3, size=(2, 8, 8))
    image = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    batch = {"image": image, "label": labels.to(torch.uint8), "size": torch.tensor([[8, 8], [8, 8]])}
    model = StandIn(auxiliary)
    loss, metrics = PixelClassification(auxiliary_weight=0.4, average=average)(model, batch, 0)
    whole = F.interpolate(model.logits.float(), size=(8, 8), mode="bilinear", align_corners=False)
    expected = naive_loss(whole, labels, average)
    assert metrics["decode_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert metrics["pixel_acc"].item() == pytest.approx(pixel_accuracy(whole, labels).item())
    assert ("aux_loss" in metrics) == auxiliary
    if auxiliary:
        other = F.interpolate(model.auxiliary, size=(8, 8), mode="bilinear", align_corners=False)
        assert metrics["aux_loss"].item() == pytest.approx(naive_loss(other, labels, average), rel=1e-5)
        expected += 0.4 * naive_loss(other, labels, average)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_padding_is_zero_after_normalisation_and_the_rest_is_normalised():
    # Broken by padding before normalisation, which makes it the darkest black, and by rows taken for columns.
    images = torch.randint(256, (3, 3, 6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sizes = [(6, 8), (4, 8), (3, 5)]
    got = model_input({"image": images, "size": torch.tensor(sizes)})
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    for image, (height, width), ours in zip(images, sizes, got, strict=True):
        assert torch.allclose(ours[:, :height, :width], ((image / 255 - mean) / std)[:, :height, :width], atol=1e-6)
        padding = torch.ones(6, 8, dtype=torch.bool)
        padding[:height, :width] = False
        assert not ours[:, padding].any()


# What a run records


@pytest.mark.parametrize("bias", [(), ("--disable_rel_pos_bias",)])
def test_a_checkpoint_describes_its_segmentor(tmp_path, bias):
    # Neither taps nor the auxiliary head's tap can be read off the shapes, nor heads where there is no bias for each.
    flags = "--out_indices 0 2 3 4 --auxiliary_index 1 --head_channels 8 --auxiliary_channels 6 --crop_size 48x32"
    sizes = ("--model_kwargs", "patch_size=8", "embed_dim=24", "depth=5", "num_heads=6")
    config = read_train(["upernet_beit_tiny_64_slide_ade20k", *flags.split(), *bias, *sizes, "--slide_stride", "16"])
    segmentor = build_segmentor(**segmentor_arguments(config, 3)).eval()
    for parameter in segmentor.parameters():
        nn.init.normal_(parameter, std=0.2)
    classes = named_classes(["sky", "a road", "tree"], [(1, 2, 3), (4, 5, 6), (250, 255, 0)])
    # The settings tell some of it too, but not where a model's name stands for its sizes.
    settings = {key: value for key, value in to_plain(config).items() if key not in TOLD_APART}
    task = Segmentation(config)
    task.model, task.classes = segmentor, classes
    task.train = task.val = ImagePairs((), (), tmp_path)
    content = {"model": segmentor.state_dict(), "args": settings, **task.extras()}
    torch.save(content, tmp_path / "checkpoint.pth")

    weights, metadata = read_weights(tmp_path / "checkpoint.pth")
    again = segmentor_from(weights, metadata)
    assert again.backbone.out_indices == (0, 2, 3, 4)
    assert again.img_size == (48, 32)
    assert again.auxiliary_head.index == segmentor.auxiliary_head.index == 1
    images = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.segment(images), segmentor.segment(images))
    assert tuple(metadata["labels"]) == classes.names
    assert tuple(metadata["palette"]) == classes.colours
    assert metadata["reduce_zero_label"] is True
    assert (tuple(metadata["mean"]), tuple(metadata["std"])) == (MEAN, STD)


def test_a_backbone_or_a_whole_segmentor_can_be_what_a_run_starts_from(tmp_path, caplog):
    # Broken if the heads of a segmentor are left out, or asked of a backbone.
    config = read_train(["upernet_beit_tiny_64_slide_ade20k"])
    source, segmentor = (build_segmentor(**segmentor_arguments(config, 3)) for _ in range(2))
    torch.save({"model": source.state_dict(), "args": to_plain(config)}, tmp_path / "segmentor.pth")
    start_from(segmentor, str(tmp_path / "segmentor.pth"), "abc")
    assert torch.equal(segmentor.decode_head.conv_seg.weight, source.decode_head.conv_seg.weight)
    backbone = {name: tensor for name, tensor in source.backbone.state_dict().items() if not name.startswith("fpn")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    segmentor = build_segmentor(**segmentor_arguments(config, 3))
    start_from(segmentor, str(tmp_path / "backbone.pth"), "abc")
    assert torch.equal(segmentor.backbone.blocks[3].mlp.fc2.weight, source.backbone.blocks[3].mlp.fc2.weight)
    assert not torch.equal(segmentor.decode_head.conv_seg.weight, source.decode_head.conv_seg.weight)
    start_from(segmentor, "", "abc")
    assert "no --init_from: the backbone is initialised from scratch" in caplog.text


@pytest.mark.parametrize(
    ("learnt", "wanted", "rows"),
    [
        (["sky", "road", "tree"], ["sky", "road", "tree", "car"], [0, 1, 2, None]),
        (["sky", "road", "tree"], ["car", "Tree "], [None, 2]),
        (["sky", "road", "tree"], ["tree", "sky", "road"], [2, 0, 1]),
        (["sky", "road", "tree"], ["cat", "dog", "cow"], [None] * 3),
        (None, ["sky", "road"], [None] * 2),
        (None, ["sky", "road", "tree"], [0, 1, 2]),
        (["sky"] * 9, ["sky", "road", "tree"], [0, 1, 2]),  # names of something else
    ],
)
def test_classifiers_of_other_classes_are_taken_over_by_name(tmp_path, caplog, learnt, wanted, rows):
    # Broken by a checkpoint of other classes that is refused, and by one whose rows get other names without a word.
    config = read_train(["upernet_beit_tiny_64_slide_ade20k"])
    source, segmentor = (build_segmentor(**segmentor_arguments(config, number)) for number in (3, len(wanted)))
    recorded = {"labels": learnt} if learnt else {}
    torch.save({"model": source.state_dict(), "args": to_plain(config), **recorded}, tmp_path / "segmentor.pth")
    before, theirs = ({k: v.clone() for k, v in model.state_dict().items()} for model in (segmentor, source))
    start_from(segmentor, str(tmp_path / "segmentor.pth"), wanted)
    ours = segmentor.state_dict()
    for name, tensor in ours.items():
        if ".conv_seg." in name:
            for row, place in enumerate(rows):
                assert torch.equal(tensor[row], before[name][row] if place is None else theirs[name][place])
        elif not name.endswith("relative_position_index"):
            assert torch.equal(tensor, theirs[name]), name
    said = f"{len(rows) - rows.count(None)} of {len(rows)} classes matched by name"
    assert (said in caplog.text) is (rows != [0, 1, 2])
