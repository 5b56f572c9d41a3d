"""The report of a search: one page that stands on its own, its figures, and its refusals."""

import base64
import json
import re

import pytest
from helpers.searches import held_out, make_supernet
from PIL import Image

from timm_autoslim import baseline, cost, search
from timm_autoslim.__main__ import main
from timm_autoslim.costs.cost import cost_by_module

BUDGETS = {"macs": ["60%", "30%"]}
KINDS = ["searched", "uniform", "random"]


@pytest.fixture
def run(tmp_path):
    """Return a run folder with a search.json as the recipe writes it."""
    supernet = make_supernet()
    evaluate = held_out(supernet)
    found = {"searched": search(supernet, BUDGETS, evaluate)}
    found |= {kind: baseline(supernet, BUDGETS, evaluate, kind, candidates=3) for kind in KINDS[1:]}
    networks = [
        {**r.networks[i].to_dict(), "kind": kind, "asked": share, "name": f"{share}-{kind}",
         "layers": cost_by_module(supernet, r.networks[i].widths)}
        for i, share in enumerate(BUDGETS["macs"]) for kind, r in found.items()
    ]  # fmt: skip
    whole = cost(supernet)
    content = {
        "format": 1, "model": "<Branches>", "mode": "fast", "rank": "per_cost", "images": 10, "seconds": 1.5,
        "groups": {g.name: g.size for g in supernet.space.groups},
        "widest": {"macs": whole.macs, "params": whole.params, "layers": cost_by_module(supernet)},
        **found["searched"].to_dict(), "networks": networks,
    }  # fmt: skip
    (tmp_path / "search.json").write_text(json.dumps(content))
    return tmp_path


def test_the_page_holds_the_figures_and_the_numbers(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    names = ["widths", "descent", "pareto", "layers"]
    assert sorted(path.stem for path in (run / "report").iterdir()) == sorted(names)
    assert [base64.b64decode(p) for p in pictures] == [(run / "report" / f"{n}.png").read_bytes() for n in names]
    for name in names:
        with Image.open(run / "report" / f"{name}.png") as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "&lt;Branches&gt;" in page
    networks = json.loads((run / "search.json").read_text())["networks"]
    for network in networks:
        row = next(r for r in page.split("<tr") if f"<td>{network['error']:.4f}</td>" in r and network["kind"] in r)
        assert f"<td>macs {network['asked']}</td>" in row
        assert f"{100 * network['macs'] / network['budget']:.1f} %" in row
    assert "test top-1" not in page


def test_accuracies_are_shown_where_there_are_some(run):
    (run / "results.json").write_text(json.dumps({"60%-uniform": {"top1": 76.54321}}))
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.count("76.54 %") == 1
    assert "test top-1" in page


def test_a_search_without_steps_has_no_descent(run):
    content = json.loads((run / "search.json").read_text()) | {"steps": []}
    (run / "search.json").write_text(json.dumps(content))
    assert main(["report", str(run)]) == 0
    assert not (run / "report" / "descent.png").exists()
    assert "The descent" not in (run / "report.html").read_text()


def test_of_several_limits_the_one_that_is_used_most_counts(run):
    content = json.loads((run / "search.json").read_text())
    network = content["networks"][0]
    both = max(network["macs"], network["params"]) * 1.01  # the same number for either
    content["networks"] = [
        network | {"unit": "params and macs", "asked": "1M and 1M", "budget": both, "limits": limits}
        for limits in ({"params": both, "macs": both}, {"macs": both, "params": both})
    ]
    (run / "search.json").write_text(json.dumps(content))
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text().count("<td>99.0 %</td>") == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {}}', '{"a": {"top1": "good"}}', "\x00"])
def test_broken_results_are_told_and_nothing_is_written(run, capsys, text):
    (run / "results.json").write_text(text)
    assert main(["report", str(run)]) == 1
    assert re.search(r"results\.json is no .*; remove it to do without accuracies", capsys.readouterr().err)
    assert sorted(path.name for path in run.iterdir()) == ["results.json", "search.json"]


def test_zeros_that_would_divide_are_told_and_nothing_is_written(run, capsys):
    content = json.loads((run / "search.json").read_text())
    networks = content["networks"]
    for change in (
        {"groups": dict.fromkeys(content["groups"], 0)},
        {"networks": [n | {"limits": dict.fromkeys(n["limits"], 0)} for n in networks]},
    ):
        (run / "search.json").write_text(json.dumps(content | change))
        assert main(["report", str(run)]) == 1
        assert "does not hold what the report shows (ZeroDivisionError: " in capsys.readouterr().err
        assert [path.name for path in run.iterdir()] == ["search.json"]


@pytest.mark.parametrize("name", ["report", "report.html"])
def test_what_stands_in_the_way_of_the_report_is_kept(run, capsys, name):
    if name == "report":
        (run / name).write_text("mine")
    else:
        (run / name).mkdir()
    assert main(["report", str(run)]) == 1
    assert re.search(r"the report cannot be written \(.*move away what is there", capsys.readouterr().err)
    assert sorted(path.name for path in run.iterdir()) == sorted([name, "search.json"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"holds no search\.json; needed: the run folder of a finished search"),
        ("{", r"search\.json is no JSON that can be read"),
        ("[]", r"is no search of a known format"),
        ('{"format": 2, "networks": [1]}', r"is no search of a known format"),
        ('{"format": 1, "networks": []}', r"with at least one network"),
        ('{"format": 1, "networks": [{"kind": "searched"}]}', r"does not hold what the report shows \(KeyError: "),
    ],
)
def test_other_folders_are_refused_and_nothing_is_written(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "search.json").write_text(text)
    assert main(["report", str(tmp_path)]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == (["search.json"] if text else [])
