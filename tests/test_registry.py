"""The tables of names: what is in them can be built, is found by name, and can be added to from outside."""

from functools import partial

import numpy as np
import pytest

from beit import registry
from beit.checkpoints.formats.dialect import Dialect
from beit.checkpoints.graphs import Graph
from beit.errors import InputError
from beit.registry import MASK_STRATEGIES, TARGETS, TOKENIZERS, resolve
from beit.targets import PredictionTarget

TABLES = {name: table for name, table in vars(registry).items() if name.isupper() and isinstance(table, dict)}


@pytest.mark.parametrize("name", TABLES)
def test_every_entry_names_something_that_can_be_called(name):
    # Breaks when a class moves and its line in the table does not.
    assert {"MASK_STRATEGIES", "TARGETS", "TOKENIZERS", "FORMATS"} <= TABLES.keys()
    for key in TABLES[name]:
        found = resolve(TABLES[name], key, name)
        assert isinstance(found, (Dialect, Graph)) if name == "FORMATS" else callable(found)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(InputError, match=r"unknown target 'token' \(did you mean 'tokens'\?\): choose from tokens"):
        resolve(TARGETS, "token", "target")


@pytest.mark.parametrize("name", MASK_STRATEGIES)
def test_all_mask_strategies_take_the_same_arguments(name):
    strategy = resolve(MASK_STRATEGIES, name, "mask strategy")
    masks = strategy((6, 9), num_mask_patches=20, min_num_patches=4, max_num_patches=None)
    mask = masks(np.random.default_rng(0))
    assert (mask.shape, masks.grid_size, masks.num_mask_patches) == ((6, 9), (6, 9), 20)
    assert 1 <= mask.sum() <= 20


class Colours(PredictionTarget):
    """A target from outside that needs nothing of the run."""

    name, output_size = "colours", 3

    def compute(self, batch, index):
        return batch["image"].flatten()[index]

    def loss(self, outputs, targets, reduction="mean"):
        return getattr(outputs - targets, reduction)()


def test_what_is_registered_from_outside_is_found(monkeypatch):
    # By its path, and as the object itself; the default ``build`` of a target needs no code.
    monkeypatch.setitem(TARGETS, "colours", Colours)
    monkeypatch.setitem(MASK_STRATEGIES, "single", "beit.masking:RandomMaskGenerator")
    run = {"patch_size": (16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "pixel_norm": True}
    missing = partial(pytest.fail, "not needed")
    target = resolve(TARGETS, "colours", "target").build(tokenizer=missing, teacher=missing, **run)
    assert type(target) is Colours
    assert resolve(MASK_STRATEGIES, "single", "strategy") is resolve(MASK_STRATEGIES, "random", "strategy")
    assert "colours" not in TOKENIZERS
