"""Batches of inputs, as everything takes them that runs a model on some images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from timm_autoslim.errors import AutoSlimError, DataError, quote_error
from timm_autoslim.utils.arguments import quote
from timm_autoslim.utils.meta import count_images, run_model
from timm_autoslim.utils.tensors import collect_tensors, map_tensors

NEEDED = "an iterable of at least one input tensor (N, C, H, W)"
_LOADER = "if the loader yields (inputs, targets), pass `(inputs for inputs, _ in loader)`"  # a remedy
JOINED = 32  # images in a batch that is made of batches of one image


def check_batches(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Return an iterator over batches; each is checked when it is reached.

    Args:
        batches: input tensors, of at least one image each.

    Raises:
        DataError: `batches` is no iterable, or is a tensor itself; or, on the way, a batch is no tensor, has no images,
            or holds NaN or infinity.
    """
    if isinstance(batches, Tensor):
        remedy = "pass [images] for a single batch, or images.split(32)"
        raise DataError.at("batches", got="a Tensor", needed=NEEDED, remedy=remedy)
    if not isinstance(batches, Iterable):
        raise DataError.at("batches", got=f"a {type(batches).__name__}", needed=NEEDED)
    return (_check_batch(index, batch) for index, batch in enumerate(batches))


def _check_batch(index: int, batch: Tensor, remedy: str = _LOADER) -> Tensor:
    where, needed = f"batches[{index}]", "an input tensor (N, C, H, W) of at least one image"
    if isinstance(batch, np.ndarray):
        remedy = "torch.from_numpy(array) makes a tensor of it, in the type of the model's weights after .float()"
        raise DataError.at(where, got="an array of numpy", needed=needed, remedy=remedy)
    if not isinstance(batch, Tensor):
        raise DataError.at(where, got=f"a {type(batch).__name__}", needed=needed, remedy=remedy)
    if not batch.dim() or not len(batch):
        raise DataError.at(where, got=f"the shape {tuple(batch.shape)}", needed=needed)
    if not bool(batch.isfinite().all()):
        raise DataError.at(where, got="numbers that are not finite", needed="images without NaN or infinity")
    return batch


def check_inputs(model: nn.Module, batches: Iterable[Any], remedy: str = _LOADER) -> Iterator[Any]:
    """Return an iterator over batches of a model's inputs; each is checked when it is reached.

    Args:
        model: the model.
        batches: of one input tensor, or of several inputs as a tuple or, by name, as a dict.
        remedy: what the caller may do whose batches are none.

    Raises:
        DataError: as `check_batches` does; or a batch does not fit the model's forward.
    """
    if isinstance(batches, Mapping):
        raise DataError.at("batches", got=f"a {type(batches).__name__}", needed=NEEDED, remedy="pass [inputs] for one")
    check_batches(batches)
    return (_check_inputs(model, index, batch, remedy) for index, batch in enumerate(batches))


def _check_inputs(model: nn.Module, index: int, batch: Any, remedy: str) -> Any:
    tensors = collect_tensors(batch)
    if isinstance(batch, Tensor) or not tensors:
        return _check_batch(index, batch, remedy)
    if isinstance(batch, tuple | Mapping) and not _fits(model, batch):
        raise make_structure_error(index, batch, remedy)
    _check_batch(index, tensors[0])
    for tensor in tensors[1:]:
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise DataError.at(f"batches[{index}]", got="numbers that are not finite", needed="inputs without NaN")
    return batch


def _fits(model: nn.Module, batch: tuple[Any, ...] | Mapping[str, Any]) -> bool:
    """Whether a forward takes these inputs; labels, which nothing asks for, do not pass for an input."""
    try:
        signature = inspect.signature(model.forward)
        args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (batch, {})
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    if isinstance(batch, tuple) and len(batch) == 2 and all(isinstance(item, Tensor) for item in batch):
        images, labels = batch
        second = list(signature.parameters.values())[1:2]
        optional = not second or second[0].default is not inspect.Parameter.empty
        return not (optional and labels.dim() == 1 < images.dim() and not labels.is_floating_point())
    return True


def make_structure_error(index: int, batch: Any, remedy: str = _LOADER, cause: Exception | None = None) -> DataError:
    """Return the error for a batch of a structure that the model does not take; `cause` is what its forward raised."""
    raised = "" if cause is None else f"; the forward raised {type(cause).__name__}: {quote_error(cause)}"
    return DataError.at(
        f"batches[{index}]",
        got=f"a {type(batch).__name__}",
        needed="inputs of the model's forward: a tensor (N, C, H, W), or several as a tuple or, by name, as a dict",
        remedy=f"{remedy}{raised}",
    )


def run_batch(model: nn.Module, index: int, batch: Any) -> Any:
    """Return what a model returns for a batch.

    Raises:
        DataError: the model does not take the batch.
    """
    try:
        return run_model(model, batch)
    except (AutoSlimError, torch.OutOfMemoryError):
        raise
    except (TypeError, AttributeError) as error:
        if isinstance(batch, Tensor):
            raise
        raise make_structure_error(index, batch, cause=error) from error
    except (RuntimeError, ValueError) as error:
        raise make_input_error(f"batches[{index}]", batch, error) from error


def make_input_error(where: str, batch: Any, cause: Exception) -> DataError:
    """Return the error for a batch that the model does not take; `cause` is what its forward raised."""
    tensors = collect_tensors(batch)
    shapes = " and ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in tensors)
    remedy = (
        "bytes become numbers by images.float() / 255, normalised by mean and std as in training"
        if any(tensor.dtype == torch.uint8 for tensor in tensors)
        else "look at their channels, their size, their type and their device"
    )
    return DataError.at(
        where,
        got=f"inputs {shapes}, on which the model raises {type(cause).__name__}: {str(cause)[:200]}",
        needed="inputs that the model takes as they are, mostly (N, C, H, W) in the type of its weights",
        remedy=remedy,
    )


def divide_batch(batch: Any, count: int) -> Iterator[Any]:
    """Yield the images of a batch, `count` at a time; less at the end.

    Of several inputs every tensor is divided whose first dimension is as long as that of the first, which is the batch,
    as `convert` doubles them; all else stays as it is.
    """
    images = count_images(batch)
    if images <= count:
        yield batch
        return
    for start in range(0, images, count):

        def take(tensor: Tensor, start: int = start) -> Tensor:
            return tensor[start : start + count] if tensor.dim() and len(tensor) == images else tensor

        yield map_tensors(take, batch)


def make_empty_error(got: str = "none") -> DataError:
    """Return the error for batches of which there is none; `got` may say what they were needed for."""
    return DataError.at("batches", got=got, needed=NEEDED, remedy="a generator that was read before is empty")


def join_singles(batches: Iterable[Any], is_short: Callable[[Any], bool]) -> Iterator[Any]:
    """Yield batches; those of one image that `is_short` says so of are joined to each other and to their neighbours.

    A last batch of one image joins the batch before it; many of one image become batches of `JOINED`. A batch is any
    nested value of tensors, such as a pair of inputs and targets. All others pass as they are.

    Raises:
        DataError: there is one image in all; or two batches differ in more than their images, and so cannot be joined.
    """
    waiting: Any = None  # which a last single image would join
    singles: list[Any] = []
    for batch in batches:
        if count_images(batch) == 1 and is_short(batch):
            singles.append(batch)
            if len(singles) < JOINED:
                continue
            batch, singles = _join(singles), []
        elif singles:
            batch, singles = _join([*singles, batch]), []
        if waiting is not None:
            yield waiting
        waiting = batch
    if waiting is None and len(singles) == 1:
        got = "one image, of which a BatchNorm gets a single value per channel"
        raise DataError.at("batches", got=got, needed="two images or more, better hundreds: one has no variance")
    if singles:
        waiting = _join(singles if waiting is None else [waiting, *singles])
    if waiting is not None:
        yield waiting


def _join(batches: Sequence[Any]) -> Any:
    """Return one batch of all images.

    Raises:
        DataError: they differ in more than their images.
    """
    images = [count_images(batch) for batch in batches]
    tensors = [_list_tensors(batch) for batch in batches]
    joined = []
    for column in zip(*tensors, strict=False):
        of_images = all(tensor.dim() and len(tensor) == n for tensor, n in zip(column, images, strict=True))
        if of_images and len({(tensor.shape[1:], tensor.dtype, tensor.device) for tensor in column}) == 1:
            joined.append(torch.cat(column))
    if {len(of_one) for of_one in tensors} != {len(joined)} or not _have_same_rest(batches):
        others = zip(batches, images, strict=True)
        texts = (_describe_difference(batches[0], other, images[0], count) for other, count in others)
        difference = next(filter(None, texts), "their structure differs")
        got = f"a batch of one image, too few for a BatchNorm, that cannot be joined to its neighbour: {difference}"
        remedy = "leave it out, as drop_last=True in a DataLoader does"
        raise DataError.at("batches", got=got, needed="two images or more in each batch", remedy=remedy)
    remaining = iter(joined)
    return map_tensors(lambda _: next(remaining), batches[0])


def _have_same_rest(batches: Sequence[Any]) -> bool:
    """Whether batches differ in their tensors alone."""
    first, *others = (map_tensors(lambda _: torch.zeros(()), batch) for batch in batches)
    return all(repr(other) == repr(first) for other in others)


def _describe_difference(a: Any, b: Any, images: int, others: int, where: str = "") -> str:
    """Say what keeps two batches, of so many images each, from being joined: the first place and what is there."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape[1:] == b.shape[1:] and a.dtype == b.dtype and a.device == b.device
        if same and a.dim() and len(a) == images and len(b) == others:
            return ""
        if same and a.shape == b.shape:
            return f"batch{where} ({_describe(a)}) has no dimension of images"
    elif isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
        texts = (_describe_difference(a[key], b[key], images, others, f"{where}[{key!r}]") for key in a)
        return next(filter(None, texts), "")
    elif isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        texts = (_describe_difference(x, y, images, others, f"{where}[{index}]") for index, (x, y) in pairs)
        return next(filter(None, texts), "")
    elif type(a) is type(b) and repr(a) == repr(b):
        return ""
    return f"batch{where} is {_describe(a)} in one and {_describe(b)} in the other"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {value.dtype} on {value.device}"
    return quote(value)


def _list_tensors(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch in the order in which `map_tensors` comes to them."""
    tensors: list[Tensor] = []
    map_tensors(lambda tensor: tensors.append(tensor) or tensor, batch)  # type: ignore[func-returns-value]
    return tensors
