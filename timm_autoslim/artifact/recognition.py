"""Which of torchvision's builders a model came from: torchvision's models do not know their names."""

from __future__ import annotations

import warnings
from typing import Any

import torchvision
from torch import nn

from timm_autoslim.artifact.bases import build_on_meta
from timm_autoslim.artifact.torchvision import construct_torchvision
from timm_autoslim.errors import ArtifactError

CLASSES = 1000  # of torchvision's builders, if they are not told otherwise


def recognize(model: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Return the name and the arguments of the torchvision builder that makes a model like this one, or None.

    The builders of the model's own file are run on the meta device, with as many classes as the model has. The one
    counts whose modules are the same, with all that they tell of themselves, and whose tensors have the same shapes.
    What no module tells is left to the proof of the export, which runs the base beside the model.

    Args:
        model: any model that was not slimmed; of other packages' classes, and of RegNets, None is returned at once.
    """
    file = type(model).__module__
    if not file.startswith("torchvision.models."):
        return None
    look = _describe(model)
    for name in torchvision.models.list_models(module=torchvision.models):
        builder: Any = torchvision.models.get_model_builder(name)
        if builder.__module__ != file:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of initialisations that will change
                candidate = build_on_meta(construct_torchvision, name)
                if type(candidate) is not type(model) or candidate.state_dict().keys() != model.state_dict().keys():
                    continue
                arguments = _find_classes(model, candidate)
                if arguments:
                    candidate = build_on_meta(construct_torchvision, name, **arguments)
        except (ArtifactError, AttributeError, TypeError, ValueError):  # a builder that needs more than classes
            continue
        except NotImplementedError:  # one that reads values, which the meta device lacks, as RegNets' do
            return None
        if _describe(candidate) == look:
            return name, arguments
    return None


def _find_classes(model: nn.Module, candidate: Any) -> dict[str, int]:
    """Return the number of classes of a model as an argument, where its builder has made a candidate of another number.

    Raises:
        AttributeError: the model has no classifier where the candidate has one.
    """
    heads = candidate.pretrained_cfg["classifier"]
    head: Any = model.get_submodule(heads if isinstance(heads, str) else heads[0])
    classes = int(head.out_channels if isinstance(head, nn.Conv2d) else head.out_features)
    return {} if classes == CLASSES else {"num_classes": classes}


def _describe(model: nn.Module) -> tuple[str, dict[str, tuple[int, ...]]]:
    return repr(model), {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
