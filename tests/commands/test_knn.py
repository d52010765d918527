"""Nearest neighbours: the vote against naive code, and the command on small images."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from beit.__main__ import main as beit
from beit.commands import knn
from beit.commands.settings import KnnConfig
from beit.data.classification import ClassificationEvalTransform
from beit.data.datasets import read_image
from beit.errors import InputError
from beit.features import nearest, vote
from beit.storage import save_checkpoint
from beit.zoo import create_model
from tests.shell import run

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def naive_votes(train, labels, queries, k, temperature, classes):
    """One query at a time, in plain Python."""
    votes = []
    for query in queries.tolist():
        cosines = []
        for candidate, label in zip(train.tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, candidate, strict=True))
            length = math.sqrt(sum(a * a for a in query)) * math.sqrt(sum(b * b for b in candidate))
            cosines.append((dot / length, label))
        tally = [0.0] * classes
        for cosine, label in sorted(cosines, reverse=True)[:k]:
            tally[label] += math.exp(cosine / temperature)
        votes.append(tally)
    return votes


def accuracy(train, labels, queries, truth, k, temperature=0.07):
    """The accuracy in percent by the command's own functions, of features of any length."""
    similarities, indices = nearest(F.normalize(queries, dim=1), F.normalize(train, dim=1), k)
    votes = vote(similarities, labels[indices], temperature, 5)
    return 100 * (votes.argmax(1) == truth).double().mean().item()


@pytest.fixture(scope="module")
def points():
    """Clusters that overlap, in float64, where the order of similarities does not depend on the order of sums."""
    torch.manual_seed(0)
    centres = torch.randn(5, 8, dtype=torch.float64)
    labels, queries = torch.randint(5, (120,)), torch.randint(5, (40,))
    scale = 1 + torch.rand(120, 1, dtype=torch.float64)  # lengths must not matter
    train = scale * (centres[labels] + torch.randn(120, 8, dtype=torch.float64))
    test = centres[queries] + torch.randn(40, 8, dtype=torch.float64)
    return train, labels, test, queries


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (10, 0.07), (20, 0.5), (120, 0.07), (20, 0.002)])
def test_the_vote_is_the_naive_one(points, k, temperature):
    # Broken by votes that do not weigh, by distances instead of angles, or by features of unequal length.
    train, labels, test, truth = points
    expected = torch.tensor(naive_votes(train, labels, test, k, temperature, 5), dtype=torch.float64)
    right = (expected.argmax(1) == truth).double().mean().item() * 100
    assert accuracy(train, labels, test, truth, k, temperature) == pytest.approx(right)
    similarities, indices = nearest(F.normalize(test, dim=1), F.normalize(train, dim=1), k)
    votes = vote(similarities, labels[indices], temperature, 5)
    torch.testing.assert_close(votes / votes.sum(1, keepdim=True), expected / expected.sum(1, keepdim=True))


def test_a_small_temperature_does_not_leave_the_numbers_range(points):
    # exp(1 / 0.005) is infinite in float32, and the vote of two classes with infinite votes is nothing.
    train, labels, test, truth = (tensor.float() if tensor.is_floating_point() else tensor for tensor in points)
    nearest_one = accuracy(train, labels, test, truth, k=1)
    assert accuracy(train, labels, test, truth, k=20, temperature=1e-6) == pytest.approx(nearest_one)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunks_change_nothing(points, chunk):
    # Broken by a best of one chunk that is forgotten for the next, and by numbers that count within a chunk.
    train, _, test, _ = points
    queries, candidates = F.normalize(test, dim=1), F.normalize(train, dim=1)
    values, indices = nearest(queries, candidates, 10, chunk)
    whole = (queries @ candidates.T).topk(10, dim=1)
    torch.testing.assert_close(values, whole.values)
    assert torch.equal(indices, whole.indices)


# The command


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of noise in three colours: 8 images each to train on, 3 and 2 to validate."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, counts in (("train", (8, 8, 8)), ("val", (3, 3, 2))):
        for number, (name, count) in enumerate(zip("abc", counts, strict=True)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (8, 8, 3), dtype=np.uint8)
                pixels[..., number] += rng.integers(0, 60, dtype=np.uint8)
                image = Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC)
                image.save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A pre-training checkpoint as the library writes it: shared bias, and ImageNet's mean in its settings."""
    torch.manual_seed(1)
    model = create_model("beit_tiny_patch16_224_8k_vocab", vocab_size=16, **TINY)
    torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    args = {"imagenet_default_mean_and_std": True, "input_size": 32, "model_kwargs": TINY}
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    save_checkpoint(path, {"model": model.state_dict(), "args": args})
    return path


def settings(images, **changes):
    given = {"data_path": str(images), "num_workers": 0, "device": "cpu", "batch_size": 5, "k": (3,)}
    return KnnConfig(**{**given, **changes})


def naive_tokens(model, folder):
    """Every block's tokens of all images, and their labels."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    paths = sorted(folder.glob("*/*.png"))
    views = torch.stack([ClassificationEvalTransform(32)(read_image(path))["image"] for path in paths])
    with torch.no_grad():
        blocks = model.eval().get_intermediate_layers((views / 255 - mean[:, None, None]) / std[:, None, None])
    return blocks, torch.tensor(["abc".index(path.parent.name) for path in paths])


def test_every_block_of_a_checkpoint_is_scored(images, checkpoint):
    # Broken by a checkpoint's mean that is not used, a bias table left out, or blocks and pools mixed up.
    results = knn.evaluate(settings(images, checkpoint=str(checkpoint), k=(1, 3)))
    assert [(r.layer, r.pool, r.k) for r in results] == [
        (layer, pool, k) for layer in (0, 1) for pool in ("mean", "cls") for k in (1, 3)
    ]
    model = create_model("beit_tiny_patch16_224_8k_vocab", vocab_size=16, **TINY)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    splits = [naive_tokens(model, images / split) for split in ("train", "val")]
    for result in results:
        pooled = []
        for blocks, labels in splits:
            tokens = blocks[result.layer]
            pooled += [tokens[:, 0] if result.pool == "cls" else tokens[:, 1:].mean(1), labels]
        assert result.acc1 == pytest.approx(accuracy(*pooled, k=result.k))


def test_a_query_that_cannot_be_read_is_left_out(images, checkpoint, tmp_path):
    # Breaks if another image is counted in its place: as one of 8, or as one more that is like the rest.
    damaged, without = tmp_path / "damaged", tmp_path / "without"
    for folder in (damaged, without):
        shutil.copytree(images, folder)
    (damaged / "val/c/1.png").write_bytes(b"no image")
    (without / "val/c/1.png").unlink()
    scores = [
        [result.acc1 for result in knn.evaluate(settings(folder, checkpoint=str(checkpoint)))]
        for folder in (damaged, without)
    ]
    assert scores[0] == scores[1]
    assert all((score * 7 / 100) == pytest.approx(round(score * 7 / 100)) for score in scores[0])
    for picture in (damaged / "val").rglob("*.png"):
        picture.write_bytes(b"no image")
    with pytest.raises(InputError, match="none of the validation images can be read"):
        knn.evaluate(settings(damaged, checkpoint=str(checkpoint)))


def test_a_table_and_a_file_are_written(images, checkpoint, tmp_path, capsys):
    output = tmp_path / "knn.json"
    argv = ["--data_path", images, "--num_workers", 0, "--device", "cpu", "--layers", -1, "--k", 1, 3, "-o", output]
    assert beit(["knn", *map(str, argv), "--checkpoint", str(checkpoint)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert sum("<- best" in line for line in lines) == 1
    written = json.loads(output.read_text())
    assert written["untrained"] is False
    assert {(result["layer"], result["pool"]) for result in written["results"]} == {(1, "mean"), (1, "cls")}
    assert written["best"] in written["results"]
    assert written["best"]["acc1"] == max(result["acc1"] for result in written["results"])
    assert beit(["knn", *map(str, argv), "--checkpoint", str(checkpoint)]) == 0  # the file is the command's own
    output.write_text("{}")
    assert beit(["knn", *map(str, argv), "--checkpoint", "nowhere.pth"]) == 2  # found before the checkpoint is
    assert "knn.json exists and was not written by beit" in capsys.readouterr().err
    assert output.read_text() == "{}"


def test_an_untrained_model_to_compare_with(images, checkpoint):
    # Broken by an "untrained" model that has the checkpoint's weights, or another one at each call.
    untrained = settings(images, checkpoint=str(checkpoint), untrained=True)
    model, preprocessing = knn.build_model(untrained)
    trained, same_preprocessing = knn.build_model(settings(images, checkpoint=str(checkpoint)))
    assert model.state_dict().keys() == trained.state_dict().keys()
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, trained.blocks[0].mlp.fc1.weight)
    assert preprocessing.mean == same_preprocessing.mean == (0.485, 0.456, 0.406)
    assert knn.evaluate(untrained) == knn.evaluate(untrained)
    by_name = settings(images, model="beit_tiny_patch16_224", model_kwargs=TINY, layers=(-1,), pool=("cls_mean",))
    (result,) = knn.evaluate(by_name)
    assert (result.layer, result.pool) == (1, "cls_mean")


def test_images_of_another_size(images, checkpoint):
    model, preprocessing = knn.build_model(settings(images, checkpoint=str(checkpoint), input_size=(48, 64)))
    assert model.img_size == preprocessing.transform.size == (48, 64)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(images, checkpoint, tmp_path, free_port):
    # Broken by images counted twice, or neighbours of one's own share only. 8 validation images in batches of 3 on
    # two processes: the shares differ in size.
    flags = ["--data_path", images, "--num_workers", 0, "--device", "cpu", "--checkpoint", checkpoint, "--k", 1, 3]
    flags += ["--batch_size", 3]
    run("-m", "beit", "knn", *flags, "--output", tmp_path / "one.json")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port}"]
    done = run(*launcher, "-m", "beit", "knn", *flags, "--output", tmp_path / "two.json")
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()
    assert done.stdout.count("<- best") == 1


MISTAKES = {
    "no images": ({"data_path": ""}, "--data_path is missing"),
    "missing images": ({"data_path": "nowhere"}, "nowhere"),
    "no neighbours": ({"k": (0,)}, "--k 0"),
    "no number of neighbours": ({"k": ()}, "--k is empty"),
    "too many neighbours": ({"k": (25,)}, "has 24 images"),
    "no temperature": ({"temperature": 0.0}, "--temperature"),
    "a temperature that is no number": ({"temperature": math.nan}, "--temperature"),
    "no heads": ({"checkpoint": "", "model_kwargs": {"num_heads": 0}}, "num_heads 0: must be above 0"),
    "untrained nothing": ({"checkpoint": "", "untrained": True}, "--untrained needs"),
    "no checkpoint": ({"checkpoint": "nowhere.pth"}, "nowhere.pth"),
    "unknown model": ({"checkpoint": "", "model": "beit_tinny_patch16_224"}, "did you mean"),
    "unknown keyword": ({"checkpoint": "", "model_kwargs": {"dept": 3}}, "cannot be built"),
    "no such block": ({"layers": (2,)}, "2 blocks"),
    "unknown pool": ({"pool": ("maen",)}, "did you mean 'mean'"),
    "no vector": ({"pool": ("map",)}, "no vector"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_said_in_one_line(mistake, images, checkpoint):
    changes, part = MISTAKES[mistake]
    with pytest.raises(InputError) as caught:
        knn.evaluate(settings(images, **{"checkpoint": str(checkpoint), **changes}))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
