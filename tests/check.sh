#!/usr/bin/env bash
# Lint, types and tests in a virtual environment of their own: bash tests/check.sh [pytest arguments]
# All tests take some ten minutes on two cores. In a minute and a half, most breaks: bash tests/check.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1  # the tests run side by side, one thread each
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/pytest --numprocesses 2 --dist loadgroup --durations 15 "$@"
