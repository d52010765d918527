"""What the docs show runs: all of README, and a block of every other page that has one.

The rule that makes it quick: a command runs as shown, in one process, with the flags of ``SMALL`` behind it, of which
later ones win. Paths below ``/path/to/`` are in the test's folder, which has the pictures that the pages name. A run
takes one epoch in an empty folder, so ``checkpoint-299.pth`` is ``checkpoint-0.pth``; a released name is that of a
small file. Commands that download or install are left out. That the flags of all others exist is tested by
``tests/test_docs.py``.
"""

import re
import shutil
from itertools import pairwise

import pytest
import torch

from beit import create_model
from beit.checkpoints.released import RELEASED
from beit.commands.settings import PredictConfig, PushConfig
from beit.tasks.settings import (
    DvaeConfig,
    FinetuningConfig,
    LinearProbeConfig,
    PretrainingConfig,
    PretrainingV2Config,
    VqkdConfig,
)
from examples.toy_images import write_digits, write_scenes, write_segmentation_scenes
from semantic_segmentation.config import TrainConfig
from tests.shell import run
from tests.test_docs import PAGES, ROOT, blocks_in, commands_in, commands_of, settings_of

pytestmark = pytest.mark.slow

KWARGS = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
SIZES = ("--model_kwargs", *(f"{name}={value}" for name, value in KWARGS.items()))
BATCH = ("--batch_size", "4", "--total_batch_size", "4", "--num_workers", "0", "--device", "cpu")
ONCE = (*BATCH, "--epochs", "1")
EPOCH = (*ONCE, "--warmup_epochs", "0")
MASKS = ("--num_mask_patches", "6", "--min_mask_patches_per_block", "2")
PRETRAINING = ("--model", "beit_tiny_patch16_224_8k_vocab", *SIZES, "--input_size", "32", *MASKS, *EPOCH)
SMALL = {
    DvaeConfig: (
        *("--input_size", "32", "--codebook_size", "16", "--codebook_dim", "8", "--hidden_dim", "8", "--epochs", "1"),
        *("--batch_size", "4", "--num_workers", "0", "--device", "cpu"),
    ),
    VqkdConfig: (
        *("--teacher", "output/pretrain/checkpoint-0.pth", "--input_size", "32", "--codebook_size", "16"),
        *(*SIZES, "decoder_depth=1", "--codebook_dim", "4", *EPOCH),
    ),
    PretrainingConfig: (*PRETRAINING, "--second_input_size", "32"),
    PretrainingV2Config: (
        *PRETRAINING,
        *("--model", "beit_base_patch16_224_8k_vocab_cls_pt", "--early_layers", "3", "--second_input_size", "32"),
        *("--tokenizer_weight", "output/vqkd/checkpoint-0.pth"),
    ),
    FinetuningConfig: ("--model", "beit_tiny_patch16_224", *SIZES, "--input_size", "32", "--nb_classes", "0", *EPOCH),
    LinearProbeConfig: ("--model", "auto", "--input_size", "32", *ONCE),
    TrainConfig: (
        *("--model", "beit_tiny_patch16_224", *SIZES, "--out_indices", "0", "1", "2", "3", "--crop_size", "32"),
        *("--slide_stride", "24"),
        *("--head_channels", "16", "--auxiliary_channels", "8", "--image_scale", "128", "32", "--max_steps", "2"),
        *("--warmup_steps", "0", "--eval_freq", "1", "--save_ckpt_freq", "1", *BATCH),
    ),
    PredictConfig: ("--device", "cpu"),
    PushConfig: ("--dry_run", "pushed"),
}
SHOWN = {  # how the block that runs begins; all pages run in the folder that README's commands leave behind
    "docs/architecture.md": "import torch.nn.functional",
    "docs/beit_v2.md": "torchrun --nproc_per_node=8 run_vqkd_training.py",
    "docs/checkpoints.md": "beit convert SOURCE DEST --to huggingface",
    "docs/data.md": "beit shards",
    "docs/faq.md": "python run_beit_pretraining.py",
    "docs/gallery.md": "beit visualize bias",
    "docs/getting_started_for_image_classification.md": "python run_class_finetuning.py",
    "docs/linear_probe.md": "python run_linear_eval.py",
    "docs/reproducing.md": "torchrun --nproc_per_node=16 run_beit_pretraining.py",
    "docs/reproducing_v2.md": "torchrun --nproc_per_node=16 run_beitv2_pretraining.py",
    "docs/tokenizers.md": "python run_dvae_training.py",
    "docs/visualization.md": "beit visualize reconstruct",
    "semantic_segmentation/README.md": "python tools/train.py",
}
# What is put before Python: its training functions get the flags of SMALL too.
TRAINING_IN_SMALL = """
import beit.jobs
from tests.integration.test_shown_commands import SMALL, keywords
read = beit.jobs.read_keywords
beit.jobs.read_keywords = lambda kind, given: read(kind, {**given, **keywords(SMALL[kind])})
"""
ELSEWHERE = {  # a page that serves, and launchers with commands for many machines or hours, in tests of their own
    "docs/app.md": "test_app.py",
    "docs/clusters.md": "test_clusters.py",
    "docs/reproduction_small.md": "test_reproduce_small.py",
}
STANDS_FOR = {
    r"/path/to/": "path/to/",
    r"/data/imagenet": "path/to/imagenet",
    r"/data/shards": "shards",
    r"checkpoint-\d+\.pth": "checkpoint-0.pth",
    r"\bdemo/": "output/",
    r"\bSOURCE DEST\b": "output/finetune/checkpoint-best.pth exported",
    r"\bmydata\b": "path/to/ADEChallengeData2016",
    r'device="cuda"': 'device="cpu"',
}


def run_command(words, folder):
    settings, flags = settings_of(words)
    if words[0] == "beit" or words[1] == "-m":
        command = words[1:] if words[0] == "python" else ["-m", *words]
    else:
        name = next(word for word in words if word.endswith((".py", ".sh")) and "configs/" not in word)
        name = re.sub(
            r"^(?:semantic_segmentation/)?tools/(?:dist_)?(\w+)\.\w+", r"semantic_segmentation/tools/\1.py", name
        )
        command = [ROOT / name, *flags]
    for flag, value in pairwise(words):
        if flag in ("--output_dir", "--work-dir"):
            shutil.rmtree(folder / value, ignore_errors=True)
    done = run(*command, *SMALL.get(settings, ()), cwd=folder, BEIT_HOME=str(folder / "home"), BEIT_OFFLINE="1")
    return done.stdout + done.stderr


def keywords(flags):
    """Returns flags as the settings that a training function takes."""
    at = [place for place, word in enumerate(flags) if word.startswith("--")]
    groups = [flags[start:stop] for start, stop in pairwise([*at, len(flags)])]
    return {name.removeprefix("--"): list(values) if values[1:] else values[0] for name, *values in groups}


def run_python(block, folder):
    """Runs a block as a script that also checks the shapes in its comments: ``(1, 384)``, or ``4 x (1, 384)``."""
    checks = "".join(
        f"assert [tuple(x.shape) for x in {f'[{name}]' if not count else name}] == [{shape}] * {count or 1}\n"
        for name, count, shape in re.findall(r"^(\w+) = .*  # (?:(\d+) x )?(\(\d[\d, ]+\))", block, re.MULTILINE)
    )
    script = folder / "block.py"
    script.write_text(TRAINING_IN_SMALL + block + checks, encoding="utf-8")
    run(script, cwd=folder, BEIT_HOME=str(folder / "home"), BEIT_OFFLINE="1")
    return checks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands find: images, OpenAI's tokenizer, and released checkpoints, all of them small."""
    folder = tmp_path_factory.mktemp("shown")
    for name in ("images", "held_out", "photos"):
        write_scenes(folder / name, 8, 32, seed=len(name))
    shutil.copy(next((folder / "photos").rglob("*.jpg")), folder / "photo.jpg")
    for name in ("path/to/imagenet", "path/to/imagenet22k", "flowers"):
        write_digits(folder / name, 32, per_class=4)
    for split in ("train", "val"):  # images/ is both: images without labels, and labelled ones
        shutil.copytree(folder / "path/to/imagenet" / split, folder / "images" / split)
    write_segmentation_scenes(folder / "path/to/ADEChallengeData2016", 4, 32, validation_count=2)
    shutil.copytree(ROOT / "tests" / "golden" / "dalle_small", folder / "tokenizer")
    shutil.copytree(folder / "tokenizer", folder / "path/to/tokenizer")
    released = folder / "home" / "checkpoints" / "beit_base_patch16_224_pt22k.pth"
    released.parent.mkdir(parents=True)
    model = create_model("beit_tiny_patch16_224_8k_vocab", img_size=32, **KWARGS)
    torch.save({"model": model.state_dict()}, released)
    for name in RELEASED:
        if not (released.parent / f"{name}.pth").exists():
            shutil.copy(released, released.parent / f"{name}.pth")
    return folder


def run_block(language, block, folder):
    """Runs a block's commands, or the block if it is Python, and returns what they wrote, by command."""
    for pattern, replacement in STANDS_FOR.items():
        block = re.sub(pattern, replacement, block)
    if language == "python":
        return {block: run_python(block, folder)}
    commands = [words for words in commands_of(block) if settings_of(words)]
    return {" ".join(words): run_command(words, folder) for words in commands if words[:2] != ["beit", "download"]}


@pytest.fixture(scope="module")
def readme(folder):
    """Runs README from top to bottom: what it wrote, by command."""
    blocks = blocks_in(ROOT / "README.md")
    return {words: output for block in blocks for words, output in run_block(*block, folder).items()}


def test_readme_runs(readme, folder):
    assert sum(words.startswith("torchrun") for words in readme) >= 3
    assert len(readme) > 15
    assert "get_attention_maps" in "".join(words for words, output in readme.items() if output.startswith("assert"))


@pytest.mark.parametrize("page", SHOWN)
def test_a_block_of_a_page_runs(page, readme, folder):
    block = next(block for block in blocks_in(ROOT / page) if block[1].strip().startswith(SHOWN[page]))
    assert run_block(*block, folder)


def test_no_page_is_forgotten():
    pages = {str(path.relative_to(ROOT)) for path in PAGES if any(map(settings_of, commands_in(path)))}
    assert pages - {"README.md", *ELSEWHERE} <= set(SHOWN)
