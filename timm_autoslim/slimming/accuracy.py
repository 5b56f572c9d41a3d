"""The accuracy of a fine-tuned network, as its exported folder tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from timm_autoslim.errors import ArtifactError
from timm_autoslim.slimming.json_reader import JsonValue

RESULT = "result.json"
_NEEDED = "what recipes/finetune.py writes; remove it, and fine-tune with --resume: the network is tested again"


@dataclass(frozen=True)
class Accuracy:
    """What a fine-tuned network has on the test images, and which network it is.

    Attributes:
        method, budget: what chose the network, and for which budget, as the user wrote it.
        macs, params: what it costs.
        top1: accuracy on the test images, in per cent.
        widths: of its channel groups, by name.

    Example:
        >>> import json, tempfile
        >>> row = {"method": "searched", "budget": "macs<=50%", "macs": 5, "params": 6, "top1": 71.5, "widths": {}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "result.json").write_text(json.dumps(row))
        ...     Accuracy.load(folder).top1
        71.5
    """

    method: str
    budget: str
    macs: int
    params: int
    top1: float
    widths: Mapping[str, int] = field(hash=False)

    @classmethod
    def load(cls, folder: str | Path) -> Accuracy | None:
        """Read the `result.json` of an exported folder; None if it has none.

        Raises:
            ArtifactError: the file cannot be read, or holds no accuracy; the text says what is wrong.
        """
        path = Path(folder) / RESULT
        if not path.is_file():
            return None
        parts = JsonValue.read(path, _NEEDED).members()
        for name in cls.__dataclass_fields__:
            if name not in parts:
                raise ArtifactError.at(str(path), got=f"no {name!r}", needed=_NEEDED)
        return cls(
            method=parts["method"].text(),
            budget=parts["budget"].text(),
            macs=parts["macs"].integer(),
            params=parts["params"].integer(),
            top1=parts["top1"].number(),
            widths={name: width.integer(1) for name, width in parts["widths"].members().items()},
        )

    @classmethod
    def load_run(cls, run: str | Path) -> dict[str, Accuracy]:
        """Read the accuracies of all networks of a run, by the names of the folders in RUN/exported.

        Raises:
            ArtifactError: as for `load`.
        """
        folders = sorted((Path(run) / "exported").glob("[!.]*"))
        accuracies = {folder.name: cls.load(folder) for folder in folders}
        return {name: accuracy for name, accuracy in accuracies.items() if accuracy is not None}
