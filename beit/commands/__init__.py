"""What the console command ``beit`` does, by name."""

from beit.commands.dispatch import Command


def _command(settings: str, main: str, help: str) -> Command:
    return Command(f"beit.commands.settings:{settings}", f"beit.commands.{main}", help)


def _job(settings: str, main: str, help: str) -> Command:
    return Command(f"beit.tasks.settings:{settings}", f"beit.tasks.{main}", help)


COMMANDS = {
    "pretrain": _job("PretrainingConfig", "pretraining:main", "pre-train BEiT on images"),
    "pretrain-v2": _job("PretrainingV2Config", "pretraining:main", "pre-train BEiT v2 on images"),
    "finetune": _job("FinetuningConfig", "finetuning:main", "fine-tune or evaluate a classifier"),
    "probe": _job("LinearProbeConfig", "linear_probe:main", "train linear heads on frozen features"),
    "dvae": _job("DvaeConfig", "dvae_training:main", "train a tokenizer on your images"),
    "vqkd": _job("VqkdConfig", "vqkd_training:main", "train BEiT v2's tokenizer on your images"),
    "knn": _command("KnnConfig", "knn:main", "score frozen features by their nearest neighbours"),
    "features": _command("FeaturesConfig", "features:main", "write features of images to a NumPy file"),
    "predict": _command("PredictConfig", "predict:main", "classify images"),
    "app": _command("AppConfig", "app:main", "try checkpoints on images, on a page in the browser"),
    "models": _command("ModelsConfig", "models:main", "list models and released checkpoints"),
    "inspect": _command("InspectConfig", "models:inspect", "show what a checkpoint holds, records and leaves open"),
    "recipes list": _command("ListConfig", "recipes:print_list", "list the recipes of published runs"),
    "recipes show": _command("ShowConfig", "recipes:show", "show a recipe: settings, quoted results, command"),
    "report": _command("ReportConfig", "report:main", "write an HTML page about runs"),
    "convert": _command("ConvertConfig", "convert:main", "convert a checkpoint to another library's format"),
    "push": _command("PushConfig", "push:main", "upload a checkpoint to the Hugging Face hub, with a model card"),
    "download tokenizer": _command("DownloadTokenizerConfig", "models:download", "download OpenAI's tokenizer"),
    "index": _command("IndexConfig", "shards:print_index", "list a folder's images once, before many runs"),
    "shards": _command("ShardsConfig", "shards:main", "pack images into tar shards (WebDataset)"),
    "visualize reconstruct": _command("ReconstructConfig", "visualize:reconstruct", "draw what masked patches become"),
    "visualize attention": _command("AttentionConfig", "visualize_attention:attention", "draw attention maps"),
    "visualize distance": _command("DistanceConfig", "visualize_attention:distance", "draw how far heads attend"),
    "visualize bias": _command("BiasConfig", "visualize_attention:bias", "draw relative position biases"),
    "visualize embeddings": _command("EmbeddingsConfig", "visualize:embeddings", "draw features in 2D, by class"),
    "visualize curves": _command("CurvesConfig", "visualize:curves", "draw the curves of training logs"),
}
