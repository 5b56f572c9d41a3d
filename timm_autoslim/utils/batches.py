"""Batches of inputs, as everything takes them that runs a model on some images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from timm_autoslim.errors import DataError

NEEDED = "an iterable of at least one input tensor (N, C, H, W)"


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


def _check_batch(index: int, batch: Tensor) -> Tensor:
    where, needed = f"batches[{index}]", "an input tensor (N, C, H, W) of at least one image"
    if not isinstance(batch, Tensor):
        remedy = "if the loader yields (inputs, targets), pass `(inputs for inputs, _ in loader)`"
        raise DataError.at(where, got=f"a {type(batch).__name__}", needed=needed, remedy=remedy)
    if not batch.dim() or not len(batch):
        raise DataError.at(where, got=f"the shape {tuple(batch.shape)}", needed=needed)
    if not bool(batch.isfinite().all()):
        raise DataError.at(where, got="numbers that are not finite", needed="images without NaN or infinity")
    return batch


def make_empty_error(got: str = "none") -> DataError:
    """Return the error for batches of which there is none; `got` may say what they were needed for."""
    return DataError.at("batches", got=got, needed=NEEDED, remedy="a generator that was read before is empty")
