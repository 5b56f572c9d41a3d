"""The report of a run: one page that stands on its own, its figures, and its refusals."""

import base64
import json
import re
from dataclasses import replace

import pytest
from helpers.searches import held_out, make_supernet, rename_method

from timm_autoslim import SearchResult, baseline, search
from timm_autoslim.__main__ import main
from timm_autoslim.errors import ArtifactError
from timm_autoslim.slimming import report
from timm_autoslim.slimming.report import read_results
from timm_autoslim.supernet.widths import Widths, hash_groups

BUDGETS = ["macs<=60%", "macs<=30%"]
METHODS = ["searched", "uniform", "random"]


@pytest.fixture(scope="module")
def results():
    supernet = make_supernet()
    evaluate = held_out(supernet)
    found = [search(supernet, BUDGETS, evaluate)]
    return [*found, *(baseline(supernet, BUDGETS, evaluate, method, candidates=3) for method in METHODS[1:])]


@pytest.fixture
def run(tmp_path, results):
    """Return a run folder with the results of three methods."""
    for result in results:
        replace(result, base="<Branches>", seconds=1.5).save(tmp_path / "search" / f"{result.method}.json")
    return tmp_path


@pytest.fixture
def no_pictures(monkeypatch):
    """Draw the figures, but leave out what takes most of the time of a report: their pixels."""
    monkeypatch.setattr(report, "render_svg", lambda figure: b'<svg width="576pt">')


def in_folder(run):
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


FILES = ["search/random.json", "search/searched.json", "search/uniform.json"]


def test_the_page_holds_the_figures_and_the_numbers(run, results, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    names = ["widths", "descent", "losses", "modules"]
    assert sorted(path.stem for path in (run / "report").iterdir()) == sorted(names)
    assert [base64.b64decode(p) for p in pictures] == [(run / "report" / f"{n}.svg").read_bytes() for n in names]
    for name in names:
        assert (run / "report" / f"{name}.svg").read_bytes().startswith(b"<?xml")
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "&lt;Branches&gt;" in page
    assert 'name="viewport"' in page
    widths = re.findall(r'style="min-width: (\d+)px; max-width: (\d+)px"', page)  # readable on a phone, not blown up
    assert len(widths) == len(names)
    assert all(600 < int(least) < int(most) < 1080 for least, most in widths)
    original = next(r for r in page.split("<tr") if "<td>original</td>" in r)
    assert f"<td>{results[0].widest_loss:.4f}</td>" in original
    for result in results:
        for network in result.networks:
            row = next(r for r in page.split("<tr") if f"<td>{network.loss:.4f}</td>" in r and result.method in r)
            assert f"<td>{network.text.replace('<', '&lt;')}</td>" in row
            assert f"{100 * network.cost.macs / network.budget:.1f} %" in row
    assert "searched (mode fast, rank per_cost, steps 5, refine units, seed 0): " in page
    assert f"{results[0].evaluations} subnets scored on up to 10 held-out images in 2 s;" in page
    assert "test top-1" not in page
    assert "error" not in page


def test_results_come_searched_first_then_as_the_baselines_are_listed(run):
    assert read_results(run) == [SearchResult.load(run / "search" / f"{method}.json") for method in METHODS]


def test_a_search_that_went_on_from_a_network_is_on_the_same_page(tmp_path, results, no_pictures):
    first = replace(results[0], networks=results[0].networks[:1])
    sizes = first.networks[0].widths.to_dict()
    dropped = first.groups[-1].name  # which had nothing left to lose
    groups = tuple(
        replace(g, size=sizes[g.name], choices=(1, sizes[g.name]), floor=1) for g in first.groups if g.name != dropped
    )
    widths = Widths(tuple(1 for _ in groups), groups, hash_groups(groups))
    second = replace(results[0].networks[1], widths=widths)
    steps = tuple(replace(step, group=groups[0].name, width=1) for step in results[0].steps[:2])
    later = replace(results[0], networks=(second,), groups=groups, steps=steps)
    first.save(tmp_path / "search" / "searched.json")
    later.save(tmp_path / "to-macs-30pct" / "search" / "searched.json")
    (joined,) = read_results(tmp_path)
    assert joined.names == results[0].names
    assert joined.networks[1].widths.to_dict() == {**dict.fromkeys(sizes, 1), dropped: sizes[dropped]}
    assert [step.index for step in joined.steps] == list(range(len(first.steps) + 2))
    assert joined.evaluations == 2 * first.evaluations
    assert main(["report", str(tmp_path)]) == 0
    assert "macs&lt;=30%" in (tmp_path / "report.html").read_text()
    wider = tuple(replace(g, size=g.size + 1) for g in groups)
    replace(
        later, groups=wider, networks=(replace(second, widths=Widths(widths.values_, wider, hash_groups(wider))),)
    ).save(tmp_path / "to-macs-30pct" / "search" / "searched.json")
    with pytest.raises(ArtifactError, match="a search of another supernet; needed: a search that went on from"):
        read_results(tmp_path)


def write_test(run, name, **row):
    folder = run / "exported" / name
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(row))


@pytest.mark.usefixtures("no_pictures")
def test_accuracies_are_shown_where_there_are_some(run, results):
    uniform = {"method": "uniform", "budget": BUDGETS[0], "macs": 5, "params": 6}
    write_test(run, "macs-60pct-uniform", **uniform, top1=76.54321, widths=results[1].networks[0].widths.to_dict())
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.count("76.54 %") == 1
    assert page.count("test top-1") == 1
    assert "earlier searches" not in page


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_fine_tuned_networks_of_earlier_searches_stay(run, results):
    row = {"budget": "macs<=50%", "macs": 5, "params": 6, "top1": 76.54321}
    write_test(run, "macs-50pct-searched", **row, method="searched", widths={"a": 1})
    other = results[1].networks[1].widths.to_dict()
    write_test(run, "macs-60pct-uniform", **row | {"top1": 12.3}, method="uniform", widths=other)
    assert main(["report", str(run)]) == 0
    numbers, further = (run / "report.html").read_text().split("Fine-tuned networks of earlier searches")
    assert "76.54 %" in further
    assert "macs-60pct-uniform" in further  # of the same name, but another network
    assert "12.30 %" in further
    assert "top-1" not in numbers


def test_baselines_alone_have_no_descent(run):
    (run / "search" / "searched.json").unlink()
    assert main(["report", str(run)]) == 0
    assert not (run / "report" / "descent.svg").exists()
    assert "The descent" not in (run / "report.html").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_of_several_limits_the_one_that_is_used_most_counts(tmp_path, results):
    network = results[0].networks[0]
    most = max(network.cost.macs, network.cost.params) * 1.01
    limits = [{"params": most, "macs": most}, {"macs": most, "params": most}]
    networks = [replace(network, text=f"budget {i}", limits=both) for i, both in enumerate(limits)]
    replace(results[0], networks=tuple(networks)).save(tmp_path / "search" / "searched.json")
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text().count("<td>99.0 %</td>") == 2


GOOD = {"method": "uniform", "budget": "macs<=60%", "macs": 5, "params": 6, "top1": 7.5, "widths": {"a": 1}}
BAD = {"method": 1, "budget": None, "macs": -1, "params": 1.5, "top1": "good", "widths": [1]}
BROKEN = ["{", "[]", "{}", "\x00", *(json.dumps(GOOD | {key: value}) for key, value in BAD.items())]


@pytest.mark.parametrize("text", BROKEN)
def test_broken_accuracies_are_told_and_nothing_is_written(run, capsys, text):
    write_test(run, "a")
    (run / "exported" / "a" / "result.json").write_text(text)
    assert main(["report", str(run)]) == 1
    message = capsys.readouterr().err
    assert "result.json" in message
    assert "needed: " in message
    assert in_folder(run) == ["exported/a/result.json", *FILES]


@pytest.mark.parametrize("name", ["report", "report.html"])
@pytest.mark.usefixtures("no_pictures")
def test_what_stands_in_the_way_of_the_report_is_kept(run, capsys, name):
    if name == "report":
        (run / name).write_text("mine")
    else:
        (run / name).mkdir()
    assert main(["report", str(run)]) == 1
    assert re.search(r"the report cannot be written \(.*move away what is there", capsys.readouterr().err)
    assert sorted(path.name for path in run.iterdir()) == sorted([name, "search"])


def test_a_folder_that_is_not_there_is_told_as_that(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: got no folder that is here; needed: the run folder of a search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"got a folder without search/\*\.json; needed: the run folder of a search"),
        ("{", r"searched\.json: got no JSON that can be read"),
        ("[]", r"searched\.json: got \[\]; needed: an object"),
        ('{"format": 2, "networks": [1]}', r"searched\.json\.format: got 2; needed: format 1"),
        ('{"format": 1, "networks": []}', r"searched\.json: got no 'method'"),
    ],
)
def test_other_folders_are_refused_and_nothing_is_written(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "search").mkdir()
        (tmp_path / "search" / "searched.json").write_text(text)
    assert main(["report", str(tmp_path)]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert in_folder(tmp_path) == (["search/searched.json"] if text else [])


def test_results_of_two_supernets_are_refused(run, results):
    groups = (*results[0].groups[:-1], replace(results[0].groups[-1], divisor=4))
    rename_method(results[0], "other", groups=groups).save(run / "search" / "zzz.json")
    with pytest.raises(ArtifactError, match=r"zzz\.json: got a result of another supernet; needed: one of the same"):
        read_results(run)
