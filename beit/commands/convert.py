"""`beit convert`: a checkpoint of any dialect in another one, or as a graph that runs without this library."""

import logging
from pathlib import Path

from beit.checkpoints.export import convert
from beit.checkpoints.formats import dialects
from beit.checkpoints.graphs import export_graph
from beit.commands.settings import ConvertConfig
from beit.errors import InputError
from beit.registry import FORMATS

logger = logging.getLogger(__name__)


def main(config: ConvertConfig) -> None:
    """Writes a checkpoint in another format; raises InputError if it cannot be read or the format has no such model."""
    if not config.to:
        raise InputError(f"--to is missing: one of {', '.join(FORMATS)}")
    graphs = [name for name in FORMATS if name not in dialects()]
    output = Path(config.output)
    if config.to in graphs:
        export_graph(config.checkpoint, output, config.to, features=config.features, **config.weights)
    elif config.features:
        raise InputError(f"--features is for {' and '.join(graphs)}; {config.to} holds the whole model")
    else:
        convert(config.checkpoint, output, config.to, **config.weights)
    logger.info("%s written", config.output)
