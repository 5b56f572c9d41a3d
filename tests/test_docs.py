"""What README and docs show is run, and what they point to is there.

Fences marked `python` run: those of one page one after another, in one folder. Commands in fences marked `sh` are held
to the parsers of what they start, and `inspect` runs. `text` marks what is shown and does not run: output, signatures,
diagrams, and commands with names that only a reader can fill in.
"""

import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.subprocesses import run_apart

import timm_autoslim
from timm_autoslim.__main__ import RECIPES, main
from timm_autoslim.recipes import run
from timm_autoslim.recipes.lib.configuration import parse_args, pick_values

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")),
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
]
SITE = "-m sphinx -W --keep-going -c docs . docs/_build"
TOOLS = (".venv/bin/pip", ".venv/bin/pre-commit")


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, *languages):
    """The fenced blocks of a page in these languages; "" are those without any."""
    fences = re.findall(r"^```([^`\n]*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for language, block in fences if language in languages]


def commands(page):
    """Every command of a page as its words; CONFIG=FILE lines are put in where $CONFIG stands."""
    lines, values = [], {}
    for line in re.sub(r"\\\n", " ", "\n".join(blocks(page, "sh", "bash", ""))).splitlines():
        assignment = re.fullmatch(r"([A-Z]+)=(\S+)", line)
        if assignment:
            values[f"${assignment[1]}"] = assignment[2]
            continue
        words = [values.get(word, word) for word in shlex.split(line, comments=True)]
        cuts = [-1, *(i for i, word in enumerate(words) if word == "&&"), len(words)]
        lines += [words[a + 1 : b] for a, b in itertools.pairwise(cuts) if words[a + 1 : b]]
    return lines


def is_runnable(page):
    """Whether the packages are installed that the Python of a page needs beside our own extras."""
    needs = re.findall(r"^<!-- needs: (.*) -->$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return all(importlib.util.find_spec(name) is not None for name in " ".join(needs).split())


def run_blocks(page):
    names = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


RUNNABLE = [page for page in PAGES if blocks(page, "python") and is_runnable(page)]


@pytest.mark.slow
@pytest.mark.xdist_group("apart")
@pytest.mark.parametrize("name", [name_of(page) for page in RUNNABLE])
def test_python_blocks_run(name, tmp_path):
    # apart: a page may register a rule, seed, or set threads
    done = run_apart(run_blocks, ROOT / name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_readme_shows_the_library_in_use():
    assert blocks(ROOT / "README.md", "python")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_hides_in_no_other_fence(page):
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"^```([^`\n]+)$", text, re.MULTILINE)) <= {"python", "sh", "text", "{eval-rst}"}
    assert len(re.findall(r"^```", text, re.MULTILINE)) % 2 == 0
    for block in blocks(page, "sh", "text", ""):
        assert not re.search(r"^(import|from) \w+", block, re.MULTILINE), f"mark it `python`, so that it runs:\n{block}"


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=name_of)
def test_commands_are_understood(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        scripts = [i for i, word in enumerate(words) if word.endswith((".py", ".sh"))]
        if scripts:
            check_script(words[scripts[0]], words[scripts[0] + 1 :])
        elif "timm_autoslim" in words:
            check_command(words[words.index("timm_autoslim") + 1 :])
            capsys.readouterr()
        else:
            assert words[:2] in (["pip", "install"], ["python3", "-m"]) or words[0] in TOOLS, words
    assert all((ROOT / word).exists() for words in commands(page) for word in words if word.startswith("recipes/"))


def check_command(words):
    """Hold the arguments of a command to the parser of its recipe; `inspect` runs."""
    if words[0] in RECIPES:
        check_script(f"recipes/{RECIPES[words[0]][0]}.py", words[1:])
    else:
        assert words[0] == "recipes" or main(words) == 0


def check_script(script, arguments):
    """Hold the arguments of a recipe to its own parser, and those of a benchmark to the flags in its text."""
    path = ROOT / script
    assert path.is_file(), script
    if path.parent.name == "benchmarks" or path.suffix == ".sh":
        text = path.read_text(encoding="utf-8")
        if "make_parser(" in text:  # which adds flags of its own
            text += (path.parent / "lib" / "results.py").read_text(encoding="utf-8")
        assert all(f'"{word}"' in text for word in arguments if word.startswith("--")), (script, arguments)
    elif path.stem == "run":
        cut = [i for i, word in enumerate(arguments) if word in {"-c", "--config", "--num-processes"}]
        left = [word for i, word in enumerate(arguments) if i not in cut and i - 1 not in cut]
        pick_values("train", run.read_flags(left))
    else:
        parse_args(path.stem, None, arguments)


def test_the_reference_describes_every_public_name_once():
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    described = re.findall(r"^\.\. auto(?:function|class|data):: (\w+)$", written, re.MULTILINE)
    assert sorted(described) == sorted(set(timm_autoslim.__all__) - {"AutoSlimError"})
    assert ".. automodule:: timm_autoslim.errors" in written


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    words = SITE.replace("docs/_build", str(tmp_path)).split()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "index.html").is_file()
    pages = [page.relative_to(ROOT).with_suffix(".html") for page in PAGES]
    assert [page for page in pages if not (tmp_path / page).is_file()] == []


def test_everybody_builds_the_site_by_the_same_command():
    for name in ("CONTRIBUTING.md", "docs/conf.py", ".github/workflows/docs.yml"):
        assert SITE in (ROOT / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_page_can_be_reached(page):
    """From README, by links alone."""
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        here = waiting.pop()
        if here in reached:
            continue
        reached.add(here)
        links = re.findall(r"\]\(([^)#]+\.md)", here.read_text(encoding="utf-8"))
        waiting += [(here.parent / link).resolve() for link in links if not link.startswith("http")]
    assert page in reached


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    files = re.findall(r"\b(?:recipes|tests|docs)/[\w/.]+\.(?:py|yaml|sh|md)\b", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in files if not (ROOT / name).exists()]
    assert not missing


def test_the_tables_are_where_contributing_says():
    rows = re.findall(
        r"^\| [\w ]+ \| `([A-Z_]+)` \| `([\w/.]+)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 10
    for table, file in rows:
        assert re.search(rf"^{table}: Table\[.*Table\(", (ROOT / file).read_text(), re.MULTILINE), (table, file)


def test_no_placeholder_is_left():
    for page in PAGES:
        assert "RESULT_" not in page.read_text(encoding="utf-8"), page


def test_inspect_prints_groups_reach_and_reasons(capsys):
    assert main(["inspect", "resnet10t", "--modules"]) == 0
    out = capsys.readouterr().out
    assert "10 groups" in out
    assert "at half width" in out
    assert "an output of the model" in out
    assert re.search(r"^ *[\d,]+ +[\d,]+  layer1\.0\.conv1$", out, re.MULTILINE)


def test_inspect_takes_torchvision_models(capsys):
    assert main(["inspect", "torchvision/squeezenet1_1", "--size", "64"]) == 0
    assert "features.3.squeeze" in capsys.readouterr().out


def test_inspect_refuses_an_unknown_model_by_name(capsys):
    assert main(["inspect", "resnet81"]) == 1
    captured = capsys.readouterr()
    assert "resnet81" in captured.err
    assert not captured.out


def test_every_public_name_has_a_docstring():
    assert timm_autoslim.__doc__
    for name in timm_autoslim.__all__:
        assert getattr(timm_autoslim, name).__doc__, name
