"""A new training job in one file: predict by how much an image was rotated (RotNet, arXiv 1803.07728).

    python examples/rotation.py --data_path images/ --eval_data_path held_out/ --output_dir output/rotation

The task below says what differs from other jobs; everything else comes with it: distributed training, mixed precision,
exact resume, logs, checkpoints and every shared flag (``--help`` lists them). Its checkpoints are BEiT classifiers, so
fine-tuning takes them as they are: ``run_class_finetuning.py --init_from output/rotation/checkpoint-299.pth``.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from beit.checkpoints.load import load_pretrained
from beit.config import Size, option
from beit.data.datasets import ImageDataset
from beit.data.loaders import EpochLoader
from beit.data.preprocessing import normalization
from beit.data.transforms import normalize, size_pair
from beit.errors import InputError
from beit.launch import launch
from beit.tasks.base import Evaluation, Metrics, Task, find_together, named_model, run
from beit.tasks.settings import BatchOptions, CosineOptions, DataOptions, EpochOptions, RunOptions, TrainedModelOptions
from beit.training import distributed
from beit.training.loop import to_device
from beit.training.state import Batch, StepFunction

TURNS = 4  # 0, 90, 180 and 270 degrees
MEAN, STD = normalization(imagenet=False)


@dataclass(frozen=True)
class RotationConfig(DataOptions, TrainedModelOptions, BatchOptions, EpochOptions, CosineOptions, RunOptions):
    """The settings: groups that all jobs share, and what is particular to this one."""

    input_size: Size = option(224, "size of the square crops, in pixels")
    min_crop: float = option(0.5, "smallest crop, as a share of the image's area", within="(0, 1]")


class Rotation(Task[RotationConfig]):
    """A BEiT classifier of four rotations."""

    best_metric = "acc1"

    def check(self) -> None:
        """Refuses a size that a quarter turn would change."""
        if len(set(size_pair(self.config.input_size))) > 1:
            raise InputError(f"--input_size {self.config.input_size}: must be square, as images are rotated")

    def build_model(self) -> nn.Module:
        """Creates the classifier, from the weights of ``--init_from`` if given."""
        config = self.config
        sizes = {"img_size": config.input_size, "num_classes": TURNS}
        model = named_model(config, **sizes, drop_path_rate=config.drop_path, use_rel_pos_bias=config.rel_pos_bias)
        if config.init_from:
            load_pretrained(model, config.init_from, model_key=config.model_key, prefix=config.model_prefix)
        model.set_grad_checkpointing(config.grad_checkpointing)
        return model

    def images(self, path: str) -> ImageDataset:
        """Returns the rotated crops of a folder's images."""
        return ImageDataset(find_together(path), RotatedCrop(self.config), self.config.seed)

    def build_loader(self) -> EpochLoader:
        """Creates the loader of training images."""
        return self.loader_of(self.images(self.config.data_path))

    def build_objective(self) -> StepFunction:
        """Returns the cross-entropy over the four rotations."""
        return rotation_loss

    def build_evaluation(self) -> Evaluation | None:
        """Returns the accuracy on held-out images, rotated the same way every time, if there are any."""
        if not self.config.eval_data_path:
            return None
        loader = self.loader_of(self.images(self.config.eval_data_path), training=False)

        @torch.no_grad()
        def evaluate(model: nn.Module, _epoch: int) -> Metrics:
            model.eval()
            counts = torch.zeros(2, device=self.device)  # correct predictions, images
            for batch in loader.epoch(0):
                with self.precision.autocast():
                    _, metrics = rotation_loss(model, to_device(batch, self.device), 0)
                images = len(batch["turns"])
                counts += torch.stack((metrics["acc"] * images, counts.new_tensor(images)))
            correct, images = distributed.sum_over_ranks(counts).tolist()
            return {"acc1": 100 * correct / images}

        return evaluate


class RotatedCrop:
    """A random crop, rotated by a random number of quarter turns, which becomes its label."""

    def __init__(self, config: RotationConfig) -> None:
        self.crop = v2.RandomResizedCrop(size_pair(config.input_size), scale=(config.min_crop, 1.0))

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        """Returns ``image``, uint8 ``(3, H, W)``, and ``turns``, int64 ``()``; both follow from the sample's seed."""
        turns = int(rng.integers(TURNS))
        pixels = v2.functional.pil_to_tensor(self.crop(image))
        return {"image": pixels.rot90(turns, (1, 2)).contiguous(), "turns": torch.tensor(turns)}


def rotation_loss(model: nn.Module, batch: Batch, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of a batch, and the share of rotations predicted correctly."""
    logits = model(normalize(batch["image"], MEAN, STD)).float()
    return F.cross_entropy(logits, batch["turns"]), {"acc": (logits.argmax(-1) == batch["turns"]).float().mean()}


if __name__ == "__main__":
    sys.exit(launch(RotationConfig, lambda config: run(Rotation(config)), __doc__))
