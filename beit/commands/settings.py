"""The settings of every ``beit`` command that is not a training job, one dataclass per command; imports no torch."""

from dataclasses import dataclass
from typing import Any

from beit.config import ReadWhenMade, Size, option
from beit.registry import FORMATS
from beit.tasks.settings import AMP_CHOICES, ANY_MODEL, DATA_SETS

IMAGE_LIST = "folder of images, text file of paths, or shards-{000..127}.tar"
ANY_IMAGES = "image files, folders of images, or shards-{000..127}.tar"
IMAGE_SIZE = "image size in pixels (HEIGHTxWIDTH or one number); the model's own by default"
DEVICE = "cuda, cpu or mps"
PICTURE = "picture to write, .png or .svg"

POOLS = ("mean", "cls", "cls_mean")
PROJECTIONS = ("pca", "tsne")
RECIPE_TASKS = (
    *("pre-training", "tokenizer training", "BEiT v2 pre-training", "intermediate fine-tuning", "fine-tuning"),
    *("linear probe", "segmentation", "segmentation test"),
)


@dataclass(frozen=True)
class CheckpointOptions(ReadWhenMade):
    """A checkpoint, and which weights of it."""

    checkpoint: str = option("", f"any BEiT: {ANY_MODEL}")
    model_key: str = option("", "where it has its weights, such as model_ema; a usual key by default")
    model_prefix: str = option("", "prefix of the names of its weights, if it has those of several models")
    num_heads: int | None = option(None, "attention heads, if it does not record them", within="[1, inf)")

    @property
    def weights(self) -> dict[str, Any]:
        """The keywords of :func:`beit.zoo.open_model` and others that say which weights to take."""
        return {"model_key": self.model_key, "prefix": self.model_prefix, "num_heads": self.num_heads}


@dataclass(frozen=True)
class OutputOptions(ReadWhenMade):
    """What may happen to a file of the name that a command is to write."""

    overwrite: bool = option(False, "replace a file that was not written by beit")


@dataclass(frozen=True)
class AppConfig(ReadWhenMade):
    """The settings of ``beit app``."""

    path: str = option("", f"folder with checkpoints in or below it, or one: {ANY_MODEL}", positional=True)
    images: tuple[str, ...] = option((), "example images, files and folders; by default those of PATH", must_exist=True)
    tokenizer: str = option("", "tokenizer of pre-trained models, if it has moved or is not recorded", must_exist=True)
    port: int | None = option(None, "port on 127.0.0.1; the first free one from 7860 by default", within="[1, 65535]")
    device: str = option("cpu", DEVICE)


@dataclass(frozen=True)
class ViewerOptions(CheckpointOptions, OutputOptions):
    """A model to look into."""

    input_size: Size | None = option(None, IMAGE_SIZE, aliases=("size",))
    device: str = option("cpu", DEVICE)


@dataclass(frozen=True)
class ForwardOptions(ReadWhenMade):
    """One pass of a model over images."""

    batch_size: int | None = option(None, "images per pass; by default 32 of 224 pixels", within="[1, inf)")
    num_workers: int | None = option(None, "data-loading workers; by default one per core, up to 10", within="[0, inf)")
    amp_dtype: str = option("auto", "number format of the forward pass", choices=AMP_CHOICES)


@dataclass(frozen=True)
class FeatureOptions(ViewerOptions, ForwardOptions):
    """Which feature of images."""

    block: int = option(-1, "block to take features from, counted from 0, or from the end if negative")
    pool: str = option("mean", "how the block's tokens become a feature", choices=POOLS)


@dataclass(frozen=True)
class ConvertConfig(CheckpointOptions):
    """The settings of ``beit convert``."""

    checkpoint: str = option("", f"checkpoint to convert: {ANY_MODEL}", positional=True)
    output: str = option("", "file to write; a folder for huggingface, and optionally for timm", positional=True)
    to: str | None = option(None, "format to write", choices=FORMATS)
    features: bool = option(False, "onnx and torch_export: export the features before the head, not the logits")


@dataclass(frozen=True)
class PushConfig(CheckpointOptions):
    """The settings of ``beit push``."""

    checkpoint: str = option("", f"checkpoint to upload: {ANY_MODEL}", positional=True)
    repo: str = option("", "repository on the Hugging Face hub, owner/name; created if it is new", positional=True)
    dry_run: str = option("", "folder to write what would be uploaded into; nothing is uploaded")
    private: bool = option(False, "only you and your organisation may see the repository")
    license: str = option("", "licence of the weights, by the hub's name, such as mit or cc-by-nc-4.0")
    datasets: tuple[str, ...] = option((), "what it was trained on, by names on the hub, such as imagenet-1k")
    pictures: tuple[str, ...] = option((), "more pictures for the card, beside the training curves", must_exist=True)


@dataclass(frozen=True)
class DownloadTokenizerConfig(ReadWhenMade):
    """The settings of ``beit download tokenizer``."""

    output_dir: str = option("", "folder for the two files; files already there are kept", positional=True)


@dataclass(frozen=True)
class IndexConfig(ReadWhenMade):
    """The settings of ``beit index``."""

    data_path: str = option("", IMAGE_LIST, positional=True, must_exist=True)


@dataclass(frozen=True)
class InspectConfig(CheckpointOptions):
    """The settings of ``beit inspect``."""

    checkpoint: str = option("", f"checkpoint to describe: {ANY_MODEL}", positional=True)


@dataclass(frozen=True)
class KnnConfig(CheckpointOptions, ForwardOptions, OutputOptions):
    """The settings of ``beit knn``."""

    checkpoint: str = option("", f"model to score: {ANY_MODEL}; empty for --model, untrained")
    model: str = option("beit_base_patch16_224", "model name, if there is no --checkpoint")
    model_kwargs: dict[str, Any] | None = option(None, "more of its arguments, such as patch_size=8 embed_dim=128")
    untrained: bool = option(False, "baseline: use the checkpoint's architecture with random weights")
    data_set: str = option("IMNET", "kind of data set; CIFAR is CIFAR-100", choices=DATA_SETS)
    data_path: str = option("", "folder of the data; for IMNET the one with train and val", must_exist=True)
    eval_data_path: str | None = option(None, "validation images, for --data_set image_folder", must_exist=True)
    input_size: Size | None = option(None, IMAGE_SIZE)
    layers: tuple[int, ...] = option((), "blocks to take features from, counted from 0; all by default")
    pool: tuple[str, ...] = option(("mean", "cls"), f"how a block's tokens become features: {', '.join(POOLS)}")
    k: tuple[int, ...] = option((10, 20), "numbers of neighbours that vote", within="[1, inf)")
    temperature: float = option(0.07, "votes are weighted by exp(cosine similarity / temperature)", within="(0, inf)")
    output: str = option("", "JSON file for the results", short="-o")
    device: str = option("cuda", f"{DEVICE}; falls back to the CPU without CUDA")
    seed: int = option(0, "seed of an untrained model's weights")
    local_rank: int = option(-1, "GPU of this process, as passed by old launchers; LOCAL_RANK takes precedence")
    dist_url: str = option("env://", "URL for setting up the process group")


@dataclass(frozen=True)
class ModelsConfig(ReadWhenMade):
    """The settings of ``beit models``."""

    pattern: str = option("*", "names to list, such as '*_8k_vocab'")


@dataclass(frozen=True)
class FeaturesConfig(FeatureOptions):
    """The settings of ``beit features``."""

    data_path: str = option("", IMAGE_LIST, positional=True, must_exist=True)
    output: str = option("", "NumPy archive to write, such as features.npz", short="-o")


@dataclass(frozen=True)
class PredictConfig(CheckpointOptions, ForwardOptions):
    """The settings of ``beit predict``."""

    images: tuple[str, ...] = option((), f"{ANY_IMAGES}, or a .txt of paths", positional=True, must_exist=True)
    checkpoint: str = option("", f"classifier to use: {ANY_MODEL}", aliases=("model",))
    topk: int = option(5, "number of classes to list per image", within="[1, inf)")
    json: bool = option(False, "write one JSON object per image")
    device: str = option("cpu", DEVICE)


@dataclass(frozen=True)
class ListConfig(ReadWhenMade):
    """The settings of ``beit recipes list``."""

    task: str = option("", "only recipes of this task", choices=RECIPE_TASKS)


@dataclass(frozen=True)
class ShowConfig(ReadWhenMade):
    """The settings of ``beit recipes show``."""

    name: str = option("", "recipe name, or the path of your own .yaml", positional=True)
    gpus: int | None = option(None, "GPUs of the command, in all; as published by default", within="[1, inf)")


@dataclass(frozen=True)
class ReportConfig(OutputOptions):
    """The settings of ``beit report``."""

    runs: tuple[str, ...] = option((), "run folders, each with a log.txt", positional=True, must_exist=True)
    output: str = option("", "page to write, such as report.html", short="-o")
    title: str = option("Training report", "title of the page")
    recipe: str = option("", "recipe to compare all runs with, - for none; by default the one each was started with")
    pictures: tuple[str, ...] = option((), "further pictures to include, PNG", must_exist=True)
    results: tuple[str, ...] = option((), "further results, JSON as `beit knn --output` writes it", must_exist=True)


@dataclass(frozen=True)
class ShardsConfig(ReadWhenMade):
    """The settings of ``beit shards``."""

    data_path: str = option("", IMAGE_LIST, positional=True, must_exist=True)
    output_dir: str = option("", "folder for the shards; must not contain any", positional=True)
    images_per_shard: int = option(10_000, "images per shard", within="[1, inf)")


@dataclass(frozen=True)
class CurvesConfig(OutputOptions):
    """The settings of ``beit visualize curves``."""

    logs: tuple[str, ...] = option((), "log.txt files, or their run folders", positional=True, must_exist=True)
    output: str = option("curves.png", PICTURE, short="-o")
    metrics: tuple[str, ...] = option((), "metrics to draw, such as loss mlm_acc; all but bookkeeping by default")


@dataclass(frozen=True)
class ReconstructConfig(OutputOptions):
    """The settings of ``beit visualize reconstruct``."""

    checkpoint: str = option("", "checkpoint of a pre-training run, or one of visual tokens in any format")
    tokenizer: str = option("", "the run's tokenizer, if it has moved or is not recorded")
    images: tuple[str, ...] = option((), ANY_IMAGES, must_exist=True)
    output: str = option("reconstructions.png", PICTURE, short="-o")
    steps: int = option(1, "passes to fill in the patches, the surest first; of tokens only", within="[1, inf)")
    limit: int = option(8, "maximum number of images to draw", within="[1, inf)")
    seed: int = option(0, "seed of the masks")
    device: str = option("cpu", DEVICE)


@dataclass(frozen=True)
class AttentionConfig(ViewerOptions):
    """The settings of ``beit visualize attention``."""

    images: tuple[str, ...] = option((), ANY_IMAGES, positional=True, must_exist=True)
    block: int = option(-1, "block number, counted from 0, or from the end if negative")
    heads: tuple[str, ...] = option(("mean", "all"), "head numbers, counted from 0; all; or mean for their average")
    query: tuple[str, ...] = option((), "query patches as ROW,COLUMN, counted from 0; three by default")
    mask_patches: int = option(0, "number of patches to mask for a pre-trained model, block-wise", within="[0, inf)")
    limit: int = option(4, "maximum number of images to draw", within="[1, inf)")
    seed: int = option(0, "seed of the masks")
    output: str = option("attention.png", PICTURE, short="-o")


@dataclass(frozen=True)
class DistanceConfig(ViewerOptions):
    """The settings of ``beit visualize distance``."""

    images: tuple[str, ...] = option((), ANY_IMAGES, positional=True, must_exist=True)
    limit: int = option(32, "maximum number of images to average over", within="[1, inf)")
    output: str = option("distance.png", PICTURE, short="-o")


@dataclass(frozen=True)
class BiasConfig(ViewerOptions):
    """The settings of ``beit visualize bias``."""

    output: str = option("bias.png", PICTURE, short="-o")


@dataclass(frozen=True)
class EmbeddingsConfig(FeatureOptions):
    """The settings of ``beit visualize embeddings``."""

    data_path: str = option("", "one folder of images per class, or shards with classes", must_exist=True)
    method: str = option("pca", "projection to 2D", choices=PROJECTIONS)
    limit: int = option(2000, "maximum number of images, spread evenly over the classes", within="[1, inf)")
    seed: int = option(0, "seed of t-SNE", within=f"[0, {2**32 - 1}]")
    output: str = option("embeddings.png", PICTURE, short="-o")
