"""Segmentation on a GPU: it learns in its number formats with deterministic kernels, and sees what a CPU sees."""

import json
import math
from dataclasses import replace

import pytest
import torch

from beit.checkpoints.read import read_weights
from beit.training.precision import AMP_DTYPES, Precision
from examples.toy_images import write_segmentation_scenes
from semantic_segmentation import inference
from semantic_segmentation.data import SegmentationDataset, find_classes, find_pairs
from semantic_segmentation.modeling import segmentor_from
from tests.shell import run

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

DEVICE = "cuda"
TRAIN = "semantic_segmentation/tools/train.py"
TINY = "upernet_beit_tiny_64_slide_ade20k"
SLIDE = inference.TestSettings(crop=(64, 64), stride=(42, 42), image_scale=(256, 64))
VIEWS = {
    "slide": SLIDE,
    "whole": replace(SLIDE, mode="whole"),
    "several sizes": replace(SLIDE, ratios=(0.75, 1.0, 1.5), flip=True, short_at_least=64),
}


@pytest.mark.parametrize("amp_dtype", ["bf16", "fp16"])
def test_a_run_of_two_steps_and_what_its_segmentor_sees(tmp_path, amp_dtype):
    # Broken by an operation without a kernel for the format or a deterministic one, by a loss scale that spoils each
    # step, and by windows, sizes or resized biases that differ between the devices.
    scenes = tmp_path / "scenes"
    write_segmentation_scenes(scenes, 8, (64, 96), validation_count=3, coloured=True)
    flags = ("--samples_per_gpu", "4", "--max_iters", "2", "--warmup_iters", "0", "--num_workers", "0")
    where = ("--data_root", scenes, "--work-dir", tmp_path / "run", "--device", DEVICE)
    run(TRAIN, TINY, *flags, *where, "--amp_dtype", amp_dtype, "--deterministic")
    (line,) = (json.loads(text) for text in (tmp_path / "run" / "log.txt").read_text().splitlines())
    assert all(math.isfinite(line[f"train_{name}"]) for name in ("loss", "aux_loss", "grad_norm"))
    assert 0 <= line["test_mIoU"] <= 1

    weights, metadata = read_weights(tmp_path / "run" / "checkpoint-2.pth")
    # What has learnt for two steps sees one class: a classifier by chance sees several.
    weights["decode_head.conv_seg.weight"].normal_(generator=torch.Generator().manual_seed(0))
    on_device, on_cpu = segmentor_from(weights, metadata).to(DEVICE), segmentor_from(weights, metadata)
    pairs = find_pairs(scenes / "images/validation")
    images = SegmentationDataset(pairs, num_classes=len(find_classes(scenes)), reduce_zero_label=True)
    for name, settings in VIEWS.items():
        for image in (images[0, number]["image"] for number in range(len(images))):
            expected = segmented(on_cpu, image, settings, torch.float32)
            assert len(expected.unique()) > 1  # else agreement would say nothing
            for dtype, agreeing in ((torch.float32, 0.98), (AMP_DTYPES[amp_dtype], 0.9)):  # near ties fall either way
                found = segmented(on_device, image, settings, dtype)
                assert (found == expected).float().mean() >= agreeing, (name, dtype)


def segmented(segmentor, image, settings, dtype):
    """The classes of an image, computed where the segmentor is."""
    precision = Precision(dtype, next(segmentor.parameters()).device)
    how = {**inference.Statistics()._asdict(), "precision": precision}
    ((_, classes),) = inference.predict_each(segmentor, [(None, image)], settings, **how)
    return classes.cpu()
