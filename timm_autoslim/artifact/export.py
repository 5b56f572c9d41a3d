"""Plain model -> folder (model.safetensors, config.json, README.md) that `timm.create_model` loads."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import reprlib
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import FeatureInfo, PretrainedCfg
from timm.models._pretrained import filter_pretrained_cfg
from torch import Tensor, nn

from timm_autoslim.artifact.card import check_figures, write_card
from timm_autoslim.artifact.compare import difference, idle
from timm_autoslim.artifact.construct import ARCHITECTURE, TORCHVISION, hollow
from timm_autoslim.artifact.folder import CONFIG, WEIGHTS
from timm_autoslim.artifact.load import build_slimmed, pool_type
from timm_autoslim.artifact.pruned import PRUNED, write_pruned
from timm_autoslim.artifact.spec import check_recipe
from timm_autoslim.artifact.torchvision import feature_taps
from timm_autoslim.errors import ArtifactError, OutputExistsError, StaleStatisticsError
from timm_autoslim.utils.files import replace_file, sync_to_disk

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CARD = "README.md"


def export(
    plain: nn.Module,
    out: str | Path,
    *,
    base: str | None = None,
    base_args: Mapping[str, object] | None = None,
    card: Mapping[str, object] | None = None,
) -> Path:
    """Write a slimmed model to a new folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

    What was written is loaded and compared with `plain` before the folder appears: its weights, and what it says of an
    image with weights that let all parts speak. So a folder that exists also loads, and is the same model. It appears
    at once or not at all, also when the process is killed. Loading needs `import timm_autoslim` and
    `timm.create_model`.

    Args:
        plain: a model from `supernet.extract`, fine-tuned or calibrated; its head and its input channels may have
            been changed since.
        out: the folder to create.
        base: the name that creates the base (`resnet50`, `torchvision/resnet18`), where the recipe has none.
        base_args: the arguments that the base was created with; they replace the recipe's.
        card: figures for the model card, by label, such as `{"MACs": "300M", "params": 2_000_000, "top-1": 71.9}`.

    Returns:
        The folder's path.

    Raises:
        OutputExistsError: `out` exists.
        StaleStatisticsError: BatchNorm statistics of a narrowed model are not its own.
        ArtifactError: the model has no recipe or no base, is a backbone (`features_only=True`), has weights that are
            NaN or on the meta device, or what the folder builds differs from it.
    """
    folder = Path(out)
    _refuse_existing(folder)
    figures = check_figures(card)
    recipe = _recipe(plain, base, base_args)
    _refuse_without_numbers(plain)
    with torch.random.fork_rng(devices=[]):  # building draws random numbers
        rebuilt, settings = _fit(plain, recipe)
        config = _config(plain, rebuilt, recipe, settings)
        size = config["pretrained_cfg"]["input_size"]
        _refuse_stale(plain, recipe, size)
        # clones: safetensors refuses tensors that share memory, and tied parameters need both of their names
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in plain.state_dict().items()}
        with _created(folder) as draft:
            with replace_file(draft / WEIGHTS) as part:  # gives it the rights that any new file has
                save_file(tensors, part, metadata={"format": "pt"})
            (draft / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            _prove_folder(draft, plain, tensors, recipe, size)
            plain_timm = write_pruned(draft / PRUNED, plain, recipe, settings, size)
            write_card(draft / CARD, folder.name, config, figures, rebuilt, plain_timm)
    return folder


# ------------------------------------------------------------------------------------------------ what is refused


def _refuse_existing(folder: Path) -> None:
    if os.path.lexists(folder):
        raise OutputExistsError(
            f"{folder}: exists already, nothing was written; choose a new folder or remove this one"
        )


def _recipe(plain: nn.Module, base: str | None, base_args: Mapping[str, object] | None) -> dict[str, Any]:
    """The model's recipe with its base, checked."""
    kind = type(plain).__name__
    if hasattr(plain, "_orig_mod"):
        raise ArtifactError(f"{kind} is compiled: needed the model that it was made of; export(model._orig_mod, ...)")
    found = getattr(plain, "autoslim", None)
    if found is None:
        raise ArtifactError(
            f"{kind} has no recipe: got a model without an `autoslim` attribute, needed one from supernet.extract(); "
            "use supernet.extract(widths) and unwrap DistributedDataParallel or a compiled model first"
        )
    if isinstance(getattr(plain, "feature_info", None), FeatureInfo):
        raise ArtifactError(
            f"{kind} is a backbone (features_only=True), which no folder describes; slim and export the model that it "
            "is made of, and load that with features_only=True, or keep widths and state_dict yourself"
        )
    recipe = check_recipe(found)
    if base is not None:
        recipe["base"] = base
    if base_args is not None:
        if not isinstance(base_args, Mapping):
            raise ArtifactError(f"base_args: got {reprlib.repr(base_args)}, needed a mapping from names of arguments")
        recipe["base_args"] = copy.deepcopy(dict(base_args))
    if recipe["base"] is None:
        raise ArtifactError(
            f"{kind} has a recipe without a base: needed the name that creates the model before slimming; pass base= "
            "(a timm name or 'torchvision/NAME') and base_args= to export() or convert()"
        )
    recipe = check_recipe(recipe)
    part = next((key for key, value in recipe.items() if not _is_json(value)), None)
    if part is not None:
        raise ArtifactError(
            f"recipe {part!r}: got {reprlib.repr(recipe[part])}, which JSON does not return as it was; needed "
            "text, numbers, lists and mappings from text (lists, not tuples, in base_args=)"
        )
    return recipe


def _is_json(value: object) -> bool:
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


def _refuse_without_numbers(plain: nn.Module) -> None:
    for name, tensor in plain.state_dict().items():
        if tensor.is_meta or tensor.isnan().any():
            got = "a tensor on the meta device" if tensor.is_meta else "weights that are NaN"
            raise ArtifactError(f"{name}: got {got}, needed numbers; export a model that works")


def _refuse_stale(plain: nn.Module, recipe: Mapping[str, Any], size: Sequence[int]) -> None:
    norms = {name: m for name, m in plain.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    tracked = {name: int(m.num_batches_tracked) for name, m in norms.items() if m.num_batches_tracked is not None}
    stale = {name: batches for name, batches in tracked.items() if batches < 1}
    if not recipe["sizes"] or not stale:
        return
    # What calibrate() cannot reach has no part in evaluation either. The parent decides: it may call no BatchNorm, and
    # use its tensors.
    unused = idle(plain, size)
    for name, batches in stale.items():
        if name.rpartition(".")[0] not in unused:
            raise StaleStatisticsError(
                f"{name}: got BatchNorm statistics that are the whole model's, or were {1 - batches} batches of "
                "training short of being this narrower model's, needed its own; call "
                "timm_autoslim.calibrate(model, batches), or fine-tune it for longer, before export"
            )


def _fit(plain: nn.Module, recipe: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the model without data and compare names and shapes; return it, and the settings that it took."""
    rebuilt = hollow(build_slimmed, recipe)
    settings = _settings(plain, rebuilt)
    if settings:
        rebuilt = hollow(build_slimmed, recipe, **settings)
    advice = _advice(recipe)
    if type(rebuilt) is not type(plain):
        raise ArtifactError(f"model: got {type(plain).__name__}, needed {type(rebuilt).__name__}; {advice}")
    got, needed = plain.state_dict(), rebuilt.state_dict()
    for name in (*needed, *got):
        shapes = [
            "a tensor" if not isinstance(state[name], Tensor) else f"shape {tuple(state[name].shape)}"
            for state in (got, needed)
            if name in state
        ]
        if name not in got or name not in needed or shapes[0] != shapes[1] or shapes[0] == "a tensor":
            have = shapes[0] if name in got else "no such tensor"
            want = shapes[-1] if name in needed else "no such tensor"
            raise ArtifactError(f"{name}: got {have}, needed {want} as the base and the recipe build it; {advice}")
    return rebuilt, settings


def _prove_folder(
    draft: Path, plain: nn.Module, tensors: Mapping[str, Tensor], recipe: Mapping[str, Any], size: Sequence[int]
) -> None:
    """Load what was written, and compare its weights and what it says of an image with the model's."""
    again: nn.Module = timm.create_model(f"local-dir:{draft}", pretrained=True)
    loaded = again.state_dict()
    found = next((n for n, t in tensors.items() if not torch.equal(loaded[n].cpu().to(t.dtype), t)), None)
    gap = f"other numbers in {found}" if found else difference(plain, again, size)
    if gap:
        raise ArtifactError(
            f"{type(plain).__name__}: got, when the folder was loaded again, {gap}; needed the same model; "
            f"{_advice(recipe)}"
        )


def _advice(recipe: Mapping[str, Any]) -> str:
    return (
        f"pass base_args= with the arguments that {recipe['base']!r} was created with, and base= if it was another; "
        "what was changed by hand after extract(), no folder describes: undo it before export, and do it on the loaded "
        "model"
    )


def _settings(plain: nn.Module, rebuilt: nn.Module) -> dict[str, Any]:
    """What a user may have changed since the base was created: classes, input channels and pooling."""
    cfg: Any = rebuilt.pretrained_cfg
    settings: dict[str, Any] = {}
    classes, usual = _outputs(plain, cfg.get("classifier")), cfg.get("num_classes")
    if classes is None:
        classes = getattr(plain, "num_classes", usual)
    if classes != getattr(rebuilt, "num_classes", usual):
        settings["num_classes"] = classes
    mine, theirs = _inputs(plain, cfg.get("first_conv")), _inputs(rebuilt, cfg.get("first_conv"))
    if mine and theirs and mine != theirs:
        # a ratio, because some stems fold pixels into channels before their first convolution
        channels = getattr(rebuilt, "in_chans", None) or cfg["input_size"][0]
        settings["in_chans"] = max(1, channels * mine // theirs)
    pool = pool_type(plain)
    if pool is not None and pool != pool_type(rebuilt):
        settings["global_pool"] = pool
    return settings


def _first(model: nn.Module, names: Any) -> nn.Module | None:
    """The module under a name of timm's data settings, which may hold none, one or several."""
    name = names[0] if isinstance(names, list | tuple) and names else names
    return dict(model.named_modules()).get(name) if isinstance(name, str) else None


def _outputs(model: nn.Module, names: Any) -> int | None:
    layer = _first(model, names)
    if isinstance(layer, nn.Identity):
        return 0
    weight = getattr(layer, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else None


def _inputs(model: nn.Module, names: Any) -> int | None:
    layer = _first(model, names)
    weight = getattr(layer, "weight", None)
    return int(weight.shape[1]) * int(getattr(layer, "groups", 1)) if isinstance(weight, Tensor) else None


# ------------------------------------------------------------------------------------------------ what is written


def _config(
    plain: nn.Module, rebuilt: nn.Module, recipe: dict[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The folder's config.json, in the form of timm's `save_for_hf`."""
    known = {field.name for field in fields(PretrainedCfg)}
    theirs: Any = rebuilt.pretrained_cfg
    mine: Any = getattr(plain, "pretrained_cfg", None)
    merged = {**theirs, **(mine if isinstance(mine, Mapping) else {})}
    merged.update(first_conv=theirs.get("first_conv"), classifier=theirs.get("classifier"), custom_load=False)
    classes = settings.get("num_classes", getattr(rebuilt, "num_classes", theirs["num_classes"]))
    dropped = {"state_dict", "architecture", "label_offset"}  # loaded weights have had their label offset applied
    if classes != merged.get("num_classes"):
        dropped |= {"label_names", "label_descriptions"}
    channels = settings.get("in_chans", recipe["base_args"].get("in_chans", theirs["input_size"][0]))
    size = recipe["base_args"].get("img_size")
    if size is not None:
        merged["input_size"] = (channels, *(size if isinstance(size, list) else (size, size)))
    for key in ("input_size", "test_input_size", "min_input_size"):
        if merged.get(key):
            merged[key] = (channels, *merged[key][1:])
    merged["num_classes"] = classes
    cfg = {key: value for key, value in merged.items() if key in known - dropped}
    config: dict[str, Any] = {"architecture": ARCHITECTURE, "num_classes": classes}
    config["num_features"] = getattr(plain, "num_features", None) or getattr(rebuilt, "num_features", 0)
    pool = pool_type(plain)
    if pool:
        config["global_pool"] = pool
    config["model_args"] = {"recipe": recipe, **{k: v for k, v in settings.items() if k == "global_pool"}}
    if recipe["base"].startswith(TORCHVISION):  # what a forward of the narrow model would show at every loading
        config["model_args"]["taps"] = feature_taps(rebuilt)
    config["pretrained_cfg"] = filter_pretrained_cfg(cfg, remove_source=True, remove_null=True)
    return config


@contextlib.contextmanager
def _created(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name when the block ends well, and leaves no trace when it does not.

    A process that is killed leaves a hidden draft, which the next export to the same name removes.
    """
    folder = Path(os.path.abspath(folder))
    made = [parent for parent in folder.parents if not parent.exists()]  # nearest first
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        draft.mkdir(parents=True)
        with _locked(draft):
            _remove_abandoned(folder)
            yield draft
            for path in (*draft.iterdir(), draft):
                sync_to_disk(path)
            _refuse_existing(folder)  # a rename would silently replace an empty folder
            try:
                os.rename(draft, folder)
            except OSError:
                _refuse_existing(folder)  # another process was quicker
                raise
        sync_to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


@contextlib.contextmanager
def _locked(draft: Path) -> Iterator[bool]:
    """Hold a draft as its owner does, until its process ends. Yields False where another one holds it."""
    if fcntl is None:
        yield False
        return
    handle = os.open(draft, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held by another process, or a file system without locks
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    """Remove the drafts of this folder whose processes were killed."""
    draft_name = re.compile(re.escape(f".{folder.name}.") + "[0-9a-f]{32}")
    for path in folder.parent.iterdir():
        if draft_name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with _locked(path) as mine:
                if mine:
                    shutil.rmtree(path, ignore_errors=True)
