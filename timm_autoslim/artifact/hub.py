"""An exported folder -> the Hub, through timm's own function."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import timm
from timm.models import push_to_hf_hub
from timm.models._hub import has_hf_hub

from timm_autoslim.artifact.card import check_figures, make_base, measure
from timm_autoslim.artifact.construct import ARCHITECTURE
from timm_autoslim.artifact.folder import CONFIG, read_config
from timm_autoslim.errors import ArtifactError

_OURS = frozenset(("model", "repo_id", "model_config", "model_args", "model_card", "safe_serialization"))


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
        ArtifactError: the folder is no exported one, an option is not timm's to choose, or timm and the installed
            huggingface_hub do not fit each other.
    """
    refused = sorted(_OURS & set(options))
    if refused:
        raise ArtifactError(f"push {refused[0]}=: it is given by the folder; leave it out")
    if not has_hf_hub():
        raise ArtifactError(
            f"push: timm {timm.__version__} cannot use huggingface_hub as it is installed; needed versions that fit "
            "each other: update timm, or pip install 'huggingface_hub<1' beside an old one"
        )
    figures = check_figures(card)
    config = read_config(Path(folder) / CONFIG)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    recipe, size = config["model_args"]["recipe"], tuple(model.pretrained_cfg["input_size"])
    whole = measure(make_base(recipe, config["num_classes"], size[0]), size)
    costs = {label: f"{value:,}" for label, value in measure(model, size).items()}
    costs |= {f"{label} of the base": f"{value:,}" for label, value in whole.items()}
    usage = f'import timm, timm_autoslim\nmodel = timm.create_model("hf-hub:{repo_id}", pretrained=True)'
    push_to_hf_hub(
        model,
        repo_id,
        model_config={"architecture": ARCHITECTURE},
        model_args=json.loads(json.dumps(config["model_args"])),
        model_card={
            "tags": ["image-classification", "timm", "timm-autoslim"],
            "license": model.pretrained_cfg.get("license") or "other",
            "description": f"`{recipe['base']}`, slimmed by timm-autoslim.",
            "details": {"Base": recipe["base"], "Narrower channel groups": len(recipe["widths"]), **costs, **figures},
            "usage": f"```python\n{usage}\n```",
        },
        safe_serialization=True,
        **options,
    )
    return f"hf-hub:{repo_id}"
