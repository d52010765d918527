"""Windows, sizes and flips against naive versions, on a stand-in for a segmentor that looks at the whole window."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

import beit.attention
from beit.checkpoints.load import load_weights
from beit.errors import InputError
from beit.training.precision import Precision
from semantic_segmentation import inference
from semantic_segmentation.inference import (
    AnySize,
    cut_windows,
    enlarged,
    merge_windows,
    predict_each,
    window_starts,
)
from semantic_segmentation.modeling import build_segmentor

CLASSES = 5
PATCH = 4
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
FLOAT32 = Precision(torch.float32, torch.device("cpu"))


class StandIn(nn.Module):
    """Answers that depend on the place in the window and on everything in it, as those of attention do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Module()
        self.backbone.patch_embed = nn.Module()
        self.backbone.patch_embed.patch_size = (PATCH, PATCH)
        self.mix = nn.Conv2d(3, CLASSES, kernel_size=3, padding=1)
        self.sizes = []

    def segment(self, images, biases=None):
        assert not self.training
        assert images.shape[2] % PATCH == images.shape[3] % PATCH == 0
        self.sizes.append(tuple(images.shape))
        coarse = F.avg_pool2d(self.mix(images), PATCH)
        rows = torch.linspace(0, 1, coarse.shape[2])[:, None]
        columns = torch.linspace(0, 2, coarse.shape[3])
        seen = images.mean(dim=(1, 2, 3), keepdim=True)
        classes = torch.arange(CLASSES)[:, None, None] + 1
        logits = 4 * coarse + torch.sin(classes * (rows + columns)) + seen * torch.cos(classes.float())
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(inference, "COARSEST_STRIDE", 1)
    monkeypatch.setattr(inference, "at_size", lambda segmentor, size: segmentor)
    monkeypatch.setattr(inference, "_biases_fit", lambda *_: False)
    return StandIn().eval()


def make_image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, max(height // 6, 1), max(width // 6, 1), generator=generator)
    image = F.interpolate(coarse, size=(height, width), mode="bicubic")[0]
    return (image * 255).clamp(0, 255).round().to(torch.uint8)


def normalized(image):
    return ((image / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[None]


def whole(model, image, precision=FLOAT32, keep_biases=False):
    return AnySize(model, precision, keep_biases=keep_biases)(image)


def slide(model, image, *, crop, stride, batch_size, precision=FLOAT32):
    """The logits of an image (1, 3, H, W) from batches of its windows."""
    windows = torch.stack(list(cut_windows(image[0], crop, stride)))
    answers = (own for batch in windows.split(batch_size) for own in whole(model, batch, precision))
    return merge_windows(answers, image.shape[2:], crop, stride)[None]


def naive_whole(model, image):
    height, width = image.shape[2:]
    padded = torch.zeros(1, 3, math.ceil(height / PATCH) * PATCH, math.ceil(width / PATCH) * PATCH)
    padded[:, :, :height, :width] = image
    return model.segment(padded)[:, :, :height, :width]


def naive_slide(model, image, crop, stride):
    """Window by window, as the definition reads, with a count for every pixel."""
    height, width = image.shape[2:]
    padded = torch.zeros(1, 3, max(height, crop[0]), max(width, crop[1]))
    padded[:, :, :height, :width] = image
    total, count = torch.zeros(1, CLASSES, *padded.shape[2:]), torch.zeros(*padded.shape[2:])
    windows = 0
    for row in range(max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1):
        for column in range(max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1):
            bottom = min(row * stride[0] + crop[0], padded.shape[2])
            right = min(column * stride[1] + crop[1], padded.shape[3])
            top, left = bottom - crop[0], right - crop[1]
            total[:, :, top:bottom, left:right] += naive_whole(model, padded[:, :, top:bottom, left:right])
            count[top:bottom, left:right] += 1
            windows += 1
    assert count.min() > 0
    return (total / count)[:, :, :height, :width], windows


SIZES = {
    "fits": (32, 32),
    "odd": (61, 47),
    "one more than a window": (33, 32),
    "whole strides": (52, 72),
    "lower than a window": (19, 77),
    "narrower than a window": (45, 7),
    "smaller than a window": (13, 30),
    "a pixel": (1, 1),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("crop", "stride"), [((32, 32), (20, 20)), ((32, 24), (21, 9)), ((30, 32), (30, 32))])
@torch.no_grad()
def test_slide_is_the_naive_loop(size, crop, stride, stand_in):
    # Broken by a last window that is not shifted back, a wrong count, windows in another order, padding that stays.
    image = normalized(make_image(*size))
    expected, windows = naive_slide(stand_in, image, crop, stride)
    assert expected.shape == (1, CLASSES, *size)
    for batch_size in (1, 2, 3, windows, windows + 5):
        stand_in.sizes.clear()
        found = slide(stand_in, image, crop=crop, stride=stride, batch_size=batch_size)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        counts = [shape[0] for shape in stand_in.sizes]
        assert sum(counts) == windows
        assert counts[:-1] == [batch_size] * (windows // batch_size - (windows % batch_size == 0))


def test_windows_of_mmsegmentation():
    # Sizes and strides of the recipes; the numbers by hand from (size - crop + stride - 1) // stride + 1.
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(683, 512, 341) == [0, 171]
    assert window_starts(853, 512, 341) == [0, 341]
    assert window_starts(854, 512, 341) == [0, 341, 342]
    assert window_starts(1000, 640, 426) == [0, 360]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_whole_is_the_padded_image(size, stand_in):
    image = normalized(make_image(*size))
    torch.testing.assert_close(whole(stand_in, image), naive_whole(stand_in, image))


@pytest.fixture(scope="module")
def segmentor():
    torch.manual_seed(0)
    segmentor = build_segmentor(
        img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2, init_values=0.1, use_abs_pos_emb=False,
        use_rel_pos_bias=True, out_indices=(0, 1, 2, 3), num_classes=CLASSES, channels=8, auxiliary_channels=0,
    ).eval()  # fmt: skip
    for name, parameter in segmentor.named_parameters():
        if name.endswith(("bias_table", "conv_seg.weight")):
            nn.init.normal_(parameter, std=0.5)
    return segmentor


def resized(segmentor, size):
    """The segmentor built for another size, its tables resized by the loader of checkpoints."""
    other = build_segmentor(
        img_size=size, patch_size=8, embed_dim=16, depth=4, num_heads=2, init_values=0.1, use_abs_pos_emb=False,
        use_rel_pos_bias=True, out_indices=(0, 1, 2, 3), num_classes=CLASSES, channels=8, auxiliary_channels=0,
    ).eval()  # fmt: skip
    same = {name: tensor for name, tensor in segmentor.state_dict().items() if not name.endswith("bias_table")}
    other.load_state_dict(same, strict=False)
    backbone = {name[9:]: tensor for name, tensor in segmentor.state_dict().items() if name.startswith("backbone.")}
    load_weights(other.backbone, backbone, {})
    return other


@torch.no_grad()
def test_a_segmentor_sees_a_whole_image_of_any_size(segmentor):
    # Broken by position biases that are not resized, or resized for the image instead of the padded one.
    image = normalized(make_image(37, 59))
    found = whole(segmentor, image)
    expected = resized(segmentor, (40, 64)).segment(F.pad(image, (0, 5, 0, 3)))[..., :37, :59]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert whole(segmentor, image[..., :5, :3]).shape == (1, CLASSES, 5, 3)
    assert segmentor.img_size == (32, 32)


@torch.no_grad()
def test_logits_are_float32_under_autocast(segmentor):
    # Broken by sums in bfloat16: three digits, in which windows and classes tie.
    image = normalized(make_image(45, 50))
    low = Precision(torch.bfloat16, torch.device("cpu"))
    assert whole(segmentor, image, low).dtype == torch.float32
    found = slide(segmentor, image, crop=(32, 32), stride=(20, 20), batch_size=3, precision=low)
    assert found.dtype == torch.float32
    exact = slide(segmentor, image, crop=(32, 32), stride=(20, 20), batch_size=3)
    assert 0 < (found - exact).abs().max() < 0.1 * exact.abs().max()


def naive_prediction(model, image, views, logits_of):
    """Softmax of the logits at the image's size, averaged: ``views`` are sizes and whether to flip."""
    total = 0
    for size, flip in views:
        view = resize(image, size, InterpolationMode.BILINEAR, antialias=False)
        view = torch.flip(view, [2]) if flip else view
        logits = logits_of(model, normalized(view))
        logits = F.interpolate(logits, size=image.shape[1:], mode="bilinear", align_corners=False)
        probabilities = logits.softmax(dim=1)
        total = total + (torch.flip(probabilities, [3]) if flip else probabilities)
    return (total / len(views))[0]


def assert_likeliest(found, probabilities):
    """The prediction has the largest probability everywhere, but for rounding where two are equal."""
    assert found.dtype == torch.uint8
    assert found.shape == probabilities.shape[1:]
    of_found = probabilities.gather(0, found.long()[None])[0]
    assert (probabilities.max(dim=0).values - of_found).max() < 1e-5
    assert (found == probabilities.argmax(dim=0)).float().mean() > 0.99
    assert len(found.unique()) > 1


def run(model, image, **settings):
    ((_, classes),) = run_each(model, [(None, image)], **settings)
    return classes


SLIDE = {"crop": (32, 32), "stride": (20, 20)}


def slide_of(model, image):
    return naive_slide(model, image, (32, 32), (20, 20))[0]


VIEWS = {  # an image of 45 x 70 pixels, image_scale (96, 40): the short side decides, 40 / 45
    "plain": ({}, [((40, 62), False)]),
    "flip": ({"flip": True}, [((40, 62), False), ((40, 62), True)]),
    "the long side decides": ({"image_scale": (56, 40)}, [((36, 56), False)]),
    "multi-scale": ({"ratios": (0.5, 1.0, 1.75)}, [((20, 31), False), ((40, 62), False), ((70, 109), False)]),
    "bounded": (
        {"ratios": (0.5, 0.75, 1.0), "short_at_least": 32},
        [((32, 50), False), ((32, 50), False), ((40, 62), False)],
    ),
    "bounded, with flip": (
        {"ratios": (0.5, 0.75, 1.0), "short_at_least": 32, "flip": True},
        [(size, flip) for size in ((32, 50), (32, 50), (40, 62)) for flip in (False, True)],
    ),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("mode", ["slide", "whole"])
@torch.no_grad()
def test_prediction_is_the_mean_over_views(name, mode, stand_in):
    # Broken by logits averaged instead of probabilities, a flip that stays, a size that counts once instead of twice.
    image = make_image(45, 70)
    settings, views = VIEWS[name]
    logits_of = slide_of if mode == "slide" else naive_whole
    found = run(stand_in, image, **{"mode": mode, "image_scale": (96, 40), **SLIDE, **settings})
    assert_likeliest(found, naive_prediction(stand_in, image, views, logits_of))


def test_sizes_that_coincide_are_computed_once(stand_in):
    # The official multi-scale test: of six ratios the first three are one size.
    settings = inference.TestSettings(ratios=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), short_at_least=512)

    def sizes(*size):
        return {view: times for view, _, times in inference._views(size, settings)}

    assert sizes(500, 750) == {(512, 768): 3, (640, 960): 1, (768, 1152): 1, (896, 1344): 1}
    assert [*sizes(750, 500)][2] == (1152, 768)
    assert min(min(size) for size in sizes(100, 900)) == 512  # no limit on the long side
    run(stand_in, make_image(40, 40), mode="whole", image_scale=(64, 64), ratios=(0.5, 1.0), short_at_least=64)
    assert stand_in.sizes == [(1, 3, 64, 64)]


def test_predictions_do_not_depend_on_windows_at_once(stand_in):
    image = make_image(61, 47)
    results = [run(stand_in, image, image_scale=(128, 90), batch_size=number, **SLIDE) for number in (1, 2, 5, 99)]
    assert all(torch.equal(result, results[0]) for result in results)


MANY = [(61, 47), (32, 32), (19, 77), (45, 70), (13, 30), (90, 40)]


@pytest.mark.parametrize(
    "settings",
    [
        {"image_scale": (96, 40), **SLIDE},
        {"image_scale": (96, 40), "ratios": (0.5, 1.0, 1.75), "short_at_least": 32, "flip": True, **SLIDE},
        {"image_scale": (96, 40), "flip": True, "mode": "whole", **SLIDE},
    ],
    ids=["slide", "several sizes, mirrored", "whole"],
)
@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_images_together_are_what_they_are_alone(settings, batch_size, stand_in):
    # Broken by windows that go to another image, to another place, or to no image because a batch was not full.
    images = [make_image(*size, seed=number) for number, size in enumerate(MANY)]
    alone = [run(stand_in, image, **settings) for image in images]
    stand_in.sizes.clear()
    found = run_each(stand_in, enumerate(images), **settings, batch_size=batch_size)
    assert [number for number, _ in found] == list(range(len(images)))
    assert all(torch.equal(classes, own) for (_, classes), own in zip(found, alone, strict=True))
    if settings.get("mode") != "whole":
        assert [shape[0] for shape in stand_in.sizes[:-1]] == [batch_size] * (len(stand_in.sizes) - 1)


def run_each(model, images, **settings):
    settings = inference.TestSettings(**settings)
    return list(predict_each(model, images, settings, mean=MEAN, std=STD, precision=FLOAT32))


def test_whole_images_of_one_size_go_together_as_far_as_windows_have_the_pixels(stand_in):
    images = [make_image(*size) for size in [(40, 40), (40, 40), (40, 40), (40, 60), (80, 160), (80, 160)]]
    run_each(
        stand_in, enumerate(images), mode="whole", image_scale=(160, 80), batch_size=4, crop=(60, 60), stride=(60, 60)
    )
    # A window has 3600 pixels, so that two images of 80 x 80 fit, and of larger ones a single one.
    assert stand_in.sizes == [(2, 3, 80, 80), (1, 3, 80, 80), (1, 3, 80, 120), (1, 3, 80, 160), (1, 3, 80, 160)]


def test_images_are_taken_ahead_no_further_than_a_batch_reaches(stand_in):
    # Broken by a data set that is read into memory before the first prediction.
    taken = []

    def images():
        for number in range(20):
            taken.append(number)
            yield number, make_image(32, 32)

    settings = inference.TestSettings(batch_size=3, image_scale=(64, 32), **SLIDE)
    for number, _ in predict_each(stand_in, images(), settings, mean=MEAN, std=STD, precision=FLOAT32):
        assert len(taken) <= number + 1 + 3


@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_segmentor_gives_the_same_labels_in_batches(segmentor, batch_size):
    # With attention, batch norm and the fused head, not a stand-in; equal but for ties of rounding.
    images = [make_image(*size, seed=number) for number, size in enumerate(MANY)]
    settings = {"image_scale": (96, 40), **SLIDE}
    alone = torch.cat([run(segmentor, image, **settings, batch_size=1).flatten() for image in images])
    found = run_each(segmentor, enumerate(images), **settings, batch_size=batch_size)
    together = torch.cat([classes.flatten() for _, classes in found])
    assert (alone == together).float().mean() > 0.9999
    assert len(together.unique()) > 1
    windows = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        one_by_one = torch.cat([whole(segmentor, window[None]) for window in windows])
        torch.testing.assert_close(whole(segmentor, windows), one_by_one, rtol=1e-5, atol=1e-5)


def test_biases_are_looked_up_once_for_all_windows(segmentor, monkeypatch):
    # Breaks when tables are looked up for each window, or kept where they would fill the memory.
    gathered = []
    original = beit.attention.relative_position_bias
    monkeypatch.setattr(beit.attention, "relative_position_bias", lambda *args: gathered.append(1) or original(*args))
    image, settings = make_image(61, 75), {"image_scale": (128, 61), **SLIDE, "batch_size": 1}
    kept = run(segmentor, image, **settings)
    assert len(gathered) == segmentor.get_num_layers()
    monkeypatch.setattr(inference, "MOST_BIAS_BYTES", 4 * 4 * 2 * 17 * 17 - 1)  # 4 layers, 2 heads, 16 + 1 tokens
    assert torch.equal(run(segmentor, image, **settings), kept)
    assert len(gathered) > 2 * segmentor.get_num_layers()


def test_biases_of_a_size_are_those_of_the_resized_tables(segmentor):
    # Breaks when the biases of one size are passed to the model of another, or outlive the call.
    image = normalized(make_image(45, 50))
    plain = whole(segmentor, image)
    torch.testing.assert_close(whole(segmentor, image, keep_biases=True), plain, rtol=0, atol=0)
    model = AnySize(segmentor, FLOAT32, keep_biases=True)
    for height, width in ((45, 50), (32, 32), (45, 50), (64, 64), (72, 64), (32, 80), (45, 50)):
        part = normalized(make_image(height, width))
        torch.testing.assert_close(model(part), whole(segmentor, part), rtol=0, atol=0)


@pytest.mark.parametrize("band_pixels", [1, 47 * 4 + 1, 47 * 60])
@pytest.mark.parametrize("size", [(61, 47), (9, 47), (20, 5)])
def test_bands_of_rows_are_the_resized_whole(band_pixels, size, monkeypatch):
    # Broken by a band that does not see the rows beyond its edge, or places pixels by their corners.
    monkeypatch.setattr(inference, "BAND_PIXELS", band_pixels)
    logits = torch.randn(3, 20, 31, generator=torch.Generator().manual_seed(0))
    found = torch.full((3, *size), math.nan)
    for rows, band in enlarged(logits, size):
        found[:, rows] = band
    expected = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_photograph_is_predicted_in_bands(stand_in, monkeypatch):
    image = make_image(61, 47)
    settings = {"image_scale": (64, 32), **SLIDE}
    for flip in (False, True):
        at_once = run(stand_in, image, flip=flip, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(inference, "BAND_PIXELS", 200)
            assert (run(stand_in, image, flip=flip, **settings) == at_once).float().mean() > 0.99


def test_the_model_can_learn_on_after_a_prediction(segmentor):
    # Broken by inference tensors left in the model, and by dropout or batch statistics during a prediction.
    segmentor.train()
    before = {name: tensor.clone() for name, tensor in segmentor.state_dict().items()}
    found = run(segmentor, make_image(45, 50), image_scale=(64, 40), mode="whole")
    found[0, 0] = 255  # an ordinary tensor
    assert not segmentor.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in segmentor.state_dict().items())
    segmentor.segment(torch.randn(1, 3, 32, 32)).sum().backward()
    segmentor.zero_grad()


MISTAKES = {
    "mode": ({"mode": "sldie"}, "slide or whole"),
    "gaps": ({"stride": (341, 513)}, "the stride of the windows"),
    "no stride": ({"stride": (0, 341)}, "got 0"),
    "no ratio": ({"ratios": ()}, "at least one"),
    "a negative ratio": ({"ratios": (1.0, -0.5)}, "positive"),
    "no window": ({"batch_size": 0}, "at least 1 window"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_said_in_one_line(name):
    settings, part = MISTAKES[name]
    with pytest.raises(InputError) as caught:
        inference.TestSettings(**settings)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_windows_do_not_wait_for_the_gpu(segmentor):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    on_gpu = resized(segmentor, (32, 32)).cuda()
    image = normalized(make_image(61, 75)).cuda()
    windows = {"crop": (32, 32), "stride": (20, 20), "batch_size": 4}
    on_device = Precision(torch.float32, torch.device("cuda"))
    slide(on_gpu, image, **windows, precision=on_device)  # the first call compiles and allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = slide(on_gpu, image, **windows, precision=on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = slide(segmentor.eval(), image.cpu(), **windows)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-2)
