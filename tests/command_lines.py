"""The command lines of segmentation, as its tools read them."""

from functools import partial

from beit.config import read_command_line
from semantic_segmentation.config import TestConfig, TrainConfig

read_train = partial(read_command_line, TrainConfig, prog="train.py", description="")
read_test = partial(read_command_line, TestConfig, prog="test.py", description="")
