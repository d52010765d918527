"""Checkpoints in pieces, in one process: what comes back, and what is refused."""

import io
import pickle
import pickletools
from pathlib import Path

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from beit.checkpoints.pieces import (
    INDEX_FILE,
    STATE_FILE,
    read_pieces,
    read_whole,
    split_optimizer,
    write_pieces,
)
from beit.errors import InputError
from beit.storage import save_checkpoint


def trained(opt):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = create_optimizer_v2(model.parameters(), opt=opt, lr=0.1, weight_decay=0.1)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def write(folder, opt="adamw", **state):
    model, optimizer = trained(opt)
    tensors, rest = split_optimizer(optimizer.state_dict())
    tensors |= {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(folder / STATE_FILE, {"optimizer": rest, **state})
    write_pieces(folder, tensors)
    return model, optimizer


@pytest.mark.parametrize("opt", ["adamw", "muon", "sgd"])
def test_what_was_written_in_pieces_is_read_as_a_plain_checkpoint(tmp_path, opt):
    # muon's state has a bool, sgd's of timm None: neither is a tensor. Breaks if such values, or indices, are lost.
    model, optimizer = write(tmp_path / "checkpoint-3", opt, epoch=3)
    whole = read_whole(tmp_path / "checkpoint-3")
    assert whole.keys() == {"model", "optimizer", "epoch"}
    torch.testing.assert_close(whole["model"], dict(model.state_dict()), rtol=0, atol=0)
    expected = optimizer.state_dict()
    assert whole["optimizer"]["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(whole["optimizer"]["state"], expected["state"], rtol=0, atol=0)


def test_only_some_tensors_into_room_of_ones_own(tmp_path):
    model, _ = write(tmp_path)
    room = lambda _name, size, _dtype: torch.zeros(size, dtype=torch.float64)  # noqa: E731
    read = read_pieces(tmp_path, room, prefix="model.1")
    assert read.keys() == {"model.1.weight", "model.1.bias"}
    assert torch.equal(read["model.1.weight"], model[1].weight.double())


def test_no_path_of_this_machine_is_in_the_index(tmp_path):
    write(tmp_path)
    texts = [value for _, value, _ in pickletools.genops((tmp_path / INDEX_FILE).read_bytes()) if type(value) is str]
    assert "model.0.weight" in texts
    assert not [text for text in texts if "/" in text or "pathlib" in text]


class Marker:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_an_index_that_would_run_code_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / INDEX_FILE).write_bytes(pickle.dumps(Marker(tmp_path / "code was run")))
    with pytest.raises(InputError, match=r"\.metadata was not opened: it asks to call pathlib.*never run"):
        read_pieces(tmp_path)
    assert not (tmp_path / "code was run").exists()


def test_a_pickle_inside_a_piece_is_refused(tmp_path):
    # torch would open what the index calls bytes without looking. Breaks if such entries are let through.
    from torch.distributed.checkpoint import FileSystemWriter, save

    save({"model.x": torch.ones(2), "optimizer.0.y": {"not": "a tensor"}}, storage_writer=FileSystemWriter(tmp_path))
    with pytest.raises(InputError, match="was not opened"):
        read_pieces(tmp_path)


def test_a_bytes_entry_among_allowed_ones_is_refused(tmp_path):
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    write(tmp_path)
    index = pickle.load(io.BytesIO((tmp_path / INDEX_FILE).read_bytes()))
    index.state_dict_metadata["model.0.weight"] = BytesStorageMetadata()
    (tmp_path / INDEX_FILE).write_bytes(pickle.dumps(index))
    with pytest.raises(InputError, match="was not opened"):
        read_pieces(tmp_path)


def test_missing_and_damaged_pieces_are_said_in_one_line(tmp_path):
    write(tmp_path)
    (piece,) = tmp_path.glob("*.distcp")
    whole = (tmp_path / INDEX_FILE).read_bytes()
    (tmp_path / INDEX_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is damaged"):
        read_pieces(tmp_path)
    (tmp_path / INDEX_FILE).write_bytes(whole)
    piece.write_bytes(piece.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read: "):
        read_pieces(tmp_path)
    piece.unlink()
    with pytest.raises(InputError, match=r"cannot be read: .*No such file") as caught:
        read_pieces(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(InputError, match="holds no checkpoint in pieces"):
        read_pieces(tmp_path)
    (tmp_path / STATE_FILE).unlink()
    with pytest.raises(InputError, match=r"state\.pth"):
        read_whole(tmp_path)


@pytest.mark.parametrize("part", ["state_dict_metadata", "storage_meta", "size"])
def test_an_index_that_runs_no_code_but_makes_no_sense_is_said_in_one_line(tmp_path, part):
    # Breaks when a damaged or crafted index that holds allowed things only ends in torch, with a traceback.
    write(tmp_path)
    index = pickle.load(io.BytesIO((tmp_path / INDEX_FILE).read_bytes()))
    if part == "size":
        index.state_dict_metadata["model.0.weight"].size = torch.Size([1 << 60])
    else:
        setattr(index, part, "nonsense")
    (tmp_path / INDEX_FILE).write_bytes(pickle.dumps(index))
    with pytest.raises(InputError, match="choose another checkpoint"):
        read_pieces(tmp_path)


def test_weights_alone_are_read_without_the_optimizer(tmp_path):
    # Breaks when whoever wants the weights of a large model reads both moments of its optimizer too.
    write(tmp_path)
    weights = read_whole(tmp_path, optimizer=False)
    assert "model" in weights
    assert "optimizer" not in weights
