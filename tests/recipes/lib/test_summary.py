"""summary.csv has one row for each epoch, also after an interruption."""

import csv

from timm_autoslim.recipes.lib.summary import trim, write_epoch


def test_an_epoch_is_written_over_what_an_interrupted_run_left(tmp_path):
    path = tmp_path / "summary.csv"
    for epoch in (0, 1, 2):
        write_epoch(path, epoch, {"loss": epoch + 0.5}, {"top1": None if epoch == 1 else 10.0 * epoch}, 0.1)
    with path.open("a") as file:
        file.write("3,4.")  # killed in the middle of a row
    write_epoch(path, 1, {"loss": 7.0}, {"top1": 20.0}, 0.01)
    rows = list(csv.DictReader(path.open()))
    assert [(row["epoch"], row["train_loss"], row["eval_top1"], row["lr"]) for row in rows] == [
        ("0", "0.5", "0.0", "0.1"), ("1", "7.0", "20.0", "0.01")
    ]  # fmt: skip


def test_there_may_be_nothing_to_trim(tmp_path):
    trim(tmp_path / "summary.csv", 3)
    assert not list(tmp_path.iterdir())
