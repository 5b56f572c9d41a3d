"""The folders of the stages, and what an earlier command may have left in them."""

import argparse

import pytest
from helpers.searches import PRICES, charge, make_supernet

from timm_autoslim import cost, parse_budgets, plan_stages, search
from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.networks import write_results
from timm_autoslim.recipes.lib.stage_folders import check_plan, check_start, choose_start, find_first, name_folder

SUPERNET = make_supernet()


def make_plan(*texts):
    return plan_stages(parse_budgets(SUPERNET, list(texts)), cost(SUPERNET))


def write_search(folder, text):
    folder.mkdir(exist_ok=True)
    write_results(folder, {"searched": search(SUPERNET, [text], charge(SUPERNET, **PRICES), steps=4)})


def test_the_first_stage_lies_in_the_runs_own_folder_and_others_beneath(tmp_path):
    plan = make_plan("macs<=60%", "macs<=40% and params<=50%")
    assert find_first(tmp_path, plan) == plan[0].budget
    assert name_folder(tmp_path, plan[0].budget, first=True) == tmp_path
    assert name_folder(tmp_path, plan[-1].budget, first=False) == tmp_path / "to-macs-40pct-params-50pct"


def test_a_stage_that_starts_from_a_network_has_its_weights_and_the_original_as_teacher(tmp_path):
    plan = make_plan("macs<=60%", "macs<=40%")
    source = tmp_path / "exported" / "macs-60pct-searched"
    source.mkdir(parents=True)
    (source / "model.safetensors").write_bytes(b"weights")
    args = argparse.Namespace(
        teacher="original", epochs=3, model="resnet10t", pretrained=True, model_kwargs={"depth": 1}
    )
    first, folder = choose_start(args, tmp_path, plan[0], None, first=True)
    assert (first.model, first.teacher, first.start_sha256, folder) == ("resnet10t", str(tmp_path), None, tmp_path)
    second, folder = choose_start(args, tmp_path, plan[-1], source, first=False)
    assert (second.model, second.model_kwargs) == (f"local-dir:{source}", {})
    assert len(second.start_sha256) == 64
    assert second.run == str(folder) == str(tmp_path / "to-macs-40pct")


def test_a_folder_of_another_budget_is_refused(tmp_path):
    plan = make_plan("macs<=60%", "macs<=40%")
    check_plan(tmp_path, plan)
    write_search(tmp_path / "to-macs-40pct", "macs<=40%")
    with pytest.raises(
        ConfigError, match=r"to-macs-40pct holds .* of macs<=40%, cut before there was one of macs<=60%"
    ):
        check_plan(tmp_path, plan)
    write_search(tmp_path, "macs<=60%")
    check_plan(tmp_path, plan)
    write_search(tmp_path / "to-macs-40pct", "macs<=50%")
    with pytest.raises(ConfigError, match="holds the network of macs<=50%, and none of macs<=40%: give the --budgets"):
        check_plan(tmp_path, plan)


def test_a_folder_that_was_cut_from_another_model_is_refused(tmp_path):
    budget = make_plan("macs<=60%")[0].budget
    args = argparse.Namespace(start_sha256="b" * 64)
    check_start(args, tmp_path, budget)
    write_search(tmp_path, "macs<=60%")
    check_start(args, tmp_path, budget)
    (tmp_path / "args.yaml").write_text(f"model: local-dir:there/half\ndata_dir: null\nstart_sha256: {'a' * 64}\n")
    with pytest.raises(ConfigError, match="holds the network of macs<=60%, cut from half: give"):
        check_start(args, tmp_path, budget)
