"""Batch normalisation over processes is that of one process over the whole batch."""

import copy

import pytest
import torch
from torch import nn

from semantic_segmentation.batch_norm import CPUSyncBatchNorm, synchronise_batch_norm
from semantic_segmentation.modeling import build_segmentor
from tests.semantic_segmentation.two_processes_batch_norm import STEPS, network, train
from tests.shell import run


@pytest.mark.slow
@pytest.mark.parametrize("counts", ["4,4", "1,6"])
def test_two_processes_equal_one_over_the_whole_batch(tmp_path, counts, free_port):
    # Breaks if the gradient stops at the statistics, a process's own count is taken, or variances are just averaged.
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", free_port)
    run(*torchrun, "tests/semantic_segmentation/two_processes_batch_norm.py", tmp_path, counts)
    total = sum(map(int, counts.split(",")))
    expected = train(network(), slice(None), total, 1.0)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for step in range(STEPS):
        for what in (f"outputs {step}", f"input gradients {step}"):
            close(torch.cat((first[what], second[what])), expected[what])
        close(first[f"weight gradients {step}"], expected[f"weight gradients {step}"])
    close(torch.cat((first["evaluated"], second["evaluated"])), expected["evaluated"])
    close(first["state"], expected["state"])
    close(second["state"], expected["state"])
    assert first["bfloat16"].dtype == torch.bfloat16


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_names_and_tensors_of_a_segmentor_stay_the_same():
    # Breaks an optimizer built before, and every checkpoint.
    model = build_segmentor(
        img_size=32,
        embed_dim=8,
        depth=4,
        num_heads=2,
        out_indices=range(4),
        num_classes=3,
        channels=4,
        auxiliary_channels=4,
    )
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert synchronise_batch_norm(model) is model
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 1 + 4 + 1 + 3 + 3 + 1 + 1
    assert all(type(norm) is CPUSyncBatchNorm for norm in norms)


def test_alone_it_is_torchs_own():
    model = network()
    synchronised = synchronise_batch_norm(copy.deepcopy(model))
    expected, actual = (train(each, slice(None), 4, 1.0) for each in (model, synchronised))
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


def test_evaluation_mode_is_kept():
    assert not synchronise_batch_norm(nn.Sequential(nn.BatchNorm2d(2)).eval())[0].training


@pytest.mark.gpu
def test_on_a_gpu_it_is_torchs_synchronised_layer():
    model = synchronise_batch_norm(network().cuda())
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) == 2
