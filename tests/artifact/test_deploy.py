"""An exported model goes wherever its base goes: torch.export, torch.compile, TorchScript, ONNX Runtime, int8."""

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torchvision.models import squeezenet1_1

from timm_autoslim import calibrate, convert, cost, export
from timm_autoslim.artifact.bases import create_base

# and the side of their images: residual, attention, inverted bottlenecks with squeeze-excitation, torchvision
MODELS = {"resnet10t": 64, "test_vit": 160, "test_efficientnet": 64, "torchvision/squeezenet1_1": 64}
pytestmark = pytest.mark.slow  # compilers and ONNX
# Another order of float32 sums, relative to the largest logit; 100 roundings of 2^-23 stay below it.
CLOSE = 1e-5


def close(got, want):
    return (torch.as_tensor(got) - want).abs().max() <= CLOSE * want.abs().max()


def to_onnx(model, images, file):
    torch.onnx.export(
        model, (images,), file, dynamo=True, input_names=["images"], output_names=["logits"],
        dynamic_shapes=({0: "batch"},), external_data=False, verbose=False,
    )  # fmt: skip


def run_onnx(file, images):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]


@pytest.fixture(scope="module", params=MODELS)
def deployed(request, tmp_path_factory):
    """The folder of a half-wide exported model, images, and the logits of the model before it was exported."""
    torch.manual_seed(0)
    side = MODELS[request.param]
    images = torch.randn(6, 3, side, side)
    supernet = convert(create_base(request.param, num_classes=7).eval(), images[:1], base=request.param,
                       base_args={"num_classes": 7})  # fmt: skip
    widths = supernet.space.uniform(0.5)
    assert cost(supernet, widths).params < 0.5 * cost(supernet).params
    extracted = supernet.extract(widths)
    calibrate(extracted, [images])
    extracted.eval()
    with torch.no_grad():
        logits = extracted(images)
    return export(extracted, tmp_path_factory.mktemp("deployed") / "slim"), images, logits


def load(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


@torch.no_grad()
def test_torch_export(deployed, tmp_path):
    folder, images, logits = deployed
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(load(folder), (images[:3],), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "slim.pt2")
    loaded = torch.export.load(tmp_path / "slim.pt2").module()
    assert close(loaded(images), logits)
    assert close(loaded(images[:2]), logits[:2])


@torch.no_grad()
def test_torch_compile_takes_it_whole(deployed):
    folder, images, logits = deployed
    torch.compiler.reset()
    compiled = torch.compile(load(folder), backend="aot_eager", fullgraph=True)  # what inductor does is torch's
    assert close(compiled(images), logits)
    assert close(compiled(images[:4]), logits[:4])


@torch.no_grad()
def test_torchscript(deployed, tmp_path):
    folder, images, logits = deployed
    torch.jit.script(load(folder, scriptable=True)).save(tmp_path / "slim.pt")
    assert torch.equal(torch.jit.load(tmp_path / "slim.pt")(images), logits)


def test_onnx_runtime_agrees(deployed, tmp_path):
    folder, images, logits = deployed
    to_onnx(load(folder, exportable=True), images[:2], tmp_path / "slim.onnx")
    assert close(run_onnx(tmp_path / "slim.onnx", images), logits)
    assert close(run_onnx(tmp_path / "slim.onnx", images[:1]), logits[:1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slim.onnx"]


class Reader(CalibrationDataReader):
    def __init__(self, images):
        self.images = iter(images.numpy())

    def get_next(self):
        image = next(self.images, None)
        return None if image is None else {"images": image[None]}


def test_files_are_really_smaller_in_float_and_in_int8(tmp_path):
    images = torch.randn(8, 3, 64, 64)
    base = squeezenet1_1(num_classes=7).eval()
    supernet = convert(base, images[:1], base="torchvision/squeezenet1_1", base_args={"num_classes": 7})
    widths = supernet.space.uniform(0.5)
    left = cost(supernet, widths).params / cost(supernet).params
    slim = supernet.extract(widths).eval()
    for name, model in (("base", base), ("slim", slim)):
        to_onnx(model, images[:2], tmp_path / f"{name}.onnx")
    quant_pre_process(str(tmp_path / "slim.onnx"), str(tmp_path / "extracted.onnx"), skip_symbolic_shape=True)
    quantize_static(str(tmp_path / "extracted.onnx"), str(tmp_path / "int8.onnx"), Reader(images), per_channel=True)
    base_bytes, slim_bytes, int8_bytes = ((tmp_path / f"{n}.onnx").stat().st_size for n in ("base", "slim", "int8"))
    assert slim_bytes / base_bytes == pytest.approx(left, abs=0.05)  # the graph itself takes the same room in both
    assert int8_bytes < 0.45 * slim_bytes
    with torch.no_grad():
        want = slim(images).numpy()
    assert np.abs(run_onnx(tmp_path / "int8.onnx", images) - want).max() < 0.1 * np.abs(want).max()
