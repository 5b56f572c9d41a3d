"""What a training starts from: fresh, pretrained or local weights, zeroed branches, channels in order of importance."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from timm_autoslim import Supernet, create_base, reorder_channels, zero_last_norms
from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.loaders import make_evaluation_loader, take_share
from timm_autoslim.recipes.lib.models import (
    choose_base_args,
    count_pretrained_classes,
    create_model,
    make_images,
    resolve_input,
)
from timm_autoslim.recipes.lib.names import is_stored
from timm_autoslim.recipes.lib.run_folder import load_weights
from timm_autoslim.recipes.lib.training import LossFn


def check_starting_flags(args: argparse.Namespace) -> None:
    """Refuse starting points that contradict each other.

    Raises:
        ConfigError: two sources of weights, or a fresh start's option with trained weights.
    """
    sources = [flag for flag, on in (("--pretrained", args.pretrained),
                                     ("--initial-checkpoint", args.initial_checkpoint)) if on]  # fmt: skip
    if len(sources) > 1:
        raise ConfigError(f"{' and '.join(sources)} are two starting points: give one of them.")
    if sources and args.zero_init_last:
        raise ConfigError(f"--zero-init-last would erase trained weights of {sources[0]}: it is for a fresh start.")


def check_trained_flags(args: argparse.Namespace, recipe: str, does: str) -> None:
    """Refuse what names no model, no trained weights of it, or no images; a stored model brings its weights.

    Args:
        args: the flags.
        recipe: its name.
        does: what it does with the weights.

    Raises:
        ConfigError: one of them is missing, or there are two sources of weights.
    """
    if not args.model:
        raise ConfigError(f"{recipe} needs the model of your weights: give --model NAME, or a folder.")
    args.pretrained = args.pretrained or is_stored(args.model)
    check_starting_flags(args)
    if not (args.pretrained or args.initial_checkpoint):
        raise ConfigError(
            f"{recipe} {does} trained weights: give --initial-checkpoint FILE, --pretrained, or a folder as --model."
        )
    if not (args.data_dir or args.dataset):
        raise ConfigError(f"{recipe} needs images: give --data-dir DIR, or --dataset NAME (digits are scikit-learn's).")


def describe_start(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that say where a training started: a resumed run must have the same."""
    images = args.order_images if args.order in ("taylor", "reconstruction") else None
    return {**{name: getattr(args, name) for name in ("pretrained", "initial_checkpoint", "zero_init_last", "order")},
            "order_images": images}  # fmt: skip


def create_starting_model(args: argparse.Namespace) -> nn.Module:
    """Create the model as the flags say; fills in the flags about the images that were not given.

    Raises:
        ConfigError: the file cannot be read or does not fit, or no residual branch ends in a BatchNorm.
    """
    model = _load_checkpoint(args) if args.initial_checkpoint else create_model(args, args.pretrained)
    resolve_input(args, model)
    if args.zero_init_last and not zero_last_norms(model, make_images(args, 2)):
        raise ConfigError(
            f"--zero-init-last: no residual branch of {args.model} ends in a BatchNorm; leave the flag out."
        )
    return model


def find_weights(args: argparse.Namespace) -> Path | None:
    """Return the file of the weights that a run starts from, where it lies here."""
    folder = Path(args.model.removeprefix("local-dir:"))
    path = Path(args.initial_checkpoint or folder / "model.safetensors")
    return path if path.is_file() else None


def is_trained(args: argparse.Namespace) -> bool:
    """Whether a model starts with trained weights, those of the classifier included.

    Raises:
        ConfigError: the file of --initial-checkpoint cannot be read.
    """
    if args.initial_checkpoint:
        with _explain(args):
            return _read_lengths(create_model(args), _read_file(args))["classifier"] in (None, args.num_classes)
    return bool(args.pretrained) and count_pretrained_classes(args) == args.num_classes


def _read_file(args: argparse.Namespace) -> dict[str, Tensor]:
    if not Path(args.initial_checkpoint).is_file():
        raise FileNotFoundError("there is no such file.")
    with torch.serialization.safe_globals([argparse.Namespace]):  # of the flags in checkpoints of timm's train.py
        state: dict[str, Tensor] = timm.models.load_state_dict(args.initial_checkpoint, weights_only=True)
    return state


@contextlib.contextmanager
def _explain(args: argparse.Namespace) -> Iterator[None]:
    """Say of whatever is raised that --initial-checkpoint is at fault."""
    try:
        yield
    except Exception as error:  # a damaged or foreign file makes torch, safetensors and timm raise anything
        raise ConfigError(
            f"--initial-checkpoint {args.initial_checkpoint} does not give weights of {args.model}: {error} Needed: a "
            "file of this model's weights, as timm saves them (.safetensors, or .pth that "
            "torch.load(weights_only=True) reads)."
        ) from error


def _load_checkpoint(args: argparse.Namespace) -> nn.Module:
    """Create the model with the weights of --initial-checkpoint, read without running any code of the file."""
    model = create_model(args)
    with _explain(args), torch.serialization.safe_globals([argparse.Namespace]):
        state = _read_file(args)
        try:
            if args.model.startswith("torchvision/"):
                _load_torchvision(model, state)
                return model
            donor = _create_donor(args, model, state)
        except Exception as error:
            if difference := _compare(model, state):
                raise ValueError(difference) from error
            raise
    if donor.num_classes != args.num_classes:
        donor.reset_classifier(args.num_classes)
    model.load_state_dict(donor.state_dict())
    return model


def _compare(model: Any, state: dict[str, Tensor]) -> str:
    """Say how a file's tensors differ from those of a model, in names and shapes; empty if they do not."""
    needed = model.state_dict()
    lacking = [name for name in needed if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in needed]
    config: Any = model.pretrained_cfg
    heads = config.get("classifier") or ()
    free = tuple(f"{name}." for name in ([heads] if isinstance(heads, str) else heads))
    other = [name for name in needed if name in state and state[name].shape != needed[name].shape]
    other = [name for name in other if not name.startswith(free or "\0")]  # classifiers of other classes are fine
    parts = []
    if lacking:
        parts.append(f"{len(lacking)} of {len(needed)} tensors of the model are not in it, such as {lacking[0]}")
    if unknown:
        parts.append(f"{len(unknown)} of {len(state)} tensors in it are not of the model, such as {unknown[0]}")
    if other:
        shapes = f"{tuple(state[other[0]].shape)} in place of {tuple(needed[other[0]].shape)}"
        parts.append(f"{len(other)} have other shapes, such as {other[0]}, {shapes}")
    return f"it holds the weights of another model: {'; '.join(parts)}. Is --model the right one?" if parts else ""


def _create_donor(args: argparse.Namespace, model: nn.Module, state: dict[str, Tensor]) -> Any:
    """Load the file through timm, with its conversions, into a model of the file's classes; no weight may lack."""
    config: Any = model.pretrained_cfg
    lengths = _read_lengths(model, state)
    classes, chans = lengths["classifier"] or config["num_classes"], lengths["first_conv"] or config["input_size"][0]
    overlay = {"file": args.initial_checkpoint, "custom_load": False, "num_classes": classes,
               "input_size": (chans, *config["input_size"][1:])}  # fmt: skip
    base_args = choose_base_args(args) | {"num_classes": classes}
    return create_base(args.model, **base_args, pretrained=True, pretrained_cfg_overlay=overlay)


def _read_lengths(model: Any, state: dict[str, Tensor]) -> dict[str, int | None]:
    """Return the classes and the input channels that a file says, None where it does not."""
    lengths: dict[str, int | None] = {}
    for key, axis in (("classifier", 0), ("first_conv", 1)):
        names = model.pretrained_cfg.get(key)
        weight = state.get(f"{names if isinstance(names, str) else (names or [''])[0]}.weight")
        lengths[key] = None if weight is None else weight.shape[axis]
    return lengths


def _load_torchvision(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load strictly; a classifier of other classes is left fresh."""
    config: Any = model.pretrained_cfg
    fresh = model.state_dict()
    keys = [f"{config['classifier']}.{leaf}" for leaf in ("weight", "bias")]
    left = {key: fresh[key] for key in keys if key in state and state[key].shape != fresh[key].shape}
    load_weights(model, {**state, **left})


def take_gradients(model: nn.Module, loss_fn: LossFn, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Add the gradients of the loss in evaluation mode, in which the model stays, to its weights."""
    model.eval()
    for inputs, targets in batches:
        loss = loss_fn(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]


def order_by_images(
    accelerator: Accelerator, args: argparse.Namespace, supernet: Supernet, source: Any, training: Sequence[int]
) -> None:
    """Sort the channels of a supernet by `--order`, on the first `--order-images` training images.

    For "reconstruction" each process takes a share of them; for the others all take all.
    """
    apart, shown = args.order == "reconstruction", training[: args.order_images]
    loader = make_evaluation_loader(args, source, take_share(shown, accelerator) if apart else shown)
    batches = ((inputs.to(accelerator.device), targets.to(accelerator.device)) for inputs, targets in loader)
    order_channels(supernet, args.order, F.cross_entropy, batches, distributed=apart)


def order_channels(
    supernet: Supernet,
    order: str,
    loss_fn: LossFn,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    distributed: bool = False,
) -> None:
    """Sort the channels of every group by importance, the best first, in place; the widest's function stays the same.

    Source: Cai et al., "Once-for-All", arXiv 1908.09791, section 3.3, there by the L1 norm; "taylor": Molchanov et al.,
    arXiv 1906.10771.

    Args:
        supernet: on its device.
        order: a name in `timm_autoslim.CRITERIA`.
        loss_fn: whose gradients "taylor" takes, in evaluation mode.
        batches: inputs and targets on the device; only read for "taylor" and "reconstruction".
        distributed: whether each process has images of its own, for "reconstruction".
    """
    model, training = supernet.model, supernet.model.training
    try:
        if order == "taylor":
            take_gradients(model, loss_fn, batches)
        # channels that are in no checkpoint keep their order, so the state is all that moves
        images = (inputs for inputs, _ in batches) if order == "reconstruction" else None
        model.load_state_dict(
            reorder_channels(model, supernet.graph, order, images, distributed=distributed).state_dict()
        )
    finally:
        model.zero_grad()
        model.train(training)
