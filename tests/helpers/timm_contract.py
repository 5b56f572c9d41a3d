"""What timm promises of its models, as facts that a slim model must share with its base.

The assertions are those of tests/test_models.py in timm's repository. A fact is true, false, or the name of what was
raised: where a base breaks a promise itself (some do), its slim model may break the same one, and no other.
"""

import copy
import fnmatch

import timm
import torch
from timm.layers import get_channel_dim
from timm.models import group_parameters
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from timm_autoslim.artifact.bases import create_base
from timm_autoslim.artifact.build import find_pool_type


def channels(out, fmt):
    """The number of channels of a feature map."""
    return out.shape[1] if fmt == "NCHW" and out.ndim == 4 else out.shape[-1]


def facts(make, pixels, chans=3):
    """Ask a model everything.

    Args:
        make: returns the model, with any arguments of `timm.create_model`.
        pixels: the side of its images.
        chans: their channels.
    """
    torch.manual_seed(0)
    images = torch.randn(2, chans, pixels, pixels)
    answers = {}
    for part in (_forward, _heads, _features, _training, _settings, _kinds, _derived):
        for name, fact in part(make, images):
            try:
                answers[name] = fact()
            except Exception as error:
                answers[name] = type(error).__name__
    return answers


@torch.no_grad()
def _forward(make, images):
    model = make().eval()
    classes, cfg = model.num_classes, model.pretrained_cfg
    names = set(model.state_dict())

    def listed(key):
        names = cfg[key]
        return (names,) if isinstance(names, str) else names

    yield "forward", lambda: model(images).shape == (2, classes) and bool(model(images).isfinite().all())
    yield "one image", lambda: model(images[:1]).shape == (1, classes)
    yield "default_cfg", lambda: model.default_cfg is model.pretrained_cfg
    yield "classifier", lambda: all(f"{name}.weight" in names for name in listed("classifier"))
    yield "first_conv", lambda: all(f"{name}.weight" in names for name in listed("first_conv"))
    yield "get_classifier", lambda: model.get_classifier() is model.get_submodule(listed("classifier")[0])
    yield "classifier fits", lambda: model.get_submodule(listed("classifier")[0]).weight.shape[0] == classes


def _heads(make, images):
    fmt = getattr(make(), "output_fmt", "NCHW")

    def fresh(*args):
        model = make().eval()
        if args:
            model.reset_classifier(*args)
        return model

    def run(*args):
        with torch.no_grad():
            return fresh(*args)(images)

    def features_are(model):
        with torch.no_grad():
            return channels(model.forward_features(images), fmt) == model.num_features

    def pre_logits(model):
        with torch.no_grad():
            out = model.forward_head(model.forward_features(images), pre_logits=True)
        return out.shape == (2, model.head_hidden_size)

    hidden, width = fresh().head_hidden_size, fresh().num_features
    yield "forward_features", lambda: features_are(fresh())
    yield "pre_logits", lambda: pre_logits(fresh())
    yield "pre_logits without a head", lambda: pre_logits(fresh(0))
    yield "reset_classifier(7)", lambda: run(7).shape == (2, 7) and fresh(7).num_classes == 7
    yield "reset_classifier(0)", lambda: run(0).shape == (2, hidden)
    yield "reset_classifier(0) again", lambda: fresh(0).num_classes == 0 and features_are(fresh(0))
    yield "reset_classifier(0, '')", lambda: (run(0, "").ndim, channels(run(0, ""), fmt) == width)
    yield "reset_classifier(3, 'avg')", lambda: run(3, "avg").shape == (2, 3)
    yield "head is gone", lambda: not set(fresh().state_dict()) <= set(fresh(0).state_dict())

    def created(**args):
        with torch.no_grad():
            return make(**args).eval()(images)

    yield "num_classes=0", lambda: created(num_classes=0).shape == (2, hidden)
    yield "num_classes=7", lambda: created(num_classes=7).shape == (2, 7)
    yield (
        "num_classes=0, global_pool=''",
        lambda: (
            channels(created(num_classes=0, global_pool=""), fmt) == width,
            created(num_classes=0, global_pool="").ndim,
        ),
    )
    yield "global_pool='max'", lambda: created(global_pool="max").shape[0] == 2


@torch.no_grad()
def _features(make, images):
    base = make().eval()
    fmt = getattr(base, "output_fmt", "NCHW")
    side = images.shape[-1]

    def extracted(**args):
        net = make(features_only=True, **args).eval()
        outs = net(images)
        info = net.feature_info
        kind = getattr(net, "output_fmt", None)
        kind = str(getattr(kind, "value", kind or "NCHW"))
        wide = [channels(out, kind) for out in outs] == info.channels() == [d["num_chs"] for d in info.get_dicts()]
        steps = [out.shape[2] if kind == "NCHW" else out.shape[1] for out in outs]
        near = all(abs(step - side / by) <= 1 for step, by in zip(steps, info.reduction(), strict=True))
        return wide, near, len(outs), [name in dict(base.named_modules()) for name in info.module_name()]

    yield "features_only", lambda: extracted()
    yield "out_indices", lambda: extracted(out_indices=(1,))
    yield "out_indices from the end", lambda: extracted(out_indices=(-1,))
    yield "feature_info", lambda: [sorted(info) for info in getattr(base.feature_info, "info", base.feature_info)]

    def tapped():
        net = make(features_only=True).eval()
        net.load_state_dict(base.state_dict(), strict=False)  # some bases draw their weights in another order then
        taps = base.forward_intermediates(images, indices=list(net.feature_info.out_indices), intermediates_only=True)

        def alike(out, tap):  # in either order of the axes, as shapes do not always tell them apart
            orders = (out, out.permute(0, 3, 1, 2)) if out.ndim == 4 else (out,)
            return any(o.shape == tap.shape and torch.allclose(o, tap, rtol=1e-4, atol=1e-5) for o in orders)

        return [alike(out, tap) for out, tap in zip(net(images), taps, strict=True)]

    def intermediates():
        last, maps = base.forward_intermediates(images)
        wide = [m.shape[1] for m in maps] == [info["num_chs"] for info in base.feature_info]
        return torch.equal(last, base.forward_features(images)), wide, len(maps), {m.ndim for m in maps}

    def pruned():
        cut = copy.deepcopy(base)
        indices = cut.prune_intermediate_layers(1, prune_head=True)
        some = cut.forward_intermediates(images, indices=indices, intermediates_only=True)
        return all(map(torch.equal, some, base.forward_intermediates(images, indices=indices, intermediates_only=True)))

    yield "features are intermediates", tapped
    yield "forward_intermediates", intermediates
    yield "prune_intermediate_layers", pruned
    yield "output_fmt", lambda: fmt


def _training(make, images):
    def gradients():
        torch.manual_seed(0)
        model = make().train()
        out = model(images)
        (out if isinstance(out, torch.Tensor) else out[0]).mean().backward()
        return sorted(name for name, p in model.named_parameters() if p.grad is None)

    def checkpointed():
        torch.manual_seed(0)
        model = make().eval()
        expected = model(images)
        model.set_grad_checkpointing(True)
        return torch.equal(model.train(False)(images), expected)

    yield "backward", gradients
    yield "grad checkpointing", checkpointed
    yield "layer decay", lambda: [len(g["params"]) for g in param_groups_layer_decay(make(), layer_decay=0.75)]
    yield "group_matcher", lambda: len(group_parameters(make(), make().group_matcher(coarse=True)))
    yield "no_weight_decay", lambda: sorted(make().no_weight_decay())


def _settings(make, images):
    def out(**args):
        torch.manual_seed(0)
        with torch.no_grad():
            return make(**args).eval()

    yield "drop_rate", lambda: out(drop_rate=0.3)(images).shape[0]
    yield (
        "drop_path_rate",
        lambda: sorted({type(m).__name__ for m in out(drop_path_rate=0.2).modules() if getattr(m, "drop_prob", 0)}),
    )
    yield "in_chans", lambda: out(in_chans=1)(images[:, :1]).shape[0]
    yield "exportable", lambda: torch.equal(out(exportable=True)(images), out()(images))
    yield "state", lambda: len(out().state_dict())
    yield "modules", lambda: [type(m).__name__ for m in out().modules()]


def _kinds(make, images):
    """What timm's tests ask of arguments, devices, types of numbers and frozen parameters."""

    def refuses():
        try:
            make(not_a_model_arg=1)
        except TypeError:
            return True
        return False

    def half():
        model = make().eval()
        with torch.no_grad():
            model(images)
            return model.to(torch.bfloat16)(images.bfloat16()).dtype == torch.bfloat16

    def created():
        model = make(device="cpu", dtype=torch.float64)
        return {(t.device.type, t.dtype) for t in model.state_dict().values() if t.is_floating_point()}

    def renewed():
        model = make().to(device="meta", dtype=torch.float64)
        model.reset_classifier(0)
        model.reset_classifier(2)
        heads = model.get_classifier()
        heads = heads if isinstance(heads, tuple | list) else (heads,)
        kinds = {(p.device.type, p.dtype) for head in heads for p in head.parameters()}
        return kinds == {("meta", torch.float64)} and all(m.training for m in model.modules())

    def frozen():
        model = make().requires_grad_(False)
        model.reset_classifier(0)
        return not any(p.requires_grad for p in model.parameters())

    def pooled():
        model = make(global_pool="max").eval()
        before = find_pool_type(model)
        model.reset_classifier(5)
        return before == find_pool_type(model)

    def undecayed():
        model = make()
        names = [name for name, _ in model.named_parameters()]
        return sorted(p for p in model.no_weight_decay() if not fnmatch.filter(names, p))

    def sized():
        model = make().eval()
        with torch.no_grad():
            out = model(images)
        out = torch.cat(out) if isinstance(out, tuple) else out
        if model.num_classes:
            return out.shape[-1] == model.num_classes
        axis = getattr(model, "feature_dim", None)
        axis = get_channel_dim(getattr(model, "output_fmt", "NCHW")) if axis is None else axis
        return out.shape[axis] == (getattr(model, "out_features", None) or model.num_features)

    def measured():
        model = make().eval()
        config = model.default_cfg
        with torch.no_grad():
            out = model.forward_features(torch.zeros(1, *config["input_size"]))
        last = str(getattr(getattr(model, "output_fmt", "NCHW"), "value", "NCHW")) == "NHWC"
        return tuple(out.shape[1:3] if last else out.shape[2:]) == tuple(config["pool_size"])

    yield "width of the output", sized
    yield "unknown arguments", refuses
    yield "in_chans and input_size", lambda: make().in_chans == make().default_cfg["input_size"][0]
    yield "pool_size", measured
    yield "bfloat16 after a forward", half
    yield "device= and dtype=", created
    yield "reset_classifier keeps device, type and mode", renewed
    yield "reset_classifier keeps what is frozen", frozen
    yield "reset_classifier keeps the pooling", pooled
    yield "no_weight_decay matches", undecayed


def _derived(make, images):
    """What timm makes of a model: graphs, backbones that are trained, larger images, networks cut at each feature."""
    side = images.shape[-1]

    def traced():
        torch.manual_seed(0)
        model = make().eval()
        settings = {
            "leaf_modules": get_notrace_modules(),
            "autowrap_functions": get_notrace_functions(),
            "param_shapes_constant": True,
        }
        last = get_graph_node_names(model, tracer_kwargs=settings)[1][-1]
        graph = create_feature_extractor(model, return_nodes=[last], tracer_kwargs=settings, suppress_diff_warning=True)
        out = graph.train()(images)[last]
        (out if isinstance(out, torch.Tensor) else out[0]).mean().backward()
        unused = sorted(name for name, p in graph.named_parameters() if p.grad is None)
        with torch.no_grad():
            model, graph = model.eval(), graph.eval()
            return torch.allclose(graph(images)[last], model(images), rtol=1e-4, atol=1e-5), unused

    def by_graph():
        net = make(features_only=True, feature_cfg={"feature_cls": "fx"}).eval()
        with torch.no_grad():
            return len(net(images)), all(out.isfinite().all() for out in net(images))

    def trained(checkpointed):
        torch.manual_seed(0)
        net = make(features_only=True).train()
        for module in net.modules():  # computing a part again would move these statistics twice
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        net.set_grad_checkpointing(checkpointed)
        torch.manual_seed(1)
        sum(out.pow(2).mean() for out in net(images)).backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    def same_gradients():
        pairs = list(zip(trained(True), trained(False), strict=True))
        return all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in pairs)

    def dilated(stride):
        make(output_stride=stride)  # some bases take it with features alone, by a class of their own
        net = make(features_only=True, output_stride=stride).eval()
        with torch.no_grad():
            sizes = [tuple(out.shape[-2:]) for out in net(images)]
        by = net.feature_info.reduction()
        return max(by) == stride, [s == (side // r, side // r) for s, r in zip(sizes, by, strict=True)]

    def enlarged():
        model = make().eval().requires_grad_(False)
        model.set_input_size(img_size=(2 * side, 2 * side))
        larger = torch.randn(1, images.shape[1], 2 * side, 2 * side)
        with torch.no_grad():
            return model(larger).shape == (1, model.num_classes) and not any(
                p.requires_grad for p in model.parameters()
            )

    def cut():
        model, equal = make().eval(), []
        with torch.no_grad():
            expected, maps = model(images), model.forward_intermediates(images, intermediates_only=True)
            uncut = copy.deepcopy(model)
            uncut.prune_intermediate_layers([len(maps) - 1], prune_head=False)
            equal.append(torch.allclose(uncut(images), expected, rtol=1e-4, atol=1e-5))
            for index, tap in enumerate(maps):
                short = copy.deepcopy(model)
                indices = short.prune_intermediate_layers([index], prune_norm=True)
                (last,) = short.forward_intermediates(images, indices=indices, intermediates_only=True)
                equal.append(torch.allclose(last, tap, rtol=1e-4, atol=1e-5))
                equal.append(sum(p.numel() for p in short.parameters()) < sum(p.numel() for p in model.parameters()))
        return equal

    yield "a graph of torch.fx", traced
    yield "features by torch.fx", by_graph
    yield "features, checkpointed", same_gradients
    yield "output_stride=8", lambda: dilated(8)
    yield "output_stride=16", lambda: dilated(16)
    yield "set_input_size", enlarged
    yield "cut at each feature", cut


def scripted(make, pixels):
    """Whether TorchScript takes the model and gives what it gives."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, pixels, pixels)
    try:
        model = make(scriptable=True).eval()
        with torch.no_grad():
            return torch.allclose(torch.jit.script(model)(images), model(images), rtol=1e-4, atol=1e-5)
    except Exception as error:
        return type(error).__name__


def maker(name, **settings):
    """Make a model by timm's function or, of torchvision, by ours, with the same weights every time."""

    def make(**args):
        torch.manual_seed(1)
        args = {**settings, **args}
        if name.startswith("torchvision/"):
            for ours in ("exportable", "scriptable"):
                args.pop(ours, None)
            return create_base(name, **args)
        return timm.create_model(name, **args)

    return make


def calibrated(model):
    """Mark the BatchNorm statistics as those of this width."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(1)
    return model
