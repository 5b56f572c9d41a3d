"""Thousands of mutated folders: each loads as a smaller model, or is refused with one kind of error.

CI draws a few of them; AUTOSLIM_FUZZ=1000 draws so many of each kind, and prints what the dearest of them took.
"""

import json
import os
import pickle
import shutil
import struct
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import timm
import torch
from helpers.marks import slow_but
from helpers.specs import make_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import timm_autoslim
from timm_autoslim import check_folder
from timm_autoslim.artifact import limits
from timm_autoslim.artifact.bases import create_base
from timm_autoslim.artifact.build import build_slim
from timm_autoslim.artifact.export import export
from timm_autoslim.errors import ArtifactError

EXAMPLES = int(os.environ.get("AUTOSLIM_FUZZ", "60"))
SECONDS = 10
# What no folder of these small models may take, in bytes: the floor of what a base may create, twice.
MEMORY = 4 * 2 * limits.MIN_ELEMENTS
worst = {"memory": 0, "seconds": 0.0}
pytestmark = pytest.mark.xdist_group("fuzz")  # one process, for the last test tells what all of them took
PACKAGE = str(Path(timm_autoslim.__file__).parent)
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

VIT = {"blocks.0.mlp.fc1": (100, None), "blocks.0.mlp.fc2": (None, 100)}
SQUEEZENET = {"features.3.squeeze": (9, None), "features.3.expand1x1": (None, 9), "features.3.expand3x3": (None, 9)}
BASES = {"test_vit": (VIT, {"img_size": 32}), "torchvision/squeezenet1_1": (SQUEEZENET, {"num_classes": 4})}


@pytest.fixture(scope="module", params=slow_but(["test_vit"], BASES))
def exported(request, tmp_path_factory):
    """A sound folder: its config.json, its tensors, and the shapes of the base."""
    narrow, args = BASES[request.param]
    folder = export(build_slim(make_spec(request.param, narrow, **args)), tmp_path_factory.mktemp("fuzz") / "out")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shapes = {name: tuple(t.shape) for name, t in create_base(request.param, **args).state_dict().items()}
    return folder, config, shapes


def memory(reset=False):
    """The most memory that this process had since the last reset, in bytes; 0 where Linux does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def judge(folder, full):
    """Load a folder: it is a smaller model, or an `ArtifactError`; what timm itself cannot read builds nothing."""
    start, before = time.monotonic(), memory(reset=True)
    sound, refusal, model = True, "", None
    try:
        check_folder(folder)
    except ArtifactError as error:
        sound, refusal = False, str(error)
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except ArtifactError as error:
        refusal = str(error)
    except Exception as error:
        frames = [f.filename for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(PACKAGE)]
        if sound or frames:
            raise
    assert len(refusal) < 5000
    if model is not None:
        assert sound
        state = model.state_dict()
        heads = (model.pretrained_cfg.get("classifier"), "head")
        for name, tensor in state.items():
            if not name.startswith(tuple(filter(lambda h: isinstance(h, str), heads))) and name in full:
                sizes = zip(tensor.shape, full[name], strict=True)
                # in_chans and img_size are the only ways to grow, as on the base
                assert all(new <= max(old, 1024) for new, old in sizes), name
    seconds, taken = time.monotonic() - start, memory() - before
    worst.update(memory=max(worst["memory"], taken), seconds=max(worst["seconds"], seconds))
    assert seconds < SECONDS
    assert taken < MEMORY


# ---- config.json


HUGE = st.sampled_from([0, -1, 1, 2, 7, 2**31, 2**63, 10**9, 10**18, 10**30, 65_536, 999_999, 1e308, -1e308, 0.5])
NUMBERS = HUGE | st.integers() | st.floats() | st.booleans()
TEXTS = st.text(max_size=12) | st.sampled_from(
    ["../../etc/passwd", "/dev/zero", "__class__", "autoslim", "local-dir:.", "hf-hub:a/b", "http://localhost:1/x",
     "resnet50", "torchvision/alexnet", "torchvision/vit_h_14", "avg", "max", "catavgmax", "\x00", "\ud800", "é" * 5000]
)  # fmt: skip
NAMES = st.sampled_from(
    ["pretrained", "pretrained_cfg", "checkpoint_path", "weights", "url", "file", "source", "hf_hub_id", "state_dict",
     "custom_load", "embed_dim", "depth", "num_heads", "mlp_ratio", "img_size", "in_chans", "num_classes", "width_mult",
     "global_pool", "drop_rate", "drop_path_rate", "features_only", "out_indices", "device", "dtype", "pruned", "taps",
     "norm_layer", "act_layer", "patch_size", "class_token", "version", "dropout", "spec", "model_cfg", "scriptable",
     "strict_img_size", "dynamic_img_size", "block_fn", "weight_init", "architecture", "exportable", "model_name"]
) | TEXTS  # fmt: skip
JUNK = st.recursive(
    st.none() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


def places(value, path=()):
    """Every path into nested data."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def nested(depth):
    value = 1
    for i in range(depth):
        value = [value] if i % 2 else {"x": value}
    return value


@st.composite
def configs(draw, config):
    """A config.json that was changed in one to three places, as bytes."""
    config = json.loads(json.dumps(config))
    for _ in range(draw(st.integers(1, 3))):
        top = draw(st.sampled_from([(), ("model_args",), ("model_args", "spec"), ("pretrained_cfg",)]))
        target = config
        for part in top:
            target = target.get(part) if isinstance(target, dict) else None
        paths = list(places(target))
        path = draw(st.sampled_from(paths))
        for part in path[:-1]:
            target = target[part]
        kind = draw(st.sampled_from(["replace", "replace", "delete", "insert", "deep", "scale", "many"]))
        if kind == "insert" and isinstance(target, dict):
            target[draw(NAMES)] = draw(JUNK)
            continue
        if not path:
            continue
        if kind == "delete" and not isinstance(target, list):
            del target[path[-1]]
        elif kind == "deep":
            target[path[-1]] = nested(draw(st.sampled_from([9, 100, 400])))
        elif kind == "many":
            target[path[-1]] = [draw(st.none() | NUMBERS)] * draw(st.sampled_from([1001, 20_000]))
        elif kind == "scale" and isinstance(target[path[-1]], int | float):
            target[path[-1]] = target[path[-1]] * draw(st.sampled_from([2, 10, 1000, -1, 0.5]))
        else:
            target[path[-1]] = draw(JUNK)
    if isinstance(config, dict) and timm.is_model(str(config.get("architecture"))):
        config["architecture"] = "autoslim"  # any other model is timm's own affair
    return json.dumps(config).encode("utf-8", "surrogatepass")


@st.composite
def scrambled(draw, raw):
    """The bytes of a file, damaged."""
    at = draw(st.integers(0, len(raw)))
    kind = draw(st.sampled_from(["cut", "insert", "flip", "swap", "double", "nothing"]))
    if kind == "cut":
        return raw[:at]
    if kind == "insert":
        junk = st.binary(max_size=8) | st.sampled_from(
            [
                b"[" * 100_000,
                b'{"a":' * 50_000,
                b"NaN",
                b"-Infinity",
                b"1" * 5000,
                b"\xef\xbb\xbf",
                b'"architecture": 1,',
            ]
        )
        return raw[:at] + draw(junk) + raw[at:]
    if kind == "flip":
        return raw[:at] + bytes([draw(st.integers(0, 255))]) + raw[at + 1 :]
    if kind == "swap":
        other = draw(st.integers(0, len(raw)))
        return raw[: min(at, other)] + raw[max(at, other) :]
    return raw * 2 if kind == "double" else b""


def place(exported, config=None, weights=None):
    """A copy of the folder with other files, in a place that is removed again."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    for name, content in (("config.json", config), ("model.safetensors", weights)):
        if content is None:
            shutil.copy(exported / name, folder / name)
        else:
            (folder / name).write_bytes(content)
    return folder


def judged(exported, full, **files):
    folder = place(exported, **files)
    try:
        judge(folder, full)
    finally:
        shutil.rmtree(folder)


@fuzz
@given(st.data())
def test_changed_configs(exported, data):
    folder, config, full = exported
    judged(folder, full, config=data.draw(configs(config)))


@fuzz
@given(st.data())
def test_damaged_configs(exported, data):
    folder, _, full = exported
    judged(folder, full, config=data.draw(scrambled((folder / "config.json").read_bytes())))


# ---- weights


@st.composite
def files_of_weights(draw, folder):
    """A file of weights whose head was changed, whose tensors were, or that is none at all."""
    raw = (folder / "model.safetensors").read_bytes()
    kind = draw(st.sampled_from(["head", "length", "tensors", "bytes", "pickle"]))
    length = struct.unpack("<Q", raw[:8])[0]
    if kind == "bytes":
        at = draw(st.integers(0, length + 64))
        return draw(
            st.sampled_from([raw[:at], raw[:at] + draw(st.binary(max_size=8)) + raw[at:], raw + b"x", raw[at:]])
        )
    if kind == "length":
        claimed = draw(st.integers(0, 2**64 - 1) | st.integers(0, 2 * length))
        return struct.pack("<Q", claimed) + raw[8:]
    if kind == "pickle":
        return pickle.dumps({"head.weight": [1.0]}) if draw(st.booleans()) else b"PK\x03\x04" + raw
    if kind == "head":
        head = json.loads(raw[8 : 8 + length])
        names = [name for name in head if name != "__metadata__"]
        for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
            key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "gone", "junk"]))
            if name not in head:
                continue
            if key == "name":
                head[draw(TEXTS | st.sampled_from(["state_dict", "model", "module." + name]))] = head.pop(name)
            elif key == "gone":
                del head[name]
            elif key == "junk":
                head[name] = draw(JUNK)
            elif isinstance(head[name], dict):
                sizes = st.lists(HUGE | st.integers(0, 2**64), max_size=5)
                kinds = st.sampled_from(["F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "X", ""])
                head[name][key] = draw(kinds if key == "dtype" else sizes | JUNK)
        text = json.dumps(head).encode("utf-8", "surrogatepass")
        if draw(st.booleans()):
            text = text[:-1] + b"," + text[1:] if draw(st.booleans()) else b"[" * 100_000 + text  # twice every name
        return struct.pack("<Q", len(text)) + text + raw[8 + length :]
    tensors = load_file(folder / "model.safetensors")
    name = draw(st.sampled_from(sorted(tensors)))
    other = draw(
        st.sampled_from(
            [
                tensors[name].double(),
                tensors[name].half(),
                tensors[name].to(torch.int64),
                tensors[name].bool(),
                tensors[name].to(torch.float8_e4m3fn),
                tensors[name][None],
                tensors[name][:0],
                torch.cat([tensors[name]] * 2),
                torch.full_like(tensors[name], float("nan")),
                torch.zeros(2**20),
                torch.zeros(()),
            ]
        )
    )
    tensors[draw(st.just(name) | TEXTS.filter(lambda t: t.isprintable()))] = other
    path = Path(tempfile.mkdtemp(prefix="fuzz"), "weights")
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)
    content = path.read_bytes()
    shutil.rmtree(path.parent)
    return content


@pytest.mark.slow
@fuzz
@given(st.data())
def test_changed_weights(exported, data):
    folder, _, full = exported
    judged(folder, full, weights=data.draw(files_of_weights(folder)))


@pytest.mark.slow
def test_what_the_run_took(capsys):
    if EXAMPLES > 60:
        with capsys.disabled():
            print(f"\n{EXAMPLES} of each kind: {worst['memory'] / 2**20:.0f} MiB and {worst['seconds']:.1f} s at most")
    assert worst["seconds"] > 0, "run with the other tests of this file"
