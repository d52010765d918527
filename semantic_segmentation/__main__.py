"""``python -m semantic_segmentation COMMAND``: training, testing, and what is done with the result."""

import sys
from collections.abc import Sequence

from beit.commands.dispatch import Command, dispatch

COMMANDS = {
    "train": Command(
        "semantic_segmentation.config:TrainConfig", "semantic_segmentation.task:main", "train a segmentor: CONFIG"
    ),
    "test": Command(
        "semantic_segmentation.config:TestConfig", "semantic_segmentation.testing:main", "score one: CONFIG CHECKPOINT"
    ),
    "predict": Command(
        "semantic_segmentation.config:PredictConfig", "semantic_segmentation.predict:main", "segment images: IMAGE ..."
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0, or 2 for a mistake in the input."""
    return dispatch("semantic_segmentation", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
