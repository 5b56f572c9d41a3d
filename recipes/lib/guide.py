"""README.md of a run folder of slim.py: what its files are, and which may go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from timm_autoslim import files

_TEXT = """# {name}

{table}
`exported/NETWORK` holds the networks. After `import timm_autoslim`:

```python
model = timm.create_model("local-dir:{first}", pretrained=True)
```

| what | for |
|---|---|
| `exported/` | the networks, each with its card and `result.json`: all that you need |
{between}{onnx}| `table.md` | the table above |
| `search/`, `to-*/search/` | widths and steps; `python -m timm_autoslim report {run}` shows them on one page |
| `finetune/`, `to-*/finetune/` | flags and curves (`summary.csv`) of the fine-tunings |
| `supernet.safetensors` | the original, its channels in order: the teacher, and the start of further budgets |
| `settings.yaml`, `args.yaml`, `original.json`, `held_out.json` | what the run began with |
| `flags.yaml` | the flags of the last call: those that you leave out are as there |
| `durations.json` | how long each stage took, over all calls |

Checkpoints of networks that are finished are removed. The same command with further `--budgets`, tighter or in
other metrics, goes on from here; for that, all but `finetune/` and `onnx/` must stay.
"""
_BETWEEN = "| `between/` | networks on the way to the budgets: reconstructed, not trained |\n"
_ONNX = "| `onnx/` | the networks as ONNX files, checked in ONNX Runtime |\n"


def write_guide(run: Path, networks: Sequence[str], onnx: bool) -> None:
    """Write README.md of a finished run; its table.md is there."""
    table = (run / "table.md").read_text(encoding="utf-8")
    first = run / "exported" / networks[0]
    lines = {"between": _BETWEEN if (run / "between").exists() else "", "onnx": _ONNX if onnx else ""}
    text = _TEXT.format(name=run.name, table=table, first=first, run=run, **lines)
    files.write_text(run / "README.md", text)
