"""What tests compare: outputs of any form, and a model before and after."""

import torch


def outputs(out):
    """Return the tensors of a model's output: one, or those of a tuple, list or dict; None stands for no output."""
    if isinstance(out, torch.Tensor):
        return [out]
    parts = out.values() if isinstance(out, dict) else out
    return [tensor for part in parts if part is not None for tensor in outputs(part)]


def equal(a, b):
    """Whether two outputs are the same, bit for bit."""
    pairs = list(zip(outputs(a), outputs(b), strict=True))
    assert pairs
    return all(torch.equal(x, y) for x, y in pairs)


def error(a, b):
    """Return the largest difference of two outputs, relative to the first."""
    pairs = zip(outputs(a), outputs(b), strict=True)
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in pairs)


def check_fused(model, images, bound):
    """Fused attention scales by the head_dim that it meets, the other path by a stored scale: they must agree."""
    fused = model(images)
    for module in model.modules():
        if "fused_attn" in vars(module):
            module.fused_attn = False
    assert error(fused, model(images)) <= bound


def state(model):
    """Return a copy of the state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    """Whether two state dicts hold the same tensors by the same names."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def snapshot(model):
    """Return all that a conversion could change in a model: tensors, and by module its flag, attributes and hooks."""
    values = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    rest = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks"):
                rest[path, name] = list(value)
            elif name in ("_parameters", "_buffers", "_modules"):
                rest[path, name] = {leaf: id(child) for leaf, child in value.items()}
            elif type(value) in (tuple, list):
                rest[path, name] = [(type(v), v) for v in value]
            else:
                rest[path, name] = (type(value), value)
    return values, rest


def assert_same(before, after):
    """Compare two snapshots of one model."""
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys()
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name
