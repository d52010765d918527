"""Pre-training with a mask strategy and a prediction target of one's own, registered from outside the package.

    python examples/own_target_and_masks.py --mask_strategy stripes --target hog \
        --data_path images/ --output_dir output/hog

All flags of ``run_beit_pretraining.py`` work; the registered names are further choices of two of them.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce
from numpy.typing import NDArray
from torch import Tensor

from beit.launch import launch
from beit.registry import MASK_STRATEGIES, TARGETS
from beit.targets import Batch, PredictionTarget
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


class HogTarget(PredictionTarget):
    """Histograms of oriented gradients, 9 directions per patch and colour (MaskFeat, arXiv 2112.09133).

    Args:
        patch_size: Height and width of a patch, in pixels.
    """

    name = "HOG of 9 directions"  # recorded in checkpoints: a run resumes only with the same target

    def __init__(self, patch_size: tuple[int, int]) -> None:
        self.patch_size, self.output_size = patch_size, 3 * 9

    @classmethod
    def build(cls, *, patch_size: tuple[int, int], **_: object) -> "HogTarget":
        """Takes the patch size from the run."""
        return cls(patch_size)

    def compute(self, batch: Batch, index: Tensor) -> Tensor:
        """Returns the histograms of patches, float32 ``(M, 27)``, each colour's of length 1."""
        images = F.pad(batch["image"].float(), (1, 1, 1, 1), mode="replicate")
        dy, dx = images[..., 2:, 1:-1] - images[..., :-2, 1:-1], images[..., 1:-1, 2:] - images[..., 1:-1, :-2]
        direction = (torch.atan2(dy, dx) % torch.pi / torch.pi * 9).long() % 9
        votes = F.one_hot(direction, 9) * torch.hypot(dx, dy).unsqueeze(-1)  # (B, 3, H, W, 9)
        p1, p2 = self.patch_size
        cells = reduce(votes, "b c (h p1) (w p2) k -> (b h w) c k", "sum", p1=p1, p2=p2)
        return F.normalize(cells, dim=-1).flatten(1)[index]

    def loss(self, outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Returns the mean squared error over the numbers of a patch."""
        errors = F.mse_loss(outputs.float(), targets, reduction="none").mean(dim=-1)  # (M,)
        return errors.mean() if reduction == "mean" else errors.sum()


MASK_STRATEGIES["stripes"] = StripeMasks
TARGETS["hog"] = HogTarget

if __name__ == "__main__":
    sys.exit(launch(PretrainingConfig, "beit.tasks.pretraining:main", __doc__))
