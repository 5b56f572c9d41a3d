"""Scores of an unfinished search, kept so that it can go on after an interruption."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from common import write_json

from timm_autoslim.errors import ConfigError
from timm_autoslim.slimming.scoring import is_score

SAVED_EVERY = 5  # seconds


class Progress(dict[str, Any]):
    """Scores that a search knows so far, kept in a file of the run folder, which is replaced whole.

    Raises:
        ConfigError: the file cannot be read, holds what is no score, or is of a search with other settings.
    """

    def __init__(self, path: Path, setting: dict[str, Any], accelerator: Accelerator) -> None:
        super().__init__()
        self.path, self.setting, self.writes = path, setting, accelerator.is_main_process
        self.last = time.monotonic()
        if path.is_file():
            self.update(self._read())
            accelerator.print(f"Going on: {len(self)} scores are known from {path}")
        accelerator.wait_for_everyone()  # all have read before one writes

    def _read(self) -> dict[str, Any]:
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            before, scores = dict(kept["setting"]), dict(kept["scores"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.path} is no progress of a search ({error}): remove it to start anew.") from error
        for key, score in scores.items():
            if not is_score(score):
                raise ConfigError(
                    f"{self.path}: got {score!r} as the score of {key!r}; needed: [error, images], a finite number and "
                    "a number of images; remove the file to score anew."
                )
        changed = sorted(key for key in before.keys() | self.setting.keys() if before.get(key) != self.setting.get(key))
        if changed:
            raise ConfigError(
                f"{self.path} is of an interrupted search with other settings ({', '.join(changed)}): give the same "
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
            write_json(self.path, {"setting": self.setting, "scores": self})
        self.last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.save()
