"""Files of every age open without running what is in them, and files that are something else say so."""

import contextlib
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from dall_e import Decoder, Encoder, ModelFileError, load_model

SIZES = {"n_hid": 4, "n_blk_per_group": 1, "vocab_size": 12}


class Harmful:
    """Unpickled, it runs a command that leaves a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def same_weights(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_modules_pickled_by_openai_open_in_both_formats(tmp_path, openai_package, make_peer, kind, new_format):
    # The format before torch 1.6 also holds ("module", class, source) references; breaks if those are refused, or if
    # the storages behind the pickle are read in the wrong order.
    path = tmp_path / "model.pkl"
    with openai_package() as package:
        peer = make_peer(package, kind, **SIZES)
        torch.save(peer, path, _use_new_zipfile_serialization=new_format)
    model = load_model(path)
    assert type(model) is (Encoder if kind == "encoder" else Decoder)
    assert same_weights(model, peer)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert model.use_mixed_precision == peer.use_mixed_precision


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}])
def test_state_dicts_open(tmp_path, new_format, wrap):
    decoder = Decoder(**SIZES)
    torch.save(wrap(decoder.state_dict()), tmp_path / "model.pt", _use_new_zipfile_serialization=new_format)
    assert same_weights(load_model(tmp_path / "model.pt", torch.device("cpu")), decoder)


def test_safetensors_files_open(tmp_path):
    encoder, decoder = Encoder(**SIZES), Decoder(**SIZES)
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    (tmp_path / "config.json").write_text('{"encoder": {"use_mixed_precision": false}}')
    assert same_weights(load_model(tmp_path), encoder)  # the folder's only file needs no name
    save_file(decoder.state_dict(), tmp_path / "decoder.safetensors")
    assert same_weights(load_model(tmp_path / "encoder.safetensors"), encoder)
    assert load_model(tmp_path / "encoder.safetensors").use_mixed_precision is False
    assert same_weights(load_model(tmp_path / "decoder.safetensors"), decoder)
    with pytest.raises(ModelFileError, match=r"decoder\.safetensors, encoder\.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_calls_os_system_is_refused_and_nothing_runs(tmp_path, new_format):
    # Breaks as soon as find_class hands out anything real. The last lines show that the file is harmful indeed.
    marker, path = tmp_path / "ran", tmp_path / "model.pkl"
    torch.save({"weights": Harmful(marker)}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ModelFileError, match=r"import (posix|nt)\.system"):
        load_model(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_harm_hidden_in_the_leading_pickles_of_the_old_format_is_refused(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(Harmful(marker), protocol=2))
    with pytest.raises(ModelFileError, match="never run"):
        load_model(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "builtins getattr", "torch load", "dall_e.encoder torch", "torch.nn.modules.linear Linear"],
)
def test_names_off_the_list_are_refused(tmp_path, name):
    # In particular names that a listed module merely imports.
    module, attribute = name.split()
    path = tmp_path / "model.pkl"
    path.write_bytes(b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"(tR.")
    with pytest.raises(ModelFileError, match=f"import {module}.{attribute}"):
        load_model(path)


def test_a_pickle_cannot_alter_the_functions_it_may_name(tmp_path):
    # BUILD on a global function would otherwise set its attributes, for the rest of the process.
    path = tmp_path / "model.pkl"
    path.write_bytes(b"\x80\x02ctorch._utils\n_rebuild_parameter\n}X\x01\x00\x00\x00aK\x01sb.")
    with pytest.raises(ModelFileError):
        load_model(path)
    assert not hasattr(torch._utils._rebuild_parameter, "a")
    torch.save(Encoder(**SIZES).state_dict(), path)
    load_model(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>Sign in", "HTML page"),
        (b"\n  <html lang=en>", "HTML page"),
        (b"<?xml version='1.0'?><Error><Code>PublicAccessNotPermitted", "XML message"),
        (b"--2022-03-29 10:11:12--  https://cdn.openai.com/dall-e/encoder.pkl\nResolving", "log of wget"),
        (b"PK\x03\x04" + bytes(500), "truncated"),
        (b"hello", "begins with b'hello'"),
        (b"\x80\x02", "truncated or damaged"),
        (pickle.dumps({"a": 1}, protocol=2), "torch.save did not write"),
        (b"\x80\x04" + bytes(range(255)), "truncated or damaged"),
    ],
)
def test_files_that_are_something_else_say_what_they_are(tmp_path, content, what):
    path = tmp_path / "encoder.pkl"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=what) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files_say_so(tmp_path, new_format, share):
    whole, cut = tmp_path / "whole.pkl", tmp_path / "cut.pkl"
    torch.save(Encoder(**SIZES).state_dict(), whole, _use_new_zipfile_serialization=new_format)
    data = whole.read_bytes()
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelFileError, match="truncated"):
        load_model(cut)


def test_random_damage_never_ends_in_another_error(tmp_path):
    # Flipped bytes may still give a readable file; whatever happens is a model or a ModelFileError.
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "model.pkl"
    for new_format in (True, False):
        torch.save(Encoder(**SIZES).state_dict(), path, _use_new_zipfile_serialization=new_format)
        whole = path.read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            for place in torch.randint(0, 4000, (8,), generator=generator):
                data[place] ^= 255
            path.write_bytes(data)
            with contextlib.suppress(ModelFileError):
                load_model(path)


def test_other_content_is_refused_by_name(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ModelFileError, match="neither an encoder nor a decoder"):
        load_model(path)
    state = Encoder(**SIZES).state_dict()
    state["blocks.group_2.block_1.res_path.conv_1.b"] = torch.zeros(3)
    torch.save(state, path)
    with pytest.raises(ModelFileError, match=r"group_2\.block_1\.res_path\.conv_1\.b .*found \(3,\), expected \(2,\)"):
        load_model(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ModelFileError, match="torch did not write"):
        load_model(path)


def test_missing_files_and_addresses(tmp_path):
    with pytest.raises(ModelFileError, match="no file"):
        load_model(tmp_path / "encoder.pkl")
    with pytest.raises(ModelFileError, match="beit download tokenizer"):
        load_model("https://cdn.openai.com/dall-e/encoder.pkl")
    with pytest.raises(ModelFileError, match="found: none"):
        load_model(tmp_path)
    (tmp_path / "encoder.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ModelFileError, match="damaged"):
        load_model(tmp_path)
