"""Writing a model as a graph that runs without this library, checked against the model."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from beit.checkpoints.export import check_segmentors
from beit.checkpoints.load import open_checkpoint
from beit.errors import InputError
from beit.registry import FORMATS, resolve
from beit.storage import atomic_write

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of a graph's outputs compared with ours, in float32

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Graph:
    """A format of graphs."""

    suffix: str  # of its file
    write: Callable[[torch.export.ExportedProgram, Path], Run]  # to a file, and returns a function that runs it
    attention: str = ""  # which the graph is made of; see :meth:`beit.modeling.Backbone.set_attention`
    needs: Sequence[str] = ()  # packages that are not always installed


def export_graph(
    source: str | Path,
    destination: Path,
    to: str,
    *,
    features: bool = False,
    model_key: str = "",
    prefix: str = "",
    num_heads: int | None = None,
) -> None:
    """Writes a model as a graph for any batch size, and compares its outputs with the model's.

    ``to`` is a format of graphs in :data:`beit.registry.FORMATS`; with ``features`` the graph ends with the features
    ``(B, D)`` before the head. The source is given as for :func:`beit.checkpoints.read.read_weights`.

    Raises:
        InputError: The checkpoint is a segmentor, a library is missing, or the graph computes something else.
    """
    form: Graph = resolve(FORMATS, to, "format")
    if destination.suffix != form.suffix:
        raise InputError(f"--to {to} writes one file: name it {destination.with_suffix(form.suffix)}")
    if missing := [name for name in form.needs if importlib.util.find_spec(name) is None]:
        raise InputError(f"--to {to} needs more packages, pip install {' '.join(missing)}; --to torch_export does not")
    model, metadata = open_checkpoint(source, model_key, prefix, num_heads)
    check_segmentors(to, False, metadata)
    if form.attention:
        model.set_attention(form.attention)
    graph = Features(model) if features or not hasattr(model, "head") else model
    channels = model.patch_embed.proj.in_channels
    images = torch.randn(2, channels, *model.img_size, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1)
    run = form.write(torch.export.export(graph, (images,), dynamic_shapes=({0: batch},)), destination)
    with torch.no_grad():
        for inputs in (images, torch.cat((images, images.flip(3)))[:3]):
            difference = (run(inputs) - graph(inputs)).abs().max().item()
            if not difference <= TOLERANCE:
                destination.unlink()
                raise InputError(f"the graph of {source} differs from the model by {difference:.1e}; it was deleted")
    logger.info("checked against the model: outputs differ by at most %.1e", difference)


class Features(nn.Module):
    """The input of a classifier's head, ``(B, D)``; for a pre-training model all tokens, ``(B, N + 1, D)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Takes images ``(B, C, H, W)``."""
        return self.model.forward_features(images)  # type: ignore[operator]


def _write_torch_export(program: torch.export.ExportedProgram, destination: Path) -> Run:
    with atomic_write(destination) as file:
        torch.export.save(program, file)
    return torch.export.load(destination).module()


def _write_onnx(program: torch.export.ExportedProgram, destination: Path) -> Run:
    import onnxruntime

    exported = torch.onnx.export(program, input_names=["images"], output_names=["output"], dynamo=True, verbose=False)
    assert exported is not None
    with atomic_write(destination) as file:
        file.write(exported.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(str(destination), providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])


# ONNX has no fused attention: torch's own does not decompose into its operations.
ONNX = Graph(".onnx", _write_onnx, attention="eager", needs=("onnx", "onnxscript", "onnxruntime"))
TORCH_EXPORT = Graph(".pt2", _write_torch_export)
