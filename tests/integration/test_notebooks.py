"""The notebooks of the docs run, one after another in one kernel, as small as the settings below make them.

The settings here follow those in a notebook's cell of the tag ``parameters``, as in papermill; nothing else differs.
"""

from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from beit import create_model

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"
SETTINGS = {  # in this order: the second and third look at what the first has trained
    "pretrain": "SIZE, CROPS, TOKENIZER_EPOCHS, EPOCHS = 32, 32, 1, 2",
    "features": "CHECKPOINT = 'output/pretrain/checkpoint-1.pth'",
    "attention": "CHECKPOINT, TOKENIZER = 'output/pretrain/checkpoint-1.pth', 'output/dvae'",
    "segmentation": "STEPS = 4",
    "conversion": "CHECKPOINT = 'classifier.pth'",
}

pytestmark = pytest.mark.slow


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks")
    model = create_model("beit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    torch.save({"model": model.state_dict()}, folder / "classifier.pth")
    client = NotebookClient(
        nbformat.v4.new_notebook(), kernel_name="python3", timeout=300, resources={"metadata": {"path": str(folder)}}
    )
    with client.setup_kernel():
        yield client


@pytest.mark.parametrize("name", SETTINGS)
def test_a_notebook_runs(name, kernel):
    notebook = read(name)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += f"\n{SETTINGS[name]}"
    kernel.nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%reset -f"), *notebook.cells])
    for index, cell in enumerate(kernel.nb.cells):
        kernel.execute_cell(cell, index)


def test_all_notebooks_are_run_and_stored_without_outputs():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SETTINGS)
    code = [cell for name in SETTINGS for cell in read(name).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
