"""An exported folder -> the Hub, through timm's own function."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path

import timm
from timm.models import push_to_hf_hub
from timm.models._hub import has_hf_hub

from timm_autoslim.artifact.card import check_figures, count_costs, create_comparable_base
from timm_autoslim.artifact.folder import CONFIG, read_config
from timm_autoslim.artifact.spec import ARCHITECTURE
from timm_autoslim.errors import ArtifactError

# What the folder says, so that `push` takes none of it as an option.
_OF_THE_FOLDER = frozenset(("model", "repo_id", "model_config", "model_args", "model_card", "safe_serialization"))


def push(folder: str | Path, repo_id: str, *, card: Mapping[str, object] | None = None, **options: object) -> str:
    """Push an exported folder to the Hub by timm's `push_to_hf_hub`; no pickle is written.

    Args:
        folder: what `export` wrote.
        repo_id: `owner/name`, as in `timm.create_model("hf-hub:owner/name", pretrained=True)`.
        card: figures for the model card, by label, as `export` takes them.
        **options: timm's `commit_message`, `token`, `revision`, `private`, `create_pr`.

    Returns:
        The name that `timm.create_model` loads it by.

    Raises:
        ArtifactError: the folder is no exported one, an option is set by the folder, or timm and the installed
            huggingface_hub do not fit each other.

    Example:
        >>> from timm_autoslim import push
        >>> push("runs/slim", "me/slim", card={"top-1": 71.9}, private=True)  # doctest: +SKIP
        'hf-hub:me/slim'
    """
    _check_options(options)
    figures = check_figures(card)
    config = read_config(Path(folder) / CONFIG)
    spec = config.spec
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    size = tuple(model.pretrained_cfg["input_size"])
    base_counts = count_costs(create_comparable_base(config), size)
    counts = {label: f"{value:,}" for label, value in count_costs(model, size).items()}
    counts |= {f"{label} of the base": f"{value:,}" for label, value in base_counts.items()}
    usage = f'import timm, timm_autoslim\nmodel = timm.create_model("hf-hub:{repo_id}", pretrained=True)'
    push_to_hf_hub(
        model,
        repo_id,
        model_config={"architecture": ARCHITECTURE},
        model_args=config.to_model_args(),
        model_card={
            "tags": ["image-classification", "timm", "timm-autoslim"],
            "license": model.pretrained_cfg.get("license") or "other",
            "description": f"`{spec.base}`, slimmed by timm-autoslim.",
            "details": {"Base": spec.base, "Channel groups": len(spec.widths), **counts, **figures},
            "usage": f"```python\n{usage}\n```",
        },
        safe_serialization=True,
        **options,
    )
    return f"hf-hub:{repo_id}"


def _check_options(options: Mapping[str, object]) -> None:
    """Raise ArtifactError for an option that the folder sets, or if the installed versions cannot push."""
    refused = sorted(_OF_THE_FOLDER & set(options))
    if refused:
        option = refused[0]
        raise ArtifactError.at(
            f"push {option}=",
            got=reprlib.repr(options[option]),
            needed="no such option: the folder says it",
            remedy="leave it out",
        )
    if not has_hf_hub():
        raise ArtifactError.at(
            "push",
            got=f"timm {timm.__version__}, which cannot use huggingface_hub as it is installed",
            needed="versions that fit each other",
            remedy="update timm, or pip install 'huggingface_hub<1' beside an old one",
        )
