"""One call from a trained model to a slim one: order, search, extract, reconstruct. Nothing is trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from timm_autoslim.costs.conditions import Conditions
from timm_autoslim.costs.cost import count_cost
from timm_autoslim.errors import BudgetError, ConfigError, DataError, EvaluationError
from timm_autoslim.slimming.budgets import Budget
from timm_autoslim.slimming.goals import parse_budgets
from timm_autoslim.slimming.held_out import HeldOut
from timm_autoslim.slimming.luck import describe_luck
from timm_autoslim.slimming.scoring import Scorer
from timm_autoslim.slimming.search import search
from timm_autoslim.slimming.stages import Stage, plan_stages
from timm_autoslim.supernet.convert import check_rules, convert_by, order_supernet
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.training.calibration import lacks_variance
from timm_autoslim.training.outputs import compare_logits
from timm_autoslim.training.reconstruction import reconstruct
from timm_autoslim.utils.arguments import check_callable, check_flag, check_module
from timm_autoslim.utils.bars import show_bar
from timm_autoslim.utils.batches import check_inputs, join_singles, make_input_error
from timm_autoslim.utils.copying import copy_deeply
from timm_autoslim.utils.meta import count_images, run_model
from timm_autoslim.utils.processors import describe_slow_type, find_layout, set_layout
from timm_autoslim.utils.tensors import collect_tensors

M = TypeVar("M", bound=nn.Module)
Pair = tuple[Any, Any]  # inputs and targets; None stands for targets that nobody reads
Loss = Callable[[Any, Any], Tensor]


def slim(
    model: M,
    budget: str | float | Mapping[str, Any] | Budget,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    order: str | None = "reconstruction",
    maximize: bool = False,
    conditions: Conditions | None = None,
    progress: bool = True,
    seed: int = 0,
    **rules: Any,
) -> M:
    """Return a slim copy of a trained model, within a budget. Nothing is trained, and the model is not changed.

    The channels are sorted by importance, the widths are searched on the model itself, the network is extracted, and
    its layers get the weights that reproduce what the model computes (`convert`, `search`, `extract` and
    `reconstruct`). A budget below half of what the model costs is met in stages that halve it at most: the next search
    looks at a network that was reconstructed, and so can still be judged (not with `min=` and `choices=`, which count
    from the model's own widths). Fine-tune it afterwards, if there is time; `python -m timm_autoslim slim` does all of
    that.

    Args:
        model: a trained model.
        budget: a share of the MACs ("50%"), their number ("300M", 3e8), one or several limits
            ("macs=50%", "macs<=300M and latency_ms<=4"), {metric: amount} of one metric, or a `Budget`.
        batches: inputs (N, C, H, W) on the model's device, not augmented, or pairs of them and targets. They order the
            channels, rank the subnets and reconstruct the layers. 500 to 5,000 images are good, in 8 batches or more,
            each of which has images of most classes, as a shuffled loader gives them.
            Several inputs are a dict by name or, in a pair, a tuple: `((image, mask), targets)`. A batch of one image
            is joined to its neighbour where a BatchNorm needs two.
        loss: called with the model's outputs and the targets of a pair; returns a scalar, lower is better. None ranks
            subnets by the distance of their logits (N, classes) or (N, classes, H, W) to the model's
            (`HeldOut.by_outputs`), and reads no targets. On the models that were measured it found networks as good
            as the loss on labels did (docs/benchmarks.md).
        maximize: whether higher is better in what `loss` returns, such as an accuracy.
        order: a criterion of `CRITERIA`; None leaves the channels in their order. "taylor" needs a loss.
        conditions: what `peak_bytes` and `latency_ms` are counted for.
        progress: whether to show progress bars.
        seed: of the search.
        **rules: further arguments of `convert`, such as `freeze=`, `min=`, `divisor=` and `base_args=`. With
            `divisor=` or `choices=` all widths are of the search space.

    Returns:
        An ordinary model of the class of `model`, in evaluation mode; `export` writes it to a folder.

    Raises:
        BudgetError: the budget is malformed, out of reach, not below the original, or several budgets.
        DataError: there are no batches, they are no pairs though there is a loss, the model does not take their inputs,
            or there is one image in all and a BatchNorm needs two.
        EvaluationError: the loss raises, or returns more than one number; or it is far worse for the model than for
            its narrowest subnet, so that `maximize` must be the wrong way.
        TypeError: a rule that `convert` does not have.
        ConfigError: there is no loss, and the model returns no logits of two classes or more, the targets are no
            classes, or `maximize` or `order="taylor"` is given; or as `convert`, `search` and `reconstruct` do.
        NothingToSlimError, TraceError, WidthError: as `convert`, `search` and `reconstruct` do.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("resnet10t", num_classes=10, channels=[8, 8, 16, 16], stem_width=8)
        >>> images = [torch.randn(20, 3, 32, 32) for _ in range(2)]
        >>> smaller = slim(model, "50%", images, progress=False)
        >>> type(smaller) is type(model)
        True
    """
    check_module("model", model)
    _check_loss(loss, maximize, order)
    check_flag("progress", progress)
    settings = ("order", "maximize", "conditions", "progress", "seed")
    check_rules("slim", rules, settings, left_out=("example_input", "order", "batches", "distributed"))
    pairs = _check_pairs(model, batches, labelled=loss is not None)
    smaller: nn.Module = copy_deeply(model).eval()  # whose gradients are ours, and whose modes
    layout = find_layout(smaller)
    if all(parameter.device.type == "cpu" for parameter in smaller.parameters()):  # where it is faster
        set_layout(smaller, torch.channels_last)
    _try_first(smaller, pairs[0], loss)
    supernet = convert_by(smaller, pairs[0][0], **rules)  # budgets are checked before the channels are ordered
    stages = _plan(supernet, budget, conditions, from_widest=bool({"min", "choices"} & rules.keys()))
    if supernet.takes_any_batch_size:
        pairs = list(join_singles(pairs, lambda pair: lacks_variance(smaller, pair[0])))
    inputs = [batch for batch, _ in pairs]
    if luck := describe_luck(sum(map(count_images, inputs)), len(supernet.space)):
        warnings.warn(luck, stacklevel=2)
    if slow := describe_slow_type(smaller):
        warnings.warn(slow, stacklevel=2)
    held_out = _make_held_out(smaller, pairs, loss)
    Scorer(supernet.eval(), held_out, maximize=maximize).check_direction(trained=True)
    for stage in show_bar(stages, desc="stages", shown=progress and len(stages) > 1):
        if stage is not stages[0]:
            supernet = convert_by(smaller, inputs[0], **rules)
        if order is not None:
            supernet = _order(supernet, order, pairs, loss)
        supernet.eval()
        result = search(
            supernet, [stage.budget], held_out, maximize=maximize, conditions=conditions, seed=seed,
            refine="choices" if {"divisor", "choices"} & rules.keys() else "units", progress=progress,
        )  # fmt: skip
        smaller = _extract(supernet, result.networks[0].widths, pairs, progress)
        rules = {name: rule for name, rule in rules.items() if name not in ("base", "base_args")}  # it knows its base
    set_layout(smaller, layout)
    return smaller  # type: ignore[return-value]


def _plan(supernet: Supernet, budget: Any, conditions: Conditions | None, *, from_widest: bool) -> list[Stage]:
    """Return the searches that lead to the budget, each of which starts from the network before.

    Raises:
        BudgetError: the budget is malformed, out of reach, or several budgets.
    """
    amounts = {"macs": budget} if isinstance(budget, int | float) and not isinstance(budget, bool) else budget
    budgets = parse_budgets(supernet, amounts, conditions=conditions)
    if len(budgets) != 1:
        remedy = "call slim for each"
        if len({metric for one in budgets for metric in one.metrics}) > 1:
            both = " and ".join(dict.fromkeys(one.text for one in budgets))
            remedy = f'for one network within all of them give "{both}"; else {remedy}'
        raise BudgetError.at("budget", got=f"{len(budgets)} budgets", needed="one", remedy=remedy)
    widest = count_cost(supernet, supernet.space.max(), budgets[0].metrics, conditions)
    return plan_stages(budgets, widest, from_widest=from_widest)


def _make_held_out(model: nn.Module, pairs: Sequence[Pair], loss: Loss | None) -> HeldOut:
    """Return what scores subnets: the loss, or else their distance to the model."""
    if loss is None:
        return HeldOut.by_outputs(model, [inputs for inputs, _ in pairs])
    return HeldOut(pairs, lambda subnet, pair: float(loss(run_model(subnet, pair[0]), pair[1])))


def _extract(supernet: Supernet, widths: Any, pairs: Sequence[Pair], progress: bool) -> nn.Module:
    """Extract a subnet and reconstruct its layers."""
    smaller = supernet.extract(widths).eval()
    reconstruct(smaller, supernet, (inputs for inputs, _ in pairs), progress=progress)
    return smaller


def _check_loss(loss: Loss | None, maximize: bool, order: str | None) -> None:
    """Refuse what is no loss, and what needs one where there is none.

    Raises:
        ConfigError: `maximize` or `order` need a loss.
        DataError: it is none.
    """
    if loss is not None:
        check_callable("loss", loss, DataError, "a callable loss(outputs, targets) that returns a scalar, or None")
    elif maximize or order == "taylor":
        got = "none, with " + ("maximize=True" if maximize else 'order="taylor"')
        needed = "a callable loss(outputs, targets) that returns a scalar"
        raise ConfigError.at("loss", got=got, needed=needed, remedy="give one, or leave out the other argument")


def _try_first(model: nn.Module, pair: Pair, loss: Loss | None) -> None:
    """Run the model and the loss once, on the first batch.

    Raises:
        ConfigError: there is no loss, and the model returns no logits, or the targets are no classes.
        DataError: the model does not take the images.
        EvaluationError: the loss raises, or returns more than one number.
    """
    inputs, targets = pair
    with torch.no_grad():
        try:
            outputs = run_model(model, inputs)
        except TypeError as error:  # an input is missing
            needed = "the inputs of the forward; slim reads a tuple of two as (inputs, targets)"
            remedy = "give several inputs as a dict by name, or in a pair: ((image, mask), targets)"
            raise DataError.at("batch 0", got=f"inputs with {error}", needed=needed, remedy=remedy) from error
        except Exception as error:  # a forward may raise anything
            raise make_input_error("batch 0", inputs, error) from error
        if loss is None:
            compare_logits(outputs, outputs)
            _check_classes(outputs, targets)
            return
        try:
            value = loss(outputs, targets)
        except Exception as error:  # so may a loss
            got = f"{type(error).__name__}: {error}, from the outputs and the targets of batch 0"
            raise EvaluationError.at("loss", got=got, needed="loss(outputs, targets) that returns a scalar") from error
    if isinstance(value, Tensor) and value.numel() != 1:
        got, remedy = f"a tensor of the shape {tuple(value.shape)}", 'leave out reduction="none", or take .mean()'
        raise EvaluationError.at("loss", got=got, needed="one number for all images", remedy=remedy)


def _check_classes(outputs: Any, targets: Any) -> None:
    """Make sure that targets, if there are any, are one class for each place of the logits.

    Raises:
        ConfigError: they are not, so that outputs are no logits, or classes do not exclude each other.
    """
    places = collect_tensors(outputs)[0].dim() - 1
    if any(tensor.is_floating_point() or tensor.dim() != places for tensor in collect_tensors(targets)):
        shapes = " and ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in collect_tensors(targets))
        needed = "a callable loss(outputs, targets) where targets are no classes (N,) or (N, H, W)"
        remedy = "give one; or, if the model tells classes that exclude each other, give its inputs alone"
        raise ConfigError.at("loss", got=f"none, and targets {shapes}", needed=needed, remedy=remedy)


def _check_pairs(model: nn.Module, batches: Iterable[Any], *, labelled: bool) -> list[Pair]:
    """Return the batches as a list of pairs.

    Args:
        model: takes their inputs.
        batches: of inputs, or pairs.
        labelled: whether all must be pairs.

    Raises:
        DataError: there is none, or one is no pair of the model's inputs and targets.
    """
    pair_of = "pairs (inputs, targets), such as a DataLoader"
    needed = f"an iterable of {pair_of}" if labelled else f"an iterable of inputs (N, C, H, W), or of {pair_of}"
    if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Iterable):
        remedy = "pass [images] for a single batch, or images.split(100)" if isinstance(batches, Tensor) else ""
        raise DataError.at("batches", got=f"a {type(batches).__name__}", needed=needed, remedy=remedy)
    pairs: list[Pair] = []
    for index, batch in enumerate(batches):
        pair = (batch, None) if isinstance(batch, Tensor | Mapping) and not labelled else batch
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            remedy = "leave out the loss where there are no targets" if isinstance(batch, Tensor | Mapping) else ""
            raise DataError.at(f"batch {index}", got=f"a {type(batch).__name__}", needed=needed, remedy=remedy)
        pairs.append((pair[0], pair[1]))
    if not pairs:
        remedy = "a generator that was read before is empty"
        raise DataError.at("batches", got="none", needed=needed, remedy=remedy)
    remedy = "a dict holds inputs of the forward alone, without labels; ((image, mask), targets) is a pair"
    for _ in check_inputs(model, [inputs for inputs, _ in pairs], remedy):
        pass
    return pairs


def _order(supernet: Supernet, order: str, pairs: Sequence[Pair], loss: Loss | None) -> Supernet:
    """Return the supernet of a copy of the model with its channels sorted; no gradient is left."""
    model = supernet.model
    if order == "taylor" and loss is not None:
        _take_gradients(model, pairs, loss)
    ordered = order_supernet(supernet, order, [inputs for inputs, _ in pairs])
    model.zero_grad()
    ordered.zero_grad()
    return ordered


def _take_gradients(model: nn.Module, pairs: Sequence[Pair], loss: Loss) -> None:
    """Add the gradients of the loss over all batches to the weights of a model, those of frozen weights too."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    model.requires_grad_(True)
    model.zero_grad()
    with torch.enable_grad():
        for inputs, targets in pairs:
            loss(run_model(model, inputs), targets).backward()  # type: ignore[no-untyped-call]
    for parameter in frozen:
        parameter.requires_grad_(False)
