"""``beit push``: a checkpoint on the Hugging Face hub, in transformers' format and with a model card."""

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module, resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jinja2
from torch import Tensor

from beit.checkpoints.export import convert
from beit.checkpoints.load import describe
from beit.checkpoints.read import Metadata, read_weights
from beit.checkpoints.released import CONFIG, PREPROCESSOR, resolve
from beit.commands.report import MAIN_CURVES, Run, as_text, read_run, results_of
from beit.commands.settings import PushConfig
from beit.errors import InputError, counted
from beit.inference import decoded
from beit.storage import atomic_write, load_checkpoint, offline, read_json
from beit.visualization.curves import overlaid
from beit.visualization.plots import draw_curves

logger = logging.getLogger(__name__)

CURVES = "training_curves.png"
MASKED = "BeitForMaskedImageModeling"
TASKS = {  # by transformers' class: the hub's name of the task, our metric and the hub's name of it
    "BeitForImageClassification": ("image-classification", "acc1", "accuracy"),
    MASKED: ("image-feature-extraction", "", ""),
    "BeitForSemanticSegmentation": ("image-segmentation", "mIoU", "mean_iou"),
}


def main(config: PushConfig) -> None:
    """Writes a model's folder and uploads it; :class:`InputError` for what the hub or the format cannot take."""
    hub = _hub()
    try:
        hub.utils.validate_repo_id(config.repo)
    except ValueError as error:
        raise InputError(f"{config.repo!r} is no name of a repository: {error}") from error
    if "/" not in config.repo:
        raise InputError(f"{config.repo}: give the repository with its owner, as in your-name/{config.repo}")
    if config.dry_run:
        folder = Path(config.dry_run)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"--dry_run {folder}: is there already; give a new or an empty folder")
        write_folder(config, folder)
        logger.info("%s written; the hub was not contacted", folder)
        return
    if offline():
        raise InputError("BEIT_OFFLINE is set: --dry_run DIR writes the folder without contacting the hub")
    if not hub.get_token():
        raise InputError(
            "no login to the Hugging Face hub: run `hf auth login`, or set HF_TOKEN to a token that writes"
        )
    with tempfile.TemporaryDirectory(prefix="beit-push-") as temporary:
        card = write_folder(config, Path(temporary))
        try:
            card.validate()
            api = hub.HfApi(library_name="beit")
            url = api.create_repo(config.repo, private=config.private, exist_ok=True)
            if config.private and not api.model_info(config.repo).private:
                raise InputError(f"{config.repo} exists and is public: nothing was uploaded")
            api.upload_folder(repo_id=config.repo, folder_path=temporary, commit_message="Upload with beit push")
        except InputError:
            raise
        except Exception as error:  # the library's own, those of its HTTP client, and OSErrors
            raise InputError(f"{config.repo} was not pushed: {' '.join(str(error).split())}") from error
    logger.info("pushed to %s", url)


def _hub() -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        raise InputError("beit push needs huggingface_hub: pip install huggingface_hub") from error


def write_folder(config: PushConfig, folder: Path) -> Any:
    """Writes weights, configs, pictures and the card, which is returned as huggingface_hub's ``ModelCard``."""
    for path in config.pictures:
        if not path.endswith(".svg"):
            decoded(path)  # a damaged one raises InputError
    source = str(resolve(config.checkpoint))
    weights, metadata = read_weights(source, **config.weights)
    convert(source, folder, "huggingface", **config.weights)
    run, pictures = run_of(source), []
    if run and len(run.entries) > 1:
        found = overlaid({run.name: run.entries})
        if main_ones := {title: curves for title, curves in found.items() if title.split()[0] in MAIN_CURVES}:
            draw_curves(folder / CURVES, main_ones)
            pictures.append(CURVES)
    for picture in map(Path, config.pictures):
        if (folder / picture.name).exists():
            raise InputError(f"--pictures {picture}: there is a {picture.name} in the folder already; rename it")
        shutil.copyfile(picture, folder / picture.name)
        pictures.append(picture.name)
    if not config.license:
        logger.warning("--license is missing: the card will say that none is stated, so others may not use the model")
    card = model_card(config, folder, weights, metadata, run, pictures)
    with atomic_write(folder / "README.md") as file:
        file.write(str(card).encode())
    return card


def run_of(source: str) -> Run | None:
    """Returns the run that wrote a checkpoint, with its log up to there; None if no log lies beside it."""
    path = Path(source)
    if not (path.parent / "log.txt").is_file():
        return None
    run = read_run(path.parent, path.resolve().parent.name)
    epoch = load_checkpoint(path, mmap=True).get("epoch") if path.is_file() else None
    known = [entry for entry in run.entries if not isinstance(epoch, int) or int(str(entry["epoch"])) <= epoch]
    return replace(run, entries=known) if known else None


def model_card(
    config: PushConfig,
    folder: Path,
    weights: Mapping[str, Tensor],
    metadata: Metadata,
    run: Run | None,
    pictures: Sequence[str],
) -> Any:
    """Returns the card of the model in a folder, as huggingface_hub's ``ModelCard``."""
    hub, theirs, images = _hub(), read_json(folder / CONFIG), read_json(folder / PREPROCESSOR)
    head = theirs["architectures"][0]
    task, metric, name = TASKS[head]
    settings: Mapping[str, object] = metadata.get("args") or {}
    if run and run.settings:
        settings = {key: run.settings[key] for key in run.settings if run.changed is None or key in run.changed}
    score = run.entries[-1].get(f"test_{metric}") if run else None
    results = []
    if config.datasets and isinstance(score, float):
        data = config.datasets[0]
        results = [hub.EvalResult(task, data, data, name, score / 100 if metric == "acc1" else score)]
    header = hub.ModelCardData(
        license=config.license or None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["beit"],
        datasets=list(config.datasets) or None,
        model_name=config.repo.partition("/")[2],
        eval_results=results or None,
    )
    rows = [row for row in results_of(run) if row[0] != "parameters"] if run else []  # which are among the facts
    trained_on = ", ".join(config.datasets) or public((run.settings if run else settings).get("data_path"))
    classes = metadata.get("labels") or ()
    facts = {
        "trained on": trained_on + f" ({counted(len(classes), 'class')})" * bool(classes),
        "predicts": metadata.get("target", "") if head == MASKED else "",
        "started from": public((run.settings if run else settings).get("init_from")),
        "images": f"mean {as_text(images['image_mean'])}, standard deviation {as_text(images['image_std'])}",
        "parameters": f"{sum(tensor.numel() for tensor in weights.values()):,}",
        "licence": config.license or "none stated",
        "recipe": run.recipe.name if run and run.recipe else "",
    }
    size, patch = theirs["image_size"], theirs["patch_size"]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    template = (resources.files("beit.commands") / "model_card.md").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        card_data=header.to_yaml(),
        repo=config.repo,
        what=describe(weights, metadata),
        channels=theirs["num_channels"],
        image="image.jpg" if theirs["num_channels"] == 3 else "image.npy",
        size=f"{size}, {size}",
        patches=(size // patch) ** 2,
        outputs=theirs.get("vocab_size"),
        head=head,
        facts=facts,
        rows=rows,
        quoted=any(stated for _, stated, *_ in rows),
        run=run,
        pictures=pictures,
        settings={key: public(value) for key, value in settings.items() if key not in ("output_dir", "log_dir")},
    )
    return hub.ModelCard(text)


def public(value: object) -> str:
    """Returns a setting for everybody's eyes: of a path of this machine only its end, of an address no access token."""
    if isinstance(value, list | tuple):
        return ", ".join(map(public, value))
    text = as_text("" if value is None else value)
    if "://" in text:
        parts = urlsplit(text)
        return f"{parts.scheme}://{parts.hostname}{parts.path}"
    path = os.path.expanduser(text.removeprefix("hf:"))
    return os.path.basename(path.rstrip("/")) if os.path.isabs(path) or os.path.exists(path) else text
