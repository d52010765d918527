"""``beit knn``: weighted nearest-neighbour classification with frozen features; nothing is trained.

Source: instance discrimination (arXiv 1805.01978), section 3.4; the setting of DINO (arXiv 2104.14294).
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from beit.checkpoints.read import Metadata, architecture_of, read_weights
from beit.commands.settings import KnnConfig
from beit.data.classification import check_classes, find_images, labelled_dataset
from beit.data.datasets import Images, Transform
from beit.errors import InputError
from beit.features import Feature, FrozenFeatures, Share, nearest, vote, whole
from beit.inference import Preprocessing, preprocessing_of, reader
from beit.modeling import Backbone
from beit.outputs import JSON_MARK, check_outputs
from beit.storage import atomic_write
from beit.training import distributed
from beit.training.precision import Precision, resolve_amp_dtype
from beit.training.session import Session, open_session
from beit.zoo import create_model, open_model

logger = logging.getLogger(__name__)

LARGE_BANK = 16e9  # bytes of host memory from which to warn


@dataclass(frozen=True)
class Result:
    """One feature's top-1 accuracy ``acc1``, in percent, with ``k`` neighbours; ``layer`` counts from 0."""

    layer: int
    pool: str
    k: int
    acc1: float


def main(config: KnnConfig) -> None:
    """Writes a table of results to standard output, and optionally a JSON file; raises as :func:`evaluate` does."""
    if config.output:
        check_outputs("--output", [config.output], config.overwrite)
    results = evaluate(config)
    if not results:  # on all but the main process
        return
    best = best_of(results)
    for result in results:
        mark = "  <- best" if result is best else ""
        sys.stdout.write(f"layer {result.layer:2}  {result.pool:<8}  k {result.k:3}  acc1 {result.acc1:6.2f}{mark}\n")
    if config.output:
        content = {**JSON_MARK, "checkpoint": config.checkpoint, "untrained": config.untrained or not config.checkpoint}
        content |= {"best": vars(best), "results": [vars(result) for result in results]}
        with atomic_write(config.output) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")


def best_of(results: Sequence[Result]) -> Result:
    """Returns the result with the highest accuracy, the first one if several are equal."""
    return max(results, key=lambda result: result.acc1)


def evaluate(config: KnnConfig) -> list[Result]:
    """Scores features of the chosen blocks, on any number of processes; all but the main one return an empty list."""
    if not config.k:
        raise InputError("--k is empty: give one or more numbers of neighbours")
    if config.untrained and not config.checkpoint:
        raise InputError("--untrained needs a --checkpoint, for its architecture; --model alone is untrained anyway")
    with open_session(
        device=config.device, output_dir=None, settings="", seed=config.seed, local_rank=config.local_rank,
        dist_url=config.dist_url,
    ) as session:  # fmt: skip
        source = (config.data_set, config.data_path, config.eval_data_path)
        train, val = find_images(*source, train=True), find_images(*source, train=False)
        num_classes = len(check_classes([train, val]))
        if max(config.k) > len(train):
            raise InputError(f"--k {max(config.k)}: {train.root} has {len(train)} images, give at most as many")
        model, preprocessing = build_model(config)
        features = FrozenFeatures(
            model.to(session.device),
            layers=config.layers,
            pools=config.pool,
            mean=preprocessing.mean,
            std=preprocessing.std,
            precision=Precision(resolve_amp_dtype(config.amp_dtype, session.device), session.device),
        )
        needed = 4 * sum(f.size for f in features.features) * (len(train) + len(val)) / session.world_size
        if needed > LARGE_BANK:
            logger.warning("the features need %.0f GB of memory per process; fewer --layers need less", needed / 1e9)
        transform = preprocessing.transform
        bank = compute(config, train, features, transform, session, strict=False)
        queries = compute(config, val, features, transform, session, strict=True)
        found = [it for f in features.features for it in score(config, f, bank, queries, num_classes, session.device)]
        return found if distributed.is_main() else []


def build_model(config: KnnConfig) -> tuple[Backbone, Preprocessing]:
    """Opens the checkpoint, or builds an untrained model; raises InputError if there is no such checkpoint or model."""
    metadata: Metadata = {}
    if config.untrained:
        weights, metadata = read_weights(config.checkpoint, **config.weights)
        model = architecture_of(weights, metadata, images=True).build()
    elif config.checkpoint:
        model, metadata = open_model(config.checkpoint, **config.weights)
    else:
        logger.warning("no --checkpoint: the model is untrained")
        try:
            model = create_model(config.model, **(config.model_kwargs or {}))
        except (TypeError, ValueError) as error:
            raise InputError(f"--model {config.model} cannot be built: {error}") from error
    if config.input_size is not None:
        model.set_input_size(config.input_size)
    return model, preprocessing_of(model, metadata)


def compute(
    config: KnnConfig,
    images: Images,
    features: FrozenFeatures,
    transform: Transform,
    session: Session,
    strict: bool,
) -> Share:
    """Computes the features of this process's part of a data set; with ``strict`` unreadable images have label -1."""
    dataset = labelled_dataset(images, transform, config.seed, strict)
    where = {"rank": session.rank, "world_size": session.world_size}
    return features.of(reader(dataset, features.model, config.batch_size, config.num_workers, **where))


def score(
    config: KnnConfig, feature: Feature, bank: Share, queries: Share, num_classes: int, device: torch.device
) -> list[Result]:
    """Scores one feature for every ``--k``; processes share their training features and count their own queries."""
    train, labels = whole(bank, feature.name, device)
    similarities, indices = nearest(queries.features[feature.name].to(device), train, max(config.k))
    own = queries.labels.to(device)
    readable = distributed.sum_over_ranks((own >= 0).sum()).item()
    if not readable:
        raise InputError("none of the validation images can be read")
    results = []
    for k in config.k:
        votes = vote(similarities[:, :k], labels[indices[:, :k]], config.temperature, num_classes)
        right = distributed.sum_over_ranks((votes.argmax(dim=1) == own).sum())
        results.append(Result(feature.layer, feature.pool, k, 100 * right.item() / readable))
        logger.info("layer %d, %s, k %d: Acc@1 %.2f", feature.layer, feature.pool, k, results[-1].acc1)
    return results
