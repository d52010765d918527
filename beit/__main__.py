"""The console command ``beit``: every job of the package by name. Nothing heavy is imported before it is needed."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from beit.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Args:
        module: Where it lives.
        config: Its configuration's class there.
        main: Its function there.
        help: One line on what it does.
    """

    module: str
    config: str
    main: str
    help: str


COMMANDS = {
    "convert": Command(
        "beit.commands.convert", "ConvertConfig", "main", "write a checkpoint in another library's format"
    ),
    "demo": Command("examples.demo", "DemoConfig", "main", "watch BEiT learn on this machine, in minutes"),
    "download tokenizer": Command(
        "beit.commands.commands", "DownloadTokenizerConfig", "download", "fetch OpenAI's tokenizer into a folder"
    ),
    "dvae": Command("beit.tasks.dvae_training", "DvaeConfig", "main", "train a tokenizer on your images"),
    "finetune": Command("beit.tasks.finetuning", "FinetuningConfig", "main", "fine-tune or evaluate a classifier"),
    "index": Command("beit.commands.commands", "IndexConfig", "print_index", "list images once, before many runs"),
    "knn": Command("beit.commands.knn", "KnnConfig", "main", "score features by nearest neighbours; trains nothing"),
    "predict": Command("beit.commands.predict", "PredictConfig", "main", "say what images show"),
    "pretrain": Command("beit.tasks.pretraining", "PretrainingConfig", "main", "pre-train BEiT on a folder of images"),
    "probe": Command(
        "beit.tasks.linear_probe", "LinearProbeConfig", "main", "train linear classifiers on frozen features"
    ),
    "recipes list": Command("beit.commands.recipes", "ListConfig", "print_list", "list the published runs"),
    "recipes show": Command("beit.commands.recipes", "ShowConfig", "show", "say all about a published run"),
    "recipes command": Command(
        "beit.commands.recipes", "CommandConfig", "print_command", "work out a published run's command for your GPUs"
    ),
    "recipes document": Command(
        "beit.commands.recipes", "DocumentConfig", "write_document", "write docs/reproducing.md from the recipes"
    ),
    "report": Command("beit.commands.report", "ReportConfig", "main", "put runs onto one page that stands alone"),
    "models": Command("beit.commands.commands", "ModelsConfig", "print_models", "list the models with their sizes"),
    "shards": Command(
        "beit.commands.shards", "ShardsConfig", "main", "pack images into tar files in WebDataset's format"
    ),
    "visualize reconstruct": Command(
        "beit.commands.visualize", "ReconstructConfig", "reconstruct", "draw what a model makes of masked patches"
    ),
    "visualize curves": Command(
        "beit.commands.visualize", "CurvesConfig", "curves", "draw the curves of training logs"
    ),
    "visualize attention": Command(
        "beit.commands.visualize_attention", "AttentionConfig", "attention", "draw where patches of images look"
    ),
    "visualize distance": Command(
        "beit.commands.visualize_attention", "DistanceConfig", "distance", "draw how far the heads of each block look"
    ),
    "visualize bias": Command(
        "beit.commands.visualize_attention", "BiasConfig", "bias", "draw relative position biases as images"
    ),
    "visualize embeddings": Command(
        "beit.commands.visualize_embeddings", "EmbeddingsConfig", "embeddings", "draw features in the plane, by class"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``beit <command> ...`` and returns the exit status: 0, or 2 for a mistake in the input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = find_command(arguments)
    if name is None and (described := asked_for(arguments)):
        sys.stdout.write(overview(described))
        return 0
    from beit.launch import launch, run_and_report

    if name is None:
        return run_and_report(lambda: refuse(arguments))
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    config, run = getattr(module, command.config), getattr(module, command.main)
    own = arguments[len(name.split()) :]
    return launch(config, run, f"{command.help}\n", own, f"beit {name}", owns_process=argv is None)


def find_command(arguments: Sequence[str]) -> str | None:
    """Returns the command, of one word or two, that the arguments begin with."""
    candidates = (" ".join(arguments[:words]) for words in (2, 1))
    return next((name for name in candidates if name in COMMANDS), None)


def asked_for(arguments: Sequence[str]) -> dict[str, Command]:
    """Returns the commands that arguments like ``--help``, ``visualize --help`` or none at all want to be told of."""
    words = [word for word in arguments if word not in ("-h", "--help", "help")]
    if len(words) > 1 or words == list(arguments) != []:
        return {}
    return {name: command for name, command in COMMANDS.items() if name.split()[: len(words)] == words}


def refuse(arguments: Sequence[str]) -> None:
    """Says that the arguments begin with no command.

    Raises:
        InputError: Always.
    """
    siblings = [name for name in COMMANDS if name.split()[0] == arguments[0]]
    if siblings:
        given = " ".join(arguments[:2])
        raise InputError(
            f"beit {given}: no such command{did_you_mean(given, siblings)}; there is {', '.join(siblings)}"
        )
    hint = did_you_mean(arguments[0], [word for name in COMMANDS for word in (name, name.split()[0])])
    raise InputError(f"unknown command {arguments[0]!r}{hint}: beit has {', '.join(COMMANDS)}")


def overview(commands: Mapping[str, Command]) -> str:
    """Returns a list of commands."""
    width = max(map(len, commands))
    lines = (f"  {name:<{width}}  {command.help}" for name, command in commands.items())
    return "\n".join(["usage: beit COMMAND ...   (beit COMMAND --help says more)", "", *lines, ""])


if __name__ == "__main__":
    sys.exit(main())
