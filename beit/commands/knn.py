"""Weighted nearest neighbours: how well do distances between frozen features tell classes apart? Nothing is trained.

Source: instance discrimination (arXiv 1805.01978), section 3.4; the setting of DINO (arXiv 2104.14294).
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit.checkpoints.load import architecture_of, read_weights
from beit.config import Size, option
from beit.data.classification import (
    DATA_SETS,
    ClassificationEvalTransform,
    LabelledImages,
    check_classes,
    find_images,
    labelled_dataset,
)
from beit.data.loaders import EpochLoader
from beit.errors import InputError
from beit.features import Feature, FrozenFeatures
from beit.inference import Preprocessing, preprocessing_of
from beit.modeling import Backbone
from beit.storage import atomic_write
from beit.tasks.settings import AMP_CHOICES
from beit.training import distributed
from beit.training.precision import Precision, resolve_amp_dtype
from beit.training.session import Session, open_session
from beit.zoo import build, create_model, open_model

logger = logging.getLogger(__name__)

CHUNK = 2048  # queries, and candidates, whose similarities are computed at once: 16 MB
LARGE_BANK = 16e9  # bytes of host memory from which on features are worth a warning


@dataclass(frozen=True)
class KnnConfig:
    """The flags of ``beit knn``."""

    checkpoint: str = option("", "a path, a released name, a URL or a hub id; empty for --model, untrained")
    model: str = option("beit_base_patch16_224", "model name, where there is no --checkpoint")
    model_kwargs: dict[str, Any] | None = option(
        None, "more of the constructor of --model, such as patch_size=8 embed_dim=128"
    )
    untrained: bool = option(False, "take the checkpoint's architecture and not its weights, to compare with")
    data_set: str = option("IMNET", "kind of data; CIFAR is CIFAR-100", choices=DATA_SETS)
    data_path: str = option("", "folder of the data; with IMNET that of train and val")
    eval_data_path: str | None = option(None, "folder of validation images, for --data_set image_folder")
    input_size: Size | None = option(
        None, "size of the images, in pixels (HEIGHTxWIDTH or one number); the model's own"
    )
    layers: tuple[int, ...] = option((), "blocks whose output is taken, from 0 on; all by default")
    pool: tuple[str, ...] = option(("mean", "cls"), "what is taken of a block: mean, cls, cls_mean")
    k: tuple[int, ...] = option((10, 20), "how many neighbours vote")
    temperature: float = option(0.07, "a vote weighs exp(cosine similarity / temperature)")
    batch_size: int = option(64, "images per process and batch")
    num_workers: int = option(10, "data-loading processes per process")
    output: str = option("", "JSON file for the numbers", short="-o")
    device: str = option("cuda", "cuda, cpu or mps; the CPU where there is no CUDA")
    amp_dtype: str = option("auto", "number format of the forward pass", choices=AMP_CHOICES)
    seed: int = option(0, "seed of an untrained model's weights")
    local_rank: int = option(-1, "GPU of this process, as old launchers pass it; LOCAL_RANK wins")
    dist_url: str = option("env://", "where the processes meet")


@dataclass(frozen=True)
class Result:
    """What one feature scores.

    Args:
        layer: The block, from 0 on.
        pool: What is taken of it.
        k: How many neighbours vote.
        acc1: Validation images whose class is told right, in percent.
    """

    layer: int
    pool: str
    k: int
    acc1: float


def main(config: KnnConfig) -> None:
    """Scores features as the flags say; writes a table to standard output."""
    results = evaluate(config)
    if not results:  # on all but the main process
        return
    best = best_of(results)
    for result in results:
        mark = "  <- best" if result is best else ""
        sys.stdout.write(f"layer {result.layer:2}  {result.pool:<8}  k {result.k:3}  acc1 {result.acc1:6.2f}{mark}\n")
    if config.output:
        _write(config, results, best)


def best_of(results: Sequence[Result]) -> Result:
    """Returns the result with the highest accuracy, the first of equals."""
    return max(results, key=lambda result: result.acc1)


def evaluate(config: KnnConfig) -> list[Result]:
    """Scores features of every block asked for, on any number of processes.

    Returns:
        A result for each block, pool and k, on the main process; nothing on the others.

    Raises:
        InputError: Images or checkpoint are missing, or a setting cannot be used.
    """
    check_settings(config)
    with open_session(
        device=config.device,
        output_dir=None,
        settings="",
        seed=config.seed,
        local_rank=config.local_rank,
        dist_url=config.dist_url,
    ) as session:
        train = find_images(config.data_set, config.data_path, config.eval_data_path, train=True)
        val = find_images(config.data_set, config.data_path, config.eval_data_path, train=False)
        num_classes = len(check_classes([train, val]))
        if max(config.k) > len(train):
            raise InputError(f"--k {max(config.k)} neighbours, but {train.root} has {len(train)} images")
        model, preprocessing = build_model(config)
        features = freeze(config, model.to(session.device), preprocessing, session)
        _warn_of_size(features, len(train) + len(val), session)
        bank = compute(config, train, features, preprocessing, session, strict=False)
        queries = compute(config, val, features, preprocessing, session, strict=True)
        results = [
            result for f in features.features for result in score(config, f, bank, queries, num_classes, session.device)
        ]
        return results if distributed.is_main() else []


def check_settings(config: KnnConfig) -> None:
    """Raises :class:`InputError` for the first setting that cannot be used."""
    if not config.data_path:
        raise InputError("--data_path is missing: the folder of the images, with train and val in it")
    if not config.k or min(config.k) < 1:
        raise InputError(f"--k {' '.join(map(str, config.k))}: one neighbour or more must vote")
    if config.temperature <= 0:
        raise InputError(f"--temperature {config.temperature}: must be above 0")
    if config.untrained and not config.checkpoint:
        raise InputError(
            "--untrained needs a --checkpoint to take the architecture from; without one, --model is untrained"
        )


def build_model(config: KnnConfig) -> tuple[Backbone, Preprocessing]:
    """Opens the checkpoint, or builds an untrained model; and says how it wants its images.

    Raises:
        InputError: There is no such checkpoint or model.
    """
    metadata: Mapping[str, Any] = {}
    if config.untrained:
        weights, metadata = read_weights(config.checkpoint)
        model = build(architecture_of(weights, metadata), metadata.get("layer_norm_eps"))
    elif config.checkpoint:
        model, metadata = open_model(config.checkpoint)
    else:
        logger.warning("no --checkpoint: the model is untrained")
        try:
            model = create_model(config.model, **(config.model_kwargs or {}))
        except TypeError as error:
            raise InputError(f"--model {config.model} cannot be built: {error}") from error
    if config.input_size is not None:
        model.set_input_size(config.input_size)
    return model, preprocessing_of(model, metadata)


def freeze(config: KnnConfig, model: Backbone, preprocessing: Preprocessing, session: Session) -> FrozenFeatures:
    """Returns what computes the features."""
    precision = Precision(resolve_amp_dtype(config.amp_dtype, session.device), session.device)
    mean, std = preprocessing.mean, preprocessing.std
    return FrozenFeatures(model, layers=config.layers, pools=config.pool, mean=mean, std=std, precision=precision)


def _warn_of_size(features: FrozenFeatures, images: int, session: Session) -> None:
    needed = 4 * sum(feature.size for feature in features.features) * images / session.world_size
    if needed > LARGE_BANK:
        logger.warning("the features need %.0f GB of memory a process: fewer --layers need less", needed / 1e9)


# ------------------------------------------------------------------------------------------------------- the features
@dataclass(frozen=True)
class Share:
    """This process's part of a data set's features.

    Args:
        features: By name, float32 ``(n, D)``, of length 1, in host memory.
        labels: int64 ``(n,)``; -1 where there is none.
        positions: Where in the data set each is, int64 ``(n,)``.
        images: Length of the whole data set.
    """

    features: dict[str, Tensor]
    labels: Tensor
    positions: Tensor
    images: int


def compute(
    config: KnnConfig,
    images: LabelledImages,
    features: FrozenFeatures,
    preprocessing: Preprocessing,
    session: Session,
    strict: bool,
) -> Share:
    """Computes the features of this process's part of a data set, each image once over all processes.

    In the place of an image that cannot be read there is another; with ``strict`` its label is -1.
    """
    transform: ClassificationEvalTransform = preprocessing.transform
    loader = EpochLoader(
        labelled_dataset(images, transform, config.seed, strict),
        config.batch_size,
        rank=session.rank,
        world_size=session.world_size,
        num_workers=config.num_workers,
        pin_memory=session.device.type == "cuda",
        shuffle=False,
        drop_last=False,
    )
    found: dict[str, list[Tensor]] = {f.name: [torch.empty(0, f.size)] for f in features.features}
    labels, positions = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.long)]
    for number, batch in enumerate(loader.epoch(0)):
        outputs = features(batch["image"].to(session.device, non_blocking=True))
        for name, output in outputs.items():
            found[name].append(F.normalize(output, dim=-1).cpu())
        labels.append(batch["label"])
        start = (number * session.world_size + session.rank) * config.batch_size
        positions.append(torch.arange(start, start + len(batch["label"])))
    loader.close()
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return Share(joined, torch.cat(labels), torch.cat(positions), len(images))


def score(
    config: KnnConfig, feature: Feature, bank: Share, queries: Share, num_classes: int, device: torch.device
) -> list[Result]:
    """Scores one feature for every ``--k``; processes share their training features and count their own queries."""
    train, labels = whole(bank, feature.name, device)
    similarities, indices = nearest(queries.features[feature.name].to(device), train, max(config.k))
    own = queries.labels.to(device)
    readable = distributed.sum_over_ranks((own >= 0).sum()).item()
    results = []
    for k in config.k:
        votes = vote(similarities[:, :k], labels[indices[:, :k]], config.temperature, num_classes)
        right = distributed.sum_over_ranks((votes.argmax(dim=1) == own).sum())
        acc1 = 100 * right.item() / readable
        results.append(Result(feature.layer, feature.pool, k, acc1))
        logger.info("layer %d, %s, k %d: Acc@1 %.2f", feature.layer, feature.pool, k, acc1)
    return results


def whole(share: Share, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Puts the parts of all processes together: features ``(images, D)`` and labels ``(images,)`` on the device.

    Every process ends up with the same rows in the data set's order, whatever the number of processes.
    """
    own = share.features[name]
    rows = torch.zeros(share.images, own.shape[1], device=device)
    labels = torch.zeros(share.images, dtype=torch.long, device=device)
    positions = share.positions.to(device)
    rows[positions], labels[positions] = own.to(device), share.labels.to(device)
    return distributed.sum_over_ranks(rows), distributed.sum_over_ranks(labels)


# ----------------------------------------------------------------------------------------------------- the neighbours
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> float:
    """Classifies by a vote of the ``k`` nearest training features, weighed by ``exp(cosine similarity / temperature)``.

    Args:
        train_features: ``(N, D)``, of any length.
        train_labels: int64 ``(N,)``.
        test_features: ``(M, D)``.
        test_labels: int64 ``(M,)``.
        k: How many neighbours vote, at most ``N``.
        temperature: The smaller, the more the nearest ones count.
        num_classes: How many classes there are; as many as the labels need by default.

    Returns:
        Test features whose class gets the most votes, in percent.

    Raises:
        InputError: ``k`` is not between 1 and ``N``.
    """
    if not 1 <= k <= len(train_features):
        raise InputError(f"k is {k}: between 1 and the {len(train_features)} training features can vote")
    classes = num_classes or int(torch.cat([train_labels, test_labels]).max()) + 1
    queries, candidates = F.normalize(test_features, dim=-1), F.normalize(train_features, dim=-1)
    similarities, indices = nearest(queries, candidates, k)
    votes = vote(similarities, train_labels[indices], temperature, classes)
    return 100 * (votes.argmax(dim=1) == test_labels).double().mean().item()


def nearest(queries: Tensor, candidates: Tensor, k: int, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Finds the most similar candidates of each query, exactly, with a part of the similarities in memory at a time.

    Args:
        queries: ``(M, D)``, of length 1.
        candidates: ``(N, D)``, of length 1.
        k: How many to find, at most ``N``.
        chunk: Queries, and candidates, to compare at once.

    Returns:
        Cosine similarities, the highest first, and indices of candidates, both ``(M, k)``.
    """
    found = [_nearest_of_all(part, candidates, k, chunk) for part in queries.split(chunk)]
    values = torch.cat([values for values, _ in found]) if found else queries.new_empty(0, k)
    indices = torch.cat([indices for _, indices in found]) if found else torch.empty(0, k, dtype=torch.long)
    return values, indices.to(queries.device)


def _nearest_of_all(queries: Tensor, candidates: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    best = queries.new_empty(len(queries), 0)
    where = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(candidates), chunk):
        similarities = queries @ candidates[start : start + chunk].T  # (m, n)
        numbers = torch.arange(start, start + similarities.shape[1], device=queries.device).expand_as(similarities)
        best, where = torch.cat([best, similarities], dim=1), torch.cat([where, numbers], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        where = where.gather(1, order)
    return best, where


def vote(similarities: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Returns the votes ``(M, num_classes)`` of neighbours with these similarities and labels, both ``(M, k)``."""
    # Relative to the nearest, whose vote is 1: exp(1 / temperature) would leave float32's range below 0.0113.
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    return weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels, weights)


def _write(config: KnnConfig, results: Sequence[Result], best: Result) -> None:
    with atomic_write(config.output) as file:
        content = {"checkpoint": config.checkpoint, "untrained": config.untrained or not config.checkpoint}
        content |= {"best": vars(best), "results": [vars(result) for result in results]}
        file.write(json.dumps(content, indent=2).encode() + b"\n")
