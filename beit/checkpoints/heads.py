"""Classifiers whose classes are known by name: their rows are matched by it, not taken by position."""

import contextlib
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from beit.checkpoints.formats.dialect import Weights
from beit.checkpoints.read import Metadata
from beit.errors import listed

logger = logging.getLogger(__name__)

CLASSIFIERS = re.compile(r"head\.|(decode|auxiliary)_head\.(.*\.)?conv_seg\.")
IMAGENET_CLASSES = 1000
_WORDNET_ID = re.compile(r"n\d{8}")


def match_classes(
    weights: Weights, metadata: Metadata, own: Weights, classes: Sequence[str]
) -> tuple[dict[str, Tensor], Metadata, list[str]]:
    """Brings a checkpoint's classifiers into the order of ``classes``, by the names that it records.

    A class that the checkpoint does not know gets the row of ``own``, the initial state dict of the model. Nothing is
    changed where the names agree, where the checkpoint has no classifier, or where it does not name its classes: then
    a warning says that they are taken in order, if there are as many. WordNet ids, as ImageNet's folders are called,
    are the same as the words for them.

    Returns:
        Weights and metadata of the checkpoint with these classes, and the classes that it does not know.
    """
    rows = {name: tensor for name, tensor in weights.items() if CLASSIFIERS.match(name) and name in own}
    if not rows:
        return dict(weights), metadata, []
    source, count = metadata.get("source", "the checkpoint"), len(next(iter(rows.values())))
    learnt, wanted = _names(metadata, count, classes)
    if not learnt and count == len(wanted):
        logger.warning("%s does not record its classes: taking them in the order of the data's", source)
        return dict(weights), metadata, []
    if not learnt and "head.weight" in rows:  # loading says that it does not fit, and whether that matters
        return dict(weights), metadata, []
    if learnt == wanted:
        return dict(weights), {**metadata, "labels": tuple(classes)}, []
    known = {row: learnt.index(name) for row, name in enumerate(wanted) if learnt.count(name) == 1}
    fresh = [name for row, name in enumerate(classes) if row not in known]
    matched = {}
    for name, tensor in rows.items():
        if tensor.shape[1:] == own[name].shape[1:]:  # otherwise the heads differ in more, and loading says so
            matched[name] = own[name].clone()
            matched[name][list(known)] = tensor[list(known.values())].to(own[name])
    rest = f"; from scratch: {listed(fresh)}" if fresh else ""
    if unused := count - len(known):
        rest += f"; {unused} of its {count} classes are not in the data and cannot be predicted"
    logger.warning("%s: %d of %d classes matched by name%s", source, len(known), len(wanted), rest)
    return {**weights, **matched}, {**metadata, "labels": tuple(classes)}, fresh


def comparable(*lists: Sequence[object]) -> list[list[str]]:
    """Returns lists of class names in one spelling; letters differ in case only where they must to be told apart."""
    exact = [[unicodedata.normalize("NFC", str(name).strip()) for name in names] for names in lists]
    folded = [[name.casefold() for name in names] for names in exact]
    return folded if all(len({*names}) == len(names) for names in folded) else exact


def _names(metadata: Metadata, count: int, classes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the names that a checkpoint of ``count`` classes has for them, none if unknown, and the given ones."""
    learnt, wanted = comparable(metadata.get("labels") or (), classes)
    learnt = learnt if len(learnt) == count else []
    if _are_ids(learnt) == _are_ids(wanted):
        return learnt, wanted
    from timm.data import ImageNetInfo  # reads word lists of some megabytes

    if not learnt:  # released files name no classes; ImageNet's 1000 are told by their number and the data's names
        of_imagenet = ImageNetInfo("imagenet-1k").label_names() if count == IMAGENET_CLASSES else []
        return (of_imagenet if set(wanted) <= set(of_imagenet) else []), wanted
    words = ImageNetInfo("imagenet-22k").label_name_to_description
    from_ids = _are_ids(learnt)
    with contextlib.suppress(KeyError):  # of no known synset
        learnt, wanted = ([words(name) for name in names] if _are_ids(names) else names for names in (learnt, wanted))
    learnt, wanted = comparable(learnt, wanted)
    # "tench, Tinca tinca" is also known by each of its words that no other class has.
    pairs = [(word, text) for text in (learnt if from_ids else wanted) for word in text.split(", ")]
    common = Counter(word for word, _ in pairs)
    whole = {word: text for word, text in pairs if common[word] == 1}
    return [whole.get(name, name) for name in learnt], [whole.get(name, name) for name in wanted]


def _are_ids(names: Sequence[str]) -> bool:
    return bool(names) and all(map(_WORDNET_ID.fullmatch, names))
