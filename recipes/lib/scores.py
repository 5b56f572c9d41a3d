"""The scores of an unfinished search, in a file: the search can go on after an interruption."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from timm_autoslim import check_scores
from timm_autoslim.errors import ConfigError, EvaluationError
from timm_autoslim.recipes.lib.run_folder import write_json

SAVED_EVERY = 5  # seconds


class SavedScores(dict[str, Any]):
    """Scores of the subnets that a search has evaluated, saved to a file of the run folder at intervals.

    Raises:
        ConfigError: the file cannot be read, holds something that is no score, or is of a search with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], accelerator: Accelerator) -> None:
        super().__init__()
        self.path, self.settings, self.writes = path, settings, accelerator.is_main_process
        self.last = time.monotonic()
        if path.is_file():
            self.update(self._read())
            accelerator.print(f"Going on: {len(self)} scores are in {path}")
        accelerator.wait_for_everyone()  # all have read before one writes

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            before, scores = dict(content["settings"]), dict(content["scores"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.path} is no progress of a search ({error}): remove it to start anew.") from error
        try:
            check_scores(scores)
        except EvaluationError as error:
            raise ConfigError(f"{self.path}: {error}") from error
        names = sorted(before.keys() | self.settings.keys())
        changes = [name for name in names if before.get(name) != self.settings.get(name)]
        if changes:
            raise ConfigError(
                f"{self.path} is of an interrupted search with other settings ({', '.join(changes)}): give the same "
                "ones to go on, or remove the file to start anew."
            )
        return scores

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if time.monotonic() - self.last > SAVED_EVERY:
            self.save()

    def save(self) -> None:
        """Write the file."""
        if self.writes:
            write_json(self.path, {"settings": self.settings, "scores": self})
        self.last = time.monotonic()

    def __enter__(self) -> SavedScores:
        return self

    def __exit__(self, *_: object) -> None:
        self.save()
