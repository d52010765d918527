"""OpenAI's own package as a peer: it has the same name as ours, so it is imported behind its back."""

import contextlib
import importlib
import sys
from pathlib import Path

import pytest

PEERS = Path(sys.prefix) / "peers"


@contextlib.contextmanager
def _openai_package():
    """Inside, `dall_e` is the package of the distribution DALL-E (needed for pickling its classes, too)."""

    def ours(name):
        return name == "dall_e" or name.startswith("dall_e.")

    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)}
    assert (PEERS / "dall_e").is_dir(), f"OpenAI's package is not in {PEERS}: `make test` installs it there"
    sys.path.insert(0, str(PEERS))
    try:
        package = importlib.import_module("dall_e")
        assert not hasattr(package, "save_model"), "our package was imported as its own peer"
        yield package
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(kept)


@pytest.fixture
def openai_package():
    return _openai_package


def _make_peer(package, kind, **sizes):
    """A module of OpenAI's package at sizes that its validators refuse, with non-degenerate weights."""
    import attr
    import torch

    attr.validators.set_disabled(True)
    try:
        peer = {"encoder": package.Encoder, "decoder": package.Decoder}[kind](**sizes)
    finally:
        attr.validators.set_disabled(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in peer.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise * 1.2 / max(1, parameter[0].numel()) ** 0.5)
    return peer


@pytest.fixture
def make_peer():
    return _make_peer
