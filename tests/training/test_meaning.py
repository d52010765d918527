"""What a checkpoint's numbers mean is compared when a run goes on."""

import logging

import pytest

from beit.errors import InputError
from beit.training.meaning import FACTS, ORDER, SCORES, WEIGHTS, compare

VALUES = {  # of each fact: one, and another
    "target": ("visual tokens", "pixels"),
    "tokenizer": ("a" * 64, "b" * 64),
    "quantizer": ("gumbel", "vq"),
    "process_type": ("default", "imagenet_norm"),
    "early_layers": (9, 6),
    "teacher": ("a" * 64, "b" * 64),
    "labels": (["ant", "bee"], ["bee", "cat"]),
    "reduce_zero_label": (True, False),
    "backbone": ("a" * 64, "b" * 64),
    "mean": ([0.5, 0.5, 0.5], [0.485, 0.456, 0.406]),
    "eval_data": ("a" * 64, "b" * 64),
    "crop_pct": (0.875, 1.0),
    "data": ("a" * 64, "b" * 64),
}


@pytest.mark.parametrize("key", FACTS)
def test_another_value_is_refused_or_told(key, caplog):
    # Breaks if a fact is recorded and not compared.
    then, now = VALUES[key]
    as_stored = tuple(then) if isinstance(then, list) else then
    assert compare({key: as_stored}, {key: then}, "a.pth") == frozenset()
    assert not caplog.records
    if FACTS[key].decides == WEIGHTS:
        with pytest.raises(InputError, match=rf"a\.pth was trained with {FACTS[key].other}.*: resume with "):
            compare({key: then}, {key: now}, "a.pth")
        return
    assert compare({key: then}, {key: now}, "a.pth") == {FACTS[key].decides}
    assert f"{FACTS[key].other} than in a.pth" in caplog.messages[0]
    assert "bbbb" not in caplog.text  # a hash tells a reader nothing


def test_what_differs_is_named():
    with pytest.raises(InputError, match=r"classes \(number 0 is 'ant' there, 'bee' here\)"):
        compare({"labels": ["ant", "bee"]}, {"labels": ["bee", "cat"]}, "a.pth")
    with pytest.raises(InputError, match=r"classes \(2 there, 3 here\)"):
        compare({"labels": ["ant", "bee"]}, {"labels": ["ant", "bee", "cat"]}, "a.pth")


def test_names_are_the_same_however_their_accents_are_coded():
    assert compare({"labels": ["\u00e9crin"]}, {"labels": ["e\u0301crin"]}, "a.pth") == frozenset()


def test_what_was_not_recorded_refuses_nothing_and_is_said_once(caplog):
    own = {key: values[0] for key, values in VALUES.items()}
    with caplog.at_level(logging.WARNING):
        assert compare({"args": {"reduce_zero_label": True}}, own, "official.pth") == frozenset()
    (message,) = caplog.messages
    assert "official.pth does not record its tokenizer, teacher, classes, backbone" in message
    assert "target" not in message  # all official files predict visual tokens
    assert "reduce_zero_label" not in message  # version 0.1 had it among its settings
    with pytest.raises(InputError, match="another prediction target"):
        compare({}, {"target": "pixels"}, "official.pth")
    assert {fact.decides for fact in FACTS.values()} == {WEIGHTS, SCORES, ORDER}
