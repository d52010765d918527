"""The library's own jobs, as the comparison calls them: images, tokenizer, pre-training and four ways to judge it."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beit.commands import knn
from beit.commands.knn import KnnConfig
from beit.config import read_yaml
from beit.tasks import dvae_training as dvae
from beit.tasks import finetuning as classification
from beit.tasks import linear_probe
from beit.tasks import pretraining as masked_image_modeling
from beit.tasks import vqkd_training as vqkd
from beit.tasks.settings import DvaeConfig, FinetuningConfig, LinearProbeConfig, PretrainingConfig, VqkdConfig
from beit.visualization.curves import read_log
from examples.toy_images import BACKGROUND, SHAPES, write_digits, write_photograph_crops, write_segmentation_scenes
from semantic_segmentation import task as segmentation
from semantic_segmentation.config import TrainConfig

from .settings import BEIT, ROWS, Preset

CLASSIFIER = "beit_tiny_patch16_224"
PRETRAINERS = {1: "beit_tiny_patch16_224_8k_vocab", 2: "beit_base_patch16_224_8k_vocab_cls_pt"}
UNLABELLED = "unlabelled.txt"
SEEDS_APART = 10_000  # between the seeds of the scenes with labels and of those without: they share no scene
FEW_CHECKPOINTS = {"save_ckpt_freq": 100_000, "save_ckpt_steps": 200}


def digest(settings: Any) -> str:
    """Returns a short name of settings: other settings have another one."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Jobs:
    """The jobs of one seed; all results lie in folders named after what made them, and are made once.

    Args:
        folder: Where everything is kept.
        preset: The sizes and settings.
        seed: The seed of images, weights and training.
    """

    folder: Path
    preset: Preset
    seed: int

    # ------------------------------------------------------------------------------- what makes a result what it is
    def recipe(self, row: str) -> dict[str, Any]:
        """Returns all settings that a row's backbone depends on."""
        preset, own = self.preset, ROWS[row].pretraining
        recipe: dict[str, Any] = {"images": asdict(preset.images), "seed": self.seed, "model": dict(preset.model)}
        if own is None:
            return recipe
        recipe |= {"dvae": dict(preset.dvae), "pretraining": {**preset.pretraining, **own}}
        return recipe if ROWS[row].version == 1 else {**recipe, "vqkd": dict(preset.vqkd), "teacher": self.recipe(BEIT)}

    def _own_folder(self, kind: str, settings: Any) -> Path:
        return self.folder / f"{kind}-{self.seed}-{digest(settings)}"

    def _run_options(self) -> dict[str, Any]:
        return {**self.preset.machine, "seed": self.seed, **FEW_CHECKPOINTS}

    # --------------------------------------------------------------------------------------------------- the images
    def images(self) -> Path:
        """Makes the images of the seed, unless they are there, and returns their folder.

        ``unlabelled.txt`` lists what is trained on without labels: scenes, crops, and the digits that are not held out.
        """
        sizes = self.preset.images
        folder = self._own_folder("images", {"images": asdict(sizes), "seed": self.seed})
        if folder.exists():
            return folder
        unfinished = folder.with_name(f"unfinished-{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_segmentation_scenes(
            unfinished / "scenes",
            sizes.labelled_scenes,
            sizes.stored,
            self.seed,
            validation_count=sizes.held_out_scenes,
            coloured=True,
        )
        (unfinished / "scenes" / "classes.txt").write_text("\n".join((BACKGROUND, *SHAPES)) + "\n", encoding="utf-8")
        more, seed = unfinished / "more_scenes", self.seed + SEEDS_APART
        write_segmentation_scenes(more, sizes.scenes, sizes.stored, seed, validation_count=1, coloured=True)
        write_photograph_crops(unfinished / "photographs", sizes.crops, sizes.stored, self.seed)
        write_digits(unfinished / "digits", sizes.pixels, self.seed)
        self._list_unlabelled(unfinished)
        unfinished.rename(folder)
        return folder

    def _list_unlabelled(self, folder: Path) -> None:
        parts = ("scenes/images/training", "more_scenes/images/training", "photographs", "digits/train")
        files = sorted(path for part in parts for path in (folder / part).rglob("*.*"))
        names = (f"{path.relative_to(folder)}\n" for path in files)
        (folder / UNLABELLED).write_text("".join(names), encoding="utf-8")

    # --------------------------------------------------------------------------------------------------- the backbone
    def tokenizer(self) -> Path:
        """Trains the tokenizer that the pre-trainings of the seed share, unless it is there; returns its folder."""
        preset = self.preset
        settings = {"images": asdict(preset.images), "dvae": dict(preset.dvae)}
        folder = self._own_folder("dvae", settings)
        config = DvaeConfig(
            data_path=str(self.images() / UNLABELLED),
            output_dir=str(folder),
            input_size=preset.images.pixels,
            eval_freq=preset.dvae["epochs"],
            **preset.dvae,
            **self._run_options(),
        )
        return self._once(folder, lambda: dvae.main(config))

    def tokenizer_v2(self) -> Path:
        """Trains BEiT v2's tokenizer with BEiT as its teacher, unless it is there; returns its last checkpoint."""
        preset = self.preset
        settings = dict(preset.vqkd)
        more_sizes = settings.pop("model_kwargs")
        folder = self._own_folder("vqkd", [self.recipe(BEIT), preset.vqkd])
        config = VqkdConfig(
            data_path=str(self.images() / UNLABELLED),
            output_dir=str(folder),
            model_kwargs={**preset.model, **more_sizes},
            teacher=self.backbone(BEIT),
            input_size=preset.images.pixels,
            disable_eval=True,
            **settings,
            **self._run_options(),
        )
        return _last_checkpoint(self._once(folder, lambda: vqkd.main(config)))

    def backbone(self, row: str) -> str:
        """Pre-trains the backbone of a row, unless that is done; returns its checkpoint, none for "from scratch"."""
        own, preset = ROWS[row].pretraining, self.preset
        if own is None:
            return ""
        folder = self._own_folder(f"pretrain-{row}", self.recipe(row))
        settings = {**preset.pretraining, **own}
        if settings.get("target", "tokens") == "tokens":
            first = ROWS[row].version == 1
            settings["discrete_vae_type"] = "customized" if first else "vqkd"
            settings["discrete_vae_weight_path"] = str(self.tokenizer() if first else self.tokenizer_v2())
        config = PretrainingConfig(
            data_path=str(self.images() / UNLABELLED),
            output_dir=str(folder),
            model=PRETRAINERS[ROWS[row].version],
            model_kwargs=dict(preset.model),
            input_size=preset.images.pixels,
            second_input_size=preset.images.pixels,
            **settings,
            **self._run_options(),
        )
        self._once(folder, lambda: masked_image_modeling.main(config))
        return str(_last_checkpoint(folder))

    def _once(self, folder: Path, make: Callable[[], None]) -> Path:
        """Runs a job, which goes on where it was stopped, unless it has finished."""
        done = folder / "done"
        if not done.exists():
            began = time.monotonic()
            make()
            done.write_text(f"{time.monotonic() - began:.1f}\n", encoding="utf-8")  # seconds, of the last piece
        return folder

    # ---------------------------------------------------------------------------------------------- what it is worth
    def evaluation(self, column: str, row: str) -> Mapping[str, Any]:
        """Returns the settings of an evaluation, which depend on a row only as scratch or pre-trained."""
        start = "scratch" if ROWS[row].pretraining is None else "pretrained"
        preset = self.preset
        return {
            "finetune": {**preset.finetuning[start], "labels_per_class": preset.labels_per_class},
            "linear": preset.probe[start],
            "knn": {"k": 10},
            "segment": preset.segmentation[start],
        }[column]

    def score(self, column: str, row: str, settings: Mapping[str, Any] | None = None) -> float:
        """Returns what a row's backbone scores in a column, in percent.

        Args:
            column: One of ``COLUMNS``.
            row: One of ``ROWS``.
            settings: Those of the evaluation; those of the preset by default.
        """
        job = {"finetune": self._finetune, "linear": self._probe, "knn": self._neighbours, "segment": self._segment}
        settings = self.evaluation(column, row) if settings is None else settings
        run = self._own_folder(f"{column}-{row}", [self.recipe(row), dict(settings)])
        result = job[column](self.backbone(row), run, settings)
        shutil.rmtree(run, ignore_errors=True)  # its score is kept, and its weights serve nobody
        return result

    def _digits(self, train: str) -> dict[str, str]:
        digits = self.images() / "digits"
        return {"data_set": "image_folder", "data_path": str(digits / train), "eval_data_path": str(digits / "val")}

    def few_labels(self, count: int) -> str:
        """Links a few training digits of every class in a folder of their own; returns its name beside ``train``."""
        digits = self.images() / "digits"
        few = digits / f"few-{count}"
        if few.exists():
            return few.name
        unfinished = digits / f"unfinished-{few.name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        for folder in sorted((digits / "train").iterdir()):
            (unfinished / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir(), key=lambda file: digest([self.seed, file.name]))[:count]:
                os.link(file, unfinished / folder.name / file.name)
        unfinished.rename(few)
        return few.name

    def _finetune(self, backbone: str, run: Path, settings: Mapping[str, Any]) -> float:
        settings = dict(settings)
        few = self.few_labels(settings.pop("labels_per_class"))
        recipe = {
            "drop_path": 0.0,
            "aa": "none",
            "color_jitter": 0.0,
            "reprob": 0.0,
            "batch_size": 20,
            "clip_grad": 3.0,
        }
        config = FinetuningConfig(
            **self._digits(few),
            init_from=backbone,
            output_dir=str(run),
            model=CLASSIFIER,
            model_kwargs=dict(self.preset.model),
            input_size=self.preset.images.pixels,
            crop_pct=1.0,
            disable_eval_during_finetuning=True,
            **{**recipe, **settings},
            **self._run_options(),
        )
        classification.main(config)
        return classification.evaluate_checkpoint(config)["acc1"]

    def _probe(self, backbone: str, run: Path, settings: Mapping[str, Any]) -> float:
        config = LinearProbeConfig(
            **self._digits("train"),
            checkpoint=backbone,
            output_dir=str(run),
            model=CLASSIFIER,
            model_kwargs=dict(self.preset.model),
            patch_size=self.preset.model["patch_size"],
            input_size=self.preset.images.pixels,
            crop_pct=1.0,
            eval_freq=settings["epochs"],
            **settings,
            **self._run_options(),
        )
        linear_probe.main(config)
        return read_log(run)[-1]["test_acc1"]

    def _neighbours(self, backbone: str, _run: Path, settings: Mapping[str, Any]) -> float:
        config = KnnConfig(
            **self._digits("train"),
            checkpoint=backbone,
            model=CLASSIFIER,
            model_kwargs=None if backbone else {**self.preset.model, "img_size": self.preset.images.pixels},
            pool=("mean",),
            k=(settings["k"],),
            **{name: value for name, value in self.preset.machine.items() if name != "pin_mem"},
            seed=self.seed,
        )
        return knn.best_of(knn.evaluate(config)).acc1

    def _segment(self, backbone: str, run: Path, settings: Mapping[str, Any]) -> float:
        pixels, steps = self.preset.images.pixels, settings["max_steps"]
        config = TrainConfig(
            **{
                **read_yaml(TrainConfig, "upernet_beit_tiny_64_slide_ade20k"),
                "data_path": str(self.images() / "scenes"),
                "reduce_zero_label": False,  # here the background is a class
                "model_kwargs": dict(self.preset.model),
                "crop_size": pixels,
                "image_scale": (4 * pixels, pixels),
                "slide_stride": pixels * 2 // 3,
                "init_from": backbone,
                "output_dir": str(run),
                "warmup_steps": steps // 10,
                "eval_freq": steps,
                "save_ckpt_freq": steps,
                **self.preset.machine,
                "seed": self.seed,
                **settings,
            }
        )
        segmentation.main(config)
        return 100 * read_log(run)[-1]["test_mIoU"]


def _last_checkpoint(folder: Path) -> Path:
    return max(folder.glob("checkpoint-[0-9]*.pth"), key=lambda path: int(path.stem.split("-")[1]))
