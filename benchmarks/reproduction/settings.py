"""What is compared, on what, and at which size: rows, columns and presets of the reproduction in the small."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SCRATCH, BEIT, BEIT_V2 = "scratch", "beit", "beit_v2"


@dataclass(frozen=True)
class Row:
    """One way to come by a backbone.

    Args:
        title: As in the table.
        pretraining: Settings of ``PretrainingConfig`` that make it differ from BEiT; None for no pre-training.
        version: Of BEiT. Version 2 learns the codes of a VQ-KD tokenizer, which BEiT of the same seed has taught.
    """

    title: str
    pretraining: Mapping[str, Any] | None
    version: int = 1


ROWS = {
    SCRATCH: Row("from scratch", None),
    BEIT: Row("BEiT", {}),
    "random_masks": Row("BEiT, masks without blocks", {"mask_strategy": "random"}),
    "pixels": Row("BEiT, pixels as targets", {"target": "pixels", "pixel_norm": False}),
    "all_tokens": Row("BEiT, all tokens predicted", {"predict": "all"}),
    BEIT_V2: Row("BEiT v2, taught by BEiT", {"mask_strategy": "block_exact", "early_layers": 3, "head_layers": 1}, 2),
}

# Every one in percent, and more is better.
COLUMNS = {
    "finetune": "few-label fine-tuning, top-1",
    "linear": "linear probe, top-1",
    "knn": "k-NN, top-1",
    "segment": "segmentation, mIoU",
}


@dataclass(frozen=True)
class Images:
    """How many images of each kind, of which size.

    Args:
        scenes: Unlabelled scenes to pre-train on.
        crops: Crops of photographs to pre-train on.
        labelled_scenes: Scenes with labels to train segmentation on.
        held_out_scenes: Scenes to score segmentation on.
        stored: Pixels of a side, as stored.
        pixels: Pixels of a side, as trained on.
    """

    scenes: int = 800
    crops: int = 300
    labelled_scenes: int = 300
    held_out_scenes: int = 150
    stored: int = 72
    pixels: int = 64


@dataclass(frozen=True)
class Preset:
    """A size of the whole comparison.

    Args:
        images: The images.
        model: The backbone, as keywords of its constructor.
        dvae: Settings of the tokenizer's training.
        vqkd: Settings of the training of BEiT v2's tokenizer.
        pretraining: Settings of every pre-training.
        finetuning: Settings of fine-tuning by start (``scratch`` or ``pretrained``), from the tuning script.
        probe: Settings of the linear probe by start, from the tuning script.
        segmentation: Settings of segmentation by start, from the tuning script.
        machine: What else every run gets, such as its device; not part of what makes a cell.
        rows: Which rows are compared.
        labels_per_class: Labelled digits of each class to fine-tune on.
        seeds: The seeds reported.
        tuning_seed: The seed that settings were tuned on, never reported.
    """

    images: Images
    model: Mapping[str, Any]
    dvae: Mapping[str, Any]
    vqkd: Mapping[str, Any]
    pretraining: Mapping[str, Any]
    finetuning: Mapping[str, Mapping[str, Any]]
    probe: Mapping[str, Mapping[str, Any]]
    segmentation: Mapping[str, Mapping[str, Any]]
    machine: Mapping[str, Any] = field(default_factory=lambda: {"device": "cpu", "num_workers": 0, "pin_mem": False})
    rows: tuple[str, ...] = tuple(ROWS)
    labels_per_class: int = 25
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 1000


MODEL = {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}

CPU = Preset(
    images=Images(),
    model=MODEL,
    dvae={
        "codebook_size": 256, "codebook_dim": 64, "num_layers": 3, "hidden_dim": 32, "min_crop": 0.3, "epochs": 8,
        "batch_size": 16, "warmup_steps": 20,
    },
    vqkd={
        "codebook_size": 256, "codebook_dim": 16, "model_kwargs": {"decoder_depth": 1}, "quantize_kmeans_init": True,
        "revive_codes": 50, "min_crop": 0.3, "epochs": 10, "batch_size": 64, "lr": 2e-3, "warmup_steps": 40,
        "opt_betas": [0.9, 0.99],
    },
    pretraining={
        "num_mask_patches": 26, "min_mask_patches_per_block": 4, "color_jitter": 0.0, "drop_path": 0.0, "epochs": 10,
        "batch_size": 64, "lr": 2e-3, "warmup_steps": 40, "clip_grad": 3.0,
    },
    finetuning={
        "scratch": {"lr": 1e-3, "layer_decay": 1.0, "epochs": 40},
        "pretrained": {"lr": 1e-3, "layer_decay": 1.0, "epochs": 40},
    },
    probe={
        "scratch": {"lr": 1.0, "epochs": 6, "batch_size": 64},
        "pretrained": {"lr": 3.0, "epochs": 6, "batch_size": 64},
    },
    segmentation={
        "scratch": {"lr": 1.6e-2, "layer_decay": 1.0, "max_steps": 150},
        "pretrained": {"lr": 8e-3, "layer_decay": 0.75, "max_steps": 150},
    },
)  # fmt: skip

# A rehearsal: everything runs, nothing is learnt that would be worth a look.
QUICK = replace(
    CPU,
    images=replace(CPU.images, scenes=100, crops=40, labelled_scenes=48, held_out_scenes=24),
    dvae={**CPU.dvae, "epochs": 1},
    vqkd={**CPU.vqkd, "epochs": 1},
    pretraining={**CPU.pretraining, "epochs": 1, "warmup_steps": 5},
    finetuning={start: {**recipe, "epochs": 2} for start, recipe in CPU.finetuning.items()},
    probe={start: {**recipe, "epochs": 1} for start, recipe in CPU.probe.items()},
    segmentation={start: {**recipe, "max_steps": 10} for start, recipe in CPU.segmentation.items()},
)

# Does a larger grid, 14 x 14 patches as the paper's, change how masks in blocks compare with masks without?
GRID14 = replace(
    CPU,
    images=replace(CPU.images, stored=126, pixels=112),
    pretraining={**CPU.pretraining, "num_mask_patches": 78, "min_mask_patches_per_block": 16},
    rows=(BEIT, "random_masks"),
)

# Does pre-training for longer change how visual tokens compare with pixels?
LONGER = replace(CPU, pretraining={**CPU.pretraining, "epochs": 30}, rows=(BEIT, "pixels"))

# For one large GPU: 12 times the weights, about 9 times the images seen in pre-training, four times the pixels. The
# recipes of the evaluations are those of the CPU, at lower rates for the larger model, and are not tuned.
H200 = Preset(
    images=Images(scenes=6000, crops=2000, labelled_scenes=1000, held_out_scenes=400, stored=96, pixels=64),
    model={"patch_size": 8, "embed_dim": 256, "depth": 8, "num_heads": 4},
    dvae={
        "codebook_size": 1024, "codebook_dim": 128, "num_layers": 3, "hidden_dim": 64, "min_crop": 0.3, "epochs": 6,
        "batch_size": 128, "warmup_steps": 50,
    },
    vqkd={**CPU.vqkd, "codebook_size": 1024, "codebook_dim": 32, "epochs": 25, "batch_size": 128},
    pretraining={**CPU.pretraining, "epochs": 25, "batch_size": 128, "lr": 1.5e-3, "warmup_steps": 200},
    finetuning={
        "scratch": {"lr": 1e-3, "layer_decay": 1.0, "epochs": 60},
        "pretrained": {"lr": 1e-3, "layer_decay": 0.8, "epochs": 60},
    },
    probe={start: {**recipe, "epochs": 15, "batch_size": 128} for start, recipe in CPU.probe.items()},
    segmentation={
        start: {**recipe, "lr": 3e-3, "max_steps": 600, "out_indices": [1, 3, 5, 7]}
        for start, recipe in CPU.segmentation.items()
    },
    machine={"device": "cuda", "num_workers": 12, "pin_mem": True},
)  # fmt: skip

PRESETS = {"cpu": CPU, "quick": QUICK, "grid14": GRID14, "longer": LONGER, "h200": H200}
