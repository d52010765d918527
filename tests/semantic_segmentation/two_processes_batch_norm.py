"""One of several processes that train one network; run by test_batch_norm.py under torchrun.

two_processes_batch_norm.py FOLDER COUNTS     COUNTS such as 2,6: how many of the images each process takes
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from beit.training import distributed
from beit.training.placement import find_placement
from semantic_segmentation.batch_norm import synchronise_batch_norm

STEPS = 2


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=None)]
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5)
    return model


def batch(step: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    shift = torch.arange(total).view(-1, 1, 1, 1).float()  # so that the processes' means differ
    return torch.randn(total, 3, 8, 6, generator=generator) + shift, torch.randn(total, 5, 4, 2, generator=generator)


def train(model: nn.Module, part: slice, total: int, scale: float) -> dict:
    """Takes steps; the loss is the mean over all images, of which this process sees ``part``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = {}
    for step in range(STEPS):
        images, targets = (tensor[part] for tensor in batch(step, total))
        images = images.clone().requires_grad_()
        outputs = model(images)
        optimizer.zero_grad()
        (scale * (outputs * targets).square().sum() / total).backward()
        bare = getattr(model, "module", model)
        found[f"outputs {step}"] = outputs.detach()
        found[f"input gradients {step}"] = images.grad / scale
        found[f"weight gradients {step}"] = {n: p.grad.clone() for n, p in bare.named_parameters()}
        optimizer.step()
    model.eval()
    found["evaluated"] = model(batch(9, total)[0][part]).detach()
    return found | {"state": {name: tensor.clone() for name, tensor in bare.state_dict().items()}}


def main(folder: Path, counts: list[int]) -> None:
    distributed.connect(find_placement(), torch.device("cpu"))
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(synchronise_batch_norm(network()))
    start = sum(counts[:rank])
    # DistributedDataParallel averages gradients: each process's part counts `world` times.
    found = train(model, slice(start, start + counts[rank]), sum(counts), float(world))
    with torch.autocast("cpu", torch.bfloat16):
        found["bfloat16"] = model.module.train()(batch(0, sum(counts))[0][start : start + counts[rank]]).detach()
    dist.barrier()
    torch.save(found, folder / f"rank{rank}.pt")
    distributed.disconnect()  # ends gloo's threads, too; one that outlives the interpreter would abort the process


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(count) for count in sys.argv[2].split(",")])
