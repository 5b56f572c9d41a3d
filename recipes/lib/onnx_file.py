"""A network as an ONNX file that was checked."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import timm
import torch
from torch import Tensor

from timm_autoslim import files
from timm_autoslim.errors import ArtifactError, ConfigError


def check_onnx() -> None:
    """Refuse --onnx, before any work is done, where its packages lack.

    Raises:
        ConfigError: one is not installed.
    """
    lacking = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ConfigError(f"--onnx needs {' and '.join(lacking)}: pip install 'timm-autoslim[onnx]'.")


def write_onnx(exported: Path, images: Tensor, path: Path) -> None:
    """Write an exported network as an ONNX file of any batch size; it appears if ONNX Runtime computes the same.

    Args:
        exported: the folder.
        images: (N, C, H, W), two or more, on which both are compared.
        path: of the file.

    Raises:
        ArtifactError: torch cannot export it, or ONNX Runtime computes something else.
    """
    import onnxruntime

    model = timm.create_model(f"local-dir:{exported}", pretrained=True, exportable=True).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replace_file(path) as part:
        try:
            torch.onnx.export(
                model, (images,), str(part), dynamo=True, input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: "batch"},), external_data=False, verbose=False,
            )  # fmt: skip
            session = onnxruntime.InferenceSession(part.read_bytes(), providers=["CPUExecutionProvider"])
            logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        except Exception as error:  # the exporter and the runtime may raise anything
            raise ArtifactError(f"{exported} cannot be written as ONNX: {error}") from error
        with torch.no_grad():
            expected = model(images)
        if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-4):
            gap = (logits - expected).abs().max().item()
            raise ArtifactError(f"{exported}: ONNX Runtime computes logits that differ by up to {gap:.2g}.")
