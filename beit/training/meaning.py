"""What gives the weights and scores of a checkpoint their meaning, and what follows if a resumed run has another.

A job records these facts with every checkpoint (``Task.extras``), and :func:`compare` holds a resumed run to them.
"""

import logging
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beit.errors import InputError
from beit.storage import settings_in

logger = logging.getLogger(__name__)

WEIGHTS, SCORES, ORDER = "weights", "scores", "order"


@dataclass(frozen=True)
class Fact:
    """Something that a checkpoint records about what its numbers mean, and what another value changes.

    ``WEIGHTS`` cannot be resumed then, ``SCORES`` are not compared with those of before, and with another ``ORDER`` the
    run goes on with other samples.
    """

    name: str  # in messages
    decides: str  # one of the three
    remedy: str = "the same data"  # how a run with the recorded value is started
    unrecorded: object = None  # what a checkpoint means that records nothing; None if that is not known
    plural: bool = False  # whether the name is one

    @property
    def other(self) -> str:
        """What to call another one."""
        return f"{'other' if self.plural else 'another'} {self.name}"


FACTS: dict[str, Fact] = {
    "target": Fact("prediction target", WEIGHTS, "the same --target and --pixel_norm", unrecorded="visual tokens"),
    "tokenizer": Fact("tokenizer", WEIGHTS, "the same --discrete_vae_weight_path"),
    "quantizer": Fact("quantizer", WEIGHTS, "the same --quantizer", unrecorded="gumbel"),
    "teacher": Fact("teacher", WEIGHTS, "the same --teacher"),
    "labels": Fact("classes", WEIGHTS, plural=True),
    "reduce_zero_label": Fact("reduce_zero_label", WEIGHTS, "the same reduce_zero_label"),
    "backbone": Fact("backbone", WEIGHTS, "the same --checkpoint and --input_size"),
    "process_type": Fact("process_type", WEIGHTS, "the same --process_type"),
    "early_layers": Fact("early_layers", WEIGHTS, "the same --early_layers"),
    "mean": Fact("mean of the images", WEIGHTS, "--imagenet_default_mean_and_std and --mean as they were"),
    "eval_data": Fact("validation images", SCORES, plural=True),
    "crop_pct": Fact("crop_pct", SCORES),
    "data": Fact("training images", ORDER, plural=True),
}


def compare(recorded: Mapping[str, Any], own: Mapping[str, Any], source: str) -> frozenset[str]:
    """Compares what a checkpoint called ``source`` records with a run's own facts.

    Returns what has changed, of ``SCORES`` and ``ORDER``, with a warning for each.

    Raises:
        InputError: The weights would mean something else in this run.
    """
    changed, unknown = set(), []
    for key, fact in FACTS.items():
        if key not in own:
            continue
        then, now = recorded.get(key, fact.unrecorded), own[key]
        if then is None:  # version 0.1 had some among the settings only
            then = settings_in(recorded).get(key)
        if then is None:
            unknown.append(fact.name)
        elif plain(then) != plain(now):
            told = difference(then, now)
            if fact.decides == WEIGHTS:
                raise InputError(
                    f"{source} was trained with {fact.other}{told}: resume with {fact.remedy}, or start a new run "
                    "with another --output_dir, from its weights with --init_from in jobs that have it"
                )
            follows = "scores so far are not compared with new ones" if fact.decides == SCORES else "samples differ"
            logger.warning("%s than in %s%s: %s", fact.other, source, told, follows)
            changed.add(fact.decides)
    if unknown:
        logger.warning("%s does not record its %s: not compared with this run's", source, ", ".join(unknown))
    return frozenset(changed)


def plain(value: object) -> object:
    """Returns a value such that lists and tuples of the same items are equal, and names however accents are coded."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def difference(then: object, now: object) -> str:
    """Describes a difference, with the first of several; a fingerprint tells a reader nothing."""
    if isinstance(then, (list, tuple)) and isinstance(now, (list, tuple)):
        if len(then) != len(now):
            return f" ({len(then)} there, {len(now)} here)"
        number = next(number for number, pair in enumerate(zip(then, now, strict=True)) if pair[0] != pair[1])
        return f" (number {number} is {then[number]!r} there, {now[number]!r} here)"
    is_hash = isinstance(then, str) and len(then) >= 32
    return "" if is_hash else f" ({then} there, {now} here)"
