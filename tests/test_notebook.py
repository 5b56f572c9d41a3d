"""What a notebook shows: tables and figures, in cells that run."""

import nbformat
import pytest
from nbclient import NotebookClient

CELLS = [
    """
import timm, torch, timm_autoslim
model = timm.create_model("resnet10t", num_classes=10, channels=[8, 8, 16, 16], stem_width=8)
supernet = timm_autoslim.convert(model, torch.zeros(1, 3, 32, 32))
supernet.space
""",
    "supernet.space.uniform(0.5)",
    'result = timm_autoslim.search(supernet, {"macs": ["60%", "40%"]}, lambda subnet: 0.0)\nresult',
    "timm_autoslim.plot.widths(result)",
    "timm_autoslim.plot.descent(result)",
    "timm_autoslim.plot.pareto(result)",
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's own packages
def test_cells_show_tables_and_figures():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in CELLS])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    kinds = ["text/html"] * 3 + ["image/svg+xml"] * 3
    for cell, kind in zip(notebook.cells, kinds, strict=True):
        assert any(kind in output.get("data", {}) for output in cell.outputs), cell.source
