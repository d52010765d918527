"""``beit features``: writes one vector of each image to a NumPy file."""

import logging

import numpy as np
from torch import Tensor

from beit.commands.settings import FeatureOptions, FeaturesConfig
from beit.commands.visualize_inputs import Viewer, open_viewer
from beit.data.datasets import ImageDataset
from beit.data.index import EncodedImages, index_images
from beit.data.loaders import EpochDataset, EpochLoader, EvenlySpread
from beit.errors import InputError
from beit.features import FrozenFeatures
from beit.inference import leave_out, reader, require_all_read
from beit.outputs import MARK, check_outputs
from beit.storage import atomic_write
from beit.training.precision import Precision, resolve_amp_dtype

logger = logging.getLogger(__name__)


def main(config: FeaturesConfig) -> None:
    """Writes the features of the images that can be read; raises InputError at the end if some could not be."""
    if not config.output.endswith(".npz"):
        raise InputError(f"-o {config.output or 'is missing'}: give the file to write, ending in .npz as features.npz")
    (output,) = check_outputs("--output", [config.output], config.overwrite)
    images = index_images(config.data_path)
    features, labels, numbers, loader = compute(config, images, open_viewer(config, whole=False))
    found = {
        "software": np.asarray(MARK.encode()),
        "paths": np.asarray([images.path(number) for number in numbers.tolist()]),
        "features": features.numpy(),
    }
    if images.class_names:
        found |= {"labels": labels.numpy(), "class_names": np.asarray(images.class_names)}
    with atomic_write(output) as file:
        np.savez(file, allow_pickle=False, **found)
    logger.info("%s written: features %s", output, tuple(features.shape))
    require_all_read(loader)


def compute(
    config: FeatureOptions, images: EncodedImages, viewer: Viewer, limit: int | None = None
) -> tuple[Tensor, Tensor, Tensor, EpochLoader]:
    """Computes a feature of at most ``limit`` images, at even distances; raises InputError if none can be read.

    Returns, of those that can be read, the features, float32 ``(n, D)``, the classes and the numbers, ``(n,)`` each;
    and the loader, which knows the others.
    """
    precision = Precision(resolve_amp_dtype(config.amp_dtype, viewer.device), viewer.device)
    layers, pools = (config.block,), (config.pool,)
    frozen = FrozenFeatures(
        viewer.model, layers=layers, pools=pools, mean=viewer.mean, std=viewer.std, precision=precision
    )
    (feature,) = frozen.features
    dataset: EpochDataset = ImageDataset(images, viewer.transform, labels=True, strict=True)
    if limit is not None and limit < len(images):
        dataset = EvenlySpread(dataset, limit)
    loader = reader(dataset, viewer.model, config.batch_size, config.num_workers, max_unreadable=len(images))
    share = frozen.of(loader)
    features, finite = share.features[feature.name], share.features[feature.name].isfinite().all(dim=1)
    for number in share.positions[~finite].tolist():
        leave_out(loader, number)
    readable = (share.labels >= 0) & finite
    if not readable.any():
        raise InputError(f"none of the {len(loader.dataset)} images of {images.root} can be read")
    return features[readable], share.labels[readable], share.positions[readable], loader
