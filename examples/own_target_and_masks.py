"""Pre-training with a mask strategy and a prediction target of one's own, registered from outside the package.

    python examples/own_target_and_masks.py --mask_strategy stripes --target thumbnails \
        --data_path images/ --output_dir output/thumbnails

All flags of ``run_beit_pretraining.py`` work; the registered names are further choices of two of them.
"""

import sys

import numpy as np
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from beit.launch import launch
from beit.registry import MASK_STRATEGIES, TARGETS
from beit.targets import Batch, RegressionTarget
from beit.tasks.settings import PretrainingConfig


class StripeMasks:
    """Masks whole rows of patches, or whole columns, with equal probability.

    Args:
        grid_size: Patches ``(h, w)`` of the image.
        num_mask_patches: Most patches masked in an image; at least one stripe is.
        **_: The sizes of blocks, which stripes have no use for.
    """

    def __init__(self, grid_size: tuple[int, int], num_mask_patches: int = 75, **_: object) -> None:
        self.grid_size, self.num_mask_patches = grid_size, num_mask_patches

    def __call__(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Returns a mask, bool ``(h, w)``."""
        mask = np.zeros(self.grid_size, dtype=bool)
        lines = mask if rng.random() < 0.5 else mask.T
        count = max(1, self.num_mask_patches // lines.shape[1])
        lines[rng.permutation(len(lines))[:count]] = True
        return mask


class ThumbnailTarget(RegressionTarget):
    """Each patch as a thumbnail of 2 x 2 pixels; the loss and the metric ``r2`` are the base class's."""

    name = "thumbnails of 2 x 2 pixels"  # recorded in checkpoints: a run resumes only with the same target
    output_size = 3 * 2 * 2

    def compute(self, batch: Batch, index: Tensor) -> Tensor:
        """Returns the thumbnails of patches in [0, 1], float32 ``(M, 12)``."""
        h, w = batch["mask"].shape[1:]
        small = F.adaptive_avg_pool2d(batch["image"] / 255, (2 * h, 2 * w))
        return rearrange(small, "b c (h p1) (w p2) -> (b h w) (p1 p2 c)", p1=2, p2=2)[index]


MASK_STRATEGIES["stripes"] = StripeMasks
TARGETS["thumbnails"] = ThumbnailTarget

if __name__ == "__main__":
    sys.exit(launch(PretrainingConfig, "beit.tasks.pretraining:main", __doc__))
