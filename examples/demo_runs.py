"""What the demo makes and trains: its images, and the settings of each of its runs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beit.commands.knn import KnnConfig
from beit.config import option, read_yaml
from beit.errors import InputError
from beit.tasks.settings import DvaeConfig, FinetuningConfig, PretrainingConfig
from examples.toy_images import (
    BACKGROUND,
    SHAPES,
    write_digits,
    write_photograph_crops,
    write_scenes,
    write_segmentation_scenes,
)
from semantic_segmentation.config import TrainConfig

MARKER = "made_with.json"
TRAINING_LIST = "train.txt"  # all unlabelled training images, including digits; no held-out image
# Training and held-out images of the labelled data sets.
LABELLED = {"digits": ("digits/train", "digits/val"), "scenes": ("train/scenes", "held_out/scenes")}
STARTS = ("pretrained", "scratch")
# Layer decay by start.
FINETUNING_DECAY = {"pretrained": 0.8, "scratch": 1.0}
SEGMENTATION_DECAY = {"pretrained": 0.75, "scratch": 1.0}
STORED_PIXELS = 96  # larger than the model's input, so that not every random crop is blurred
IMAGE_PIXELS, PATCH_PIXELS = 64, 8  # a grid of 8 x 8 tokens
NUM_TOKENS = 256
MASKED_PATCHES = 26  # of 64: 40 %
MODEL = {"patch_size": PATCH_PIXELS, "embed_dim": 128, "depth": 6, "num_heads": 4}


@dataclass(frozen=True)
class DemoConfig:
    """The flags of ``python -m examples.demo``."""

    output_dir: str = option("demo", "folder for images, runs, pictures and results")
    quick: bool = option(False, "rehearse on a tiny budget; the models learn next to nothing")
    device: str = option("cpu", "cuda, cpu or mps")
    num_workers: int = option(0, "data-loading processes; training itself uses all cores")
    seed: int = option(0, "seed of images and training")


@dataclass(frozen=True)
class Budget:
    """How much is made and trained: training and held-out images; epochs, or steps, and batch sizes."""

    scenes: tuple[int, int] = (1800, 320)
    crops: tuple[int, int] = (600, 160)  # of photographs
    digits_per_class: int | None = None  # training and held-out; None for all
    labelled_scenes: tuple[int, int] = (800, 100)  # for segmentation
    dvae: tuple[int, int] = (5, 16)  # epochs and batch size, as for pre-training
    pretraining: tuple[int, int] = (15, 64)
    finetuning_epochs: int = 8  # on the digits
    segmentation_steps: int = 200


QUICK = Budget(
    scenes=(48, 16),
    crops=(16, 8),
    digits_per_class=8,
    labelled_scenes=(16, 4),
    dvae=(1, 16),
    pretraining=(1, 32),
    finetuning_epochs=1,
    segmentation_steps=2,
)


@dataclass(frozen=True)
class Demo:
    """The demo's images and runs."""

    config: DemoConfig

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.config.output_dir)

    @property
    def images(self) -> Path:
        """The folder of the images without pixel labels."""
        return self.folder / "images"

    @property
    def budget(self) -> Budget:
        """How much is made and trained."""
        return QUICK if self.config.quick else Budget()

    @property
    def checkpoint(self) -> Path:
        """The final checkpoint of pre-training."""
        return self.folder / "pretrain" / f"checkpoint-{self.budget.pretraining[0] - 1}.pth"

    def run_folder(self, start: str) -> Path:
        """Returns the run folder of a segmentation training."""
        return self.folder / "segmentation" / start

    def make_images(self) -> None:
        """Makes all images, unless they already exist; raises as :func:`make_once` and the functions that draw do."""
        recipe = {"budget": json.loads(json.dumps(asdict(self.budget))), "seed": self.config.seed}
        make_once(self.images, recipe, self._write_images)
        make_once(self.folder / "segmentation" / "scenes", recipe, self._write_labelled_scenes)

    def _write_images(self, folder: Path) -> None:
        seed = self.config.seed
        for number, split in enumerate(("train", "held_out")):
            # A scene depends on its seed and number: splits need different seeds. Crops are held out by region.
            scenes, crops = self.budget.scenes[number], self.budget.crops[number]
            write_scenes(folder / split / "scenes", scenes, STORED_PIXELS, seed=2 * seed + number)
            write_photograph_crops(folder / split / "photographs", crops, STORED_PIXELS, seed, held_out=bool(number))
        write_digits(folder / "digits", IMAGE_PIXELS, seed, self.budget.digits_per_class)
        training = sorted(path for part in ("train", "digits/train") for path in (folder / part).rglob("*.*"))
        names = (f"{path.relative_to(folder)}\n" for path in training)
        (folder / TRAINING_LIST).write_text("".join(names), encoding="utf-8")

    def _write_labelled_scenes(self, folder: Path) -> None:
        training, validation = self.budget.labelled_scenes
        write_segmentation_scenes(folder, training, STORED_PIXELS, self.config.seed, validation, coloured=True)
        (folder / "classes.txt").write_text("\n".join((BACKGROUND, *SHAPES)) + "\n", encoding="utf-8")

    def tokenizer(self) -> DvaeConfig:
        """Returns the settings of the tokenizer's training."""
        epochs, batch_size = self.budget.dvae
        return DvaeConfig(
            data_path=str(self.images / TRAINING_LIST),
            eval_data_path=str(self.images / "held_out"),
            output_dir=str(self.folder / "dvae"),
            input_size=IMAGE_PIXELS,
            codebook_size=NUM_TOKENS,
            codebook_dim=128,
            num_layers=3,
            hidden_dim=32,
            min_crop=0.3,
            epochs=epochs,
            batch_size=batch_size,
            warmup_steps=20,
            save_ckpt_freq=epochs,
            save_ckpt_steps=50,
            **self._machine(),
        )

    def pretraining(self) -> PretrainingConfig:
        """Returns the settings of pre-training."""
        epochs, batch_size = self.budget.pretraining
        return PretrainingConfig(
            data_path=str(self.images / TRAINING_LIST),
            eval_data_path=str(self.images / "held_out"),
            output_dir=str(self.folder / "pretrain"),
            model="beit_tiny_patch16_224_8k_vocab",
            model_kwargs=MODEL,
            input_size=IMAGE_PIXELS,
            second_input_size=IMAGE_PIXELS,
            discrete_vae_type="customized",
            discrete_vae_weight_path=str(self.folder / "dvae"),
            num_mask_patches=MASKED_PATCHES,
            min_mask_patches_per_block=4,
            color_jitter=0.0,
            drop_path=0.0,
            epochs=epochs,
            batch_size=batch_size,
            lr=2e-3,
            warmup_steps=40,
            clip_grad=3.0,
            eval_freq=3,
            save_ckpt_freq=epochs,
            save_ckpt_steps=100,
            **self._machine(),
        )

    def neighbours(self, data: str, untrained: bool) -> KnnConfig:
        """Returns the settings of k-NN on a labelled data set, with pre-trained or untrained features."""
        train, val = LABELLED[data]
        return KnnConfig(
            checkpoint=str(self.checkpoint),
            untrained=untrained,
            data_set="image_folder",
            data_path=str(self.images / train),
            eval_data_path=str(self.images / val),
            pool=("mean",),
            k=(10,),
            device=self.config.device,
            num_workers=self.config.num_workers,
            seed=self.config.seed,
        )

    def finetuning(self, start: str) -> FinetuningConfig:
        """Returns the settings of fine-tuning on the digits, with the same budget for either start."""
        train, val = LABELLED["digits"]
        return FinetuningConfig(
            data_set="image_folder",
            data_path=str(self.images / train),
            eval_data_path=str(self.images / val),
            output_dir=str(self.folder / f"finetune-{start}"),
            init_from=str(self.checkpoint) if start == "pretrained" else "",
            model="beit_tiny_patch16_224",
            model_kwargs=MODEL,
            input_size=IMAGE_PIXELS,
            crop_pct=1.0,
            drop_path=0.0,
            aa="none",
            color_jitter=0.0,
            reprob=0.0,
            smoothing=0.0,
            epochs=self.budget.finetuning_epochs,
            batch_size=32,
            lr=2e-3,
            layer_decay=FINETUNING_DECAY[start],
            warmup_epochs=1,
            clip_grad=3.0,
            save_ckpt_freq=self.budget.finetuning_epochs,
            save_ckpt_steps=100,
            **self._machine(),
        )

    def segmentation(self, start: str) -> TrainConfig:
        """Returns the settings of segmentation training, with the same budget for either start."""
        steps = self.budget.segmentation_steps
        settings: dict[str, Any] = {
            **read_yaml(TrainConfig, "upernet_beit_tiny_64_slide_ade20k"),
            "data_path": str(self.folder / "segmentation" / "scenes"),
            "reduce_zero_label": False,  # the background is a class here
            "model_kwargs": MODEL,
            "crop_size": IMAGE_PIXELS,
            "init_from": str(self.checkpoint) if start == "pretrained" else "",
            "lr": 8e-3,
            "layer_decay": SEGMENTATION_DECAY[start],
            "warmup_steps": steps // 10,
            "max_steps": steps,
            "eval_freq": steps,
            "save_ckpt_freq": steps,
            "output_dir": str(self.run_folder(start)),
            **self._machine(),
        }
        return TrainConfig(**settings)

    def _machine(self) -> dict[str, Any]:
        config = self.config
        return {"device": config.device, "num_workers": config.num_workers, "seed": config.seed, "pin_mem": False}


def make_once(folder: Path, recipe: dict[str, object], write: Callable[[Path], None]) -> None:
    """Makes a folder completely or not at all, unless it already exists and was made with the same recipe.

    The recipe, which is stored in it, is what its contents depend on; ``write`` fills the folder that it is given.
    Raises :class:`InputError` if the folder holds something else, has another recipe or cannot be created.
    """
    if folder.exists():
        marker = folder / MARKER
        if not marker.is_file() or json.loads(marker.read_text(encoding="utf-8")) != recipe:
            raise InputError(f"{folder} was made with other settings (--quick, --seed): use another --output_dir")
        return
    unfinished = folder.with_name(f".{folder.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # from a run that was stopped here
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot create {unfinished}: {error.strerror}") from error
    write(unfinished)
    (unfinished / MARKER).write_text(json.dumps(recipe), encoding="utf-8")
    unfinished.rename(folder)
