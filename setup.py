"""What pyproject.toml cannot say: the wheel's description is README with links that work outside of the repository."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent


def make_description(readme: str, repository: str | None) -> str:
    """Return README with links to its pages as links into the repository, or as text while that has no address."""
    if repository:
        return re.sub(r"\]\((?!https?:|#)([^)]+)\)", rf"]({repository.rstrip('/')}/blob/main/\1)", readme)
    return re.sub(r"\[([^\]\n]+)\]\((?!https?:)[^)]+\)", r"\1", readme)


def read_repository(project: str) -> str | None:
    """Return the address under [project.urls], read without tomllib, which Python 3.10 lacks."""
    match = re.search(r'^Repository = "([^"]+)"$', project, re.MULTILINE)
    return match and match[1]


if __name__ == "__main__":
    address = read_repository((HERE / "pyproject.toml").read_text(encoding="utf-8"))
    setup(
        long_description=make_description((HERE / "README.md").read_text(encoding="utf-8"), address),
        long_description_content_type="text/markdown",
    )
