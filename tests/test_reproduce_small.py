"""The reproduction in the small: what makes a cell, how it is kept, and what a table says of it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit.errors import InputError
from benchmarks.reproduction import comparison
from benchmarks.reproduction.comparison import ReproductionConfig, cell_key, collect, in_order, report, run, scores_of
from benchmarks.reproduction.jobs import UNLABELLED, Jobs
from benchmarks.reproduction.settings import COLUMNS, CPU, PRESETS, QUICK, ROWS
from benchmarks.reproduction.table import NOT_MEASURED, compare, findings, markdown, table_cell

ROOT = Path(__file__).parents[1]
TWO_SEEDS = replace(CPU, seeds=(3, 4))
FEW_IMAGES = replace(QUICK.images, scenes=8, crops=7, labelled_scenes=16, held_out_scenes=4)


@pytest.fixture
def calls(monkeypatch):
    """Takes the place of all training; every score is the number of those before it."""
    made = []

    def score(jobs, column, row, settings=None):
        made.append((jobs.seed, row, column))
        return float(len(made))

    monkeypatch.setattr(Jobs, "backbone", lambda jobs, row: "")
    monkeypatch.setattr(Jobs, "score", score)
    return made


def test_all_cells_are_made_once_seed_by_seed(calls, tmp_path):
    run(TWO_SEEDS, tmp_path)
    assert calls == [(seed, row, column) for seed in (3, 4) for row in ROWS for column in COLUMNS]
    run(TWO_SEEDS, tmp_path)
    assert len(calls) == len(set(calls))


def test_a_stopped_run_goes_on_where_it_was(calls, tmp_path, monkeypatch):
    def stop(jobs, row):
        if len(calls) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(Jobs, "backbone", stop)
    with pytest.raises(KeyboardInterrupt):
        run(TWO_SEEDS, tmp_path)
    first = list(calls)
    monkeypatch.setattr(Jobs, "backbone", lambda jobs, row: "")
    run(TWO_SEEDS, tmp_path)
    assert len(first) == 7
    assert calls == [(seed, row, column) for seed in (3, 4) for row in ROWS for column in COLUMNS]


def test_time_over_no_other_cell_begins(calls, tmp_path, monkeypatch):
    clock = iter(range(0, 100_000, 20))  # every look at it is 20 seconds later
    monkeypatch.setattr(comparison.time, "monotonic", lambda: float(next(clock)))
    run(TWO_SEEDS, tmp_path, minutes=3)
    assert 1 < len(calls) < 10


def test_a_setting_makes_the_cells_that_depend_on_it_anew(calls, tmp_path):
    run(TWO_SEEDS, tmp_path)
    calls.clear()
    probe = {start: {**recipe, "lr": 0.5} for start, recipe in CPU.probe.items()}
    run(replace(TWO_SEEDS, probe=probe), tmp_path)
    assert {column for _, _, column in calls} == {"linear"}
    calls.clear()
    run(replace(TWO_SEEDS, pretraining={**CPU.pretraining, "epochs": 11}), tmp_path)
    assert {row for _, row, _ in calls} == set(ROWS) - {"scratch"}  # from scratch nothing is pre-trained
    calls.clear()
    run(replace(TWO_SEEDS, machine={"device": "cuda"}), tmp_path)
    assert calls == []


def test_no_two_cells_share_a_key(tmp_path):
    keys = [cell_key(*place) for place in in_order(CPU, tmp_path)]
    assert len(keys) == len(CPU.seeds) * len(ROWS) * len(COLUMNS)
    assert len(set(keys)) == len(keys)


def test_scratch_and_pretrained_rows_get_their_own_recipe_and_the_same_length(tmp_path):
    for preset in PRESETS.values():
        jobs = Jobs(tmp_path, preset, 0)
        for column, length in (("finetune", "epochs"), ("segment", "max_steps")):
            recipes = [jobs.evaluation(column, row) for row in ROWS]
            assert len({recipe[length] for recipe in recipes}) == 1
            assert recipes[1:] == [recipes[1]] * (len(ROWS) - 1)
        assert preset.tuning_seed not in preset.seeds


def test_the_table_has_what_is_there_and_says_what_is_not(calls, tmp_path):
    run(replace(TWO_SEEDS, seeds=(3,)), tmp_path)
    first = collect("cpu", TWO_SEEDS, tmp_path)
    first["cells"] = [cell for cell in first["cells"] if (cell["row"], cell["column"]) != ("pixels", "knn")]
    text = report(first)
    assert "| from scratch | 1.0 (1 of 2 seeds) | 2.0 (1 of 2 seeds) |" in text
    pixels = next(line for line in text.splitlines() if line.startswith("| BEiT, pixels"))
    assert pixels.split(" | ")[3] == NOT_MEASURED
    assert json.loads(json.dumps(first))["settings"]["pretraining"] == CPU.pretraining


def test_scores_are_in_the_order_of_the_seeds():
    cells = [{"row": "beit", "column": "knn", "seed": seed, "score": float(seed)} for seed in (1, 9, 4)]
    assert scores_of({"cells": cells, "seeds": [9, 4, 1]}) == {("beit", "knn"): [9.0, 4.0, 1.0]}


def test_mean_and_deviation_of_a_cell():
    scores = [50.0, 54.0, 55.0]
    assert table_cell(scores, 3) == f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}" == "53.0 ± 2.6"
    assert table_cell([50.0], 3) == "50.0 (1 of 3 seeds)"
    assert table_cell([], 3) == NOT_MEASURED


def test_a_comparison_is_in_pooled_deviations():
    beit, other = [60.0, 64.0, 65.0], [50.0, 51.0, 70.0]
    found = compare(beit, other)
    pooled = np.sqrt((np.var(beit, ddof=1) + np.var(other, ddof=1)) / 2)
    assert found.difference == pytest.approx(6)
    assert found.deviations == pytest.approx(6 / pooled)
    assert (found.wins, found.seeds) == (2, 3)
    assert found.verdict() == "no difference beyond one standard deviation"
    assert compare(beit, [50.0, 51.0, 52.0]).verdict() == "BEiT ahead"
    assert compare([50.0, 51.0, 52.0], beit).verdict() == "BEiT behind"


def test_one_seed_shows_no_deviation_and_none_at_all_is_handled():
    assert compare([60.0], [50.0]).verdict() == "cannot be told from one seed"
    assert compare([60.0, 60.0], [50.0, 50.0]).deviations == math.inf
    assert compare([60.0, 60.0], [60.0, 60.0]).verdict() == "no difference beyond one standard deviation"


def test_findings_compare_beit_with_every_other_row():
    scores = {(row, column): [50.0, 51.0] for row in ROWS for column in COLUMNS}
    scores["beit", "segment"] = [60.0, 61.0]
    del scores["pixels", "linear"]
    lines = findings(scores).splitlines()[2:]
    assert len(lines) == (len(ROWS) - 1) * len(COLUMNS)
    assert all("BEiT ahead" in line for line in lines if "mIoU" in line)
    assert [line for line in lines if NOT_MEASURED in line] == [
        f"| BEiT, pixels as targets | linear probe, top-1 | | | | {NOT_MEASURED} |"
    ]
    assert len(markdown(scores, 2).splitlines()) == 2 + len(ROWS)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(tmp_path_factory.mktemp("jobs"), replace(QUICK, images=FEW_IMAGES), 0)


def test_unlabelled_images_hold_nothing_that_is_held_out(jobs):
    folder = jobs.images()
    listed = [folder / line for line in (folder / UNLABELLED).read_text(encoding="utf-8").splitlines()]
    assert len(listed) == 16 + 8 + 7 + len(list((folder / "digits" / "train").rglob("*.png")))
    held_out = [*(folder / "scenes/images/validation").iterdir(), *(folder / "digits/val").rglob("*.png")]
    pixels = {np.asarray(Image.open(path).convert("RGB")).tobytes() for path in listed}
    same = [path for path in held_out if np.asarray(Image.open(path).convert("RGB")).tobytes() in pixels]
    assert held_out
    assert not same


def test_few_labels_are_some_of_the_training_digits_the_same_each_time(jobs):
    digits = jobs.images() / "digits"
    few = sorted(path.relative_to(digits / jobs.few_labels(5)) for path in (digits / jobs.few_labels(5)).rglob("*.png"))
    assert [sum(path.parts[0] == str(digit) for path in few) for digit in range(10)] == [5] * 10
    assert all((digits / "train" / path).exists() for path in few)


def test_the_table_takes_its_place_in_a_page_and_nothing_else_changes(calls, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "cpu", TWO_SEEDS)
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("before\n<!-- measured -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    flags = {"output_dir": str(tmp_path), "results": str(results), "page": str(page)}
    comparison.main(ReproductionConfig(**flags))
    table = report(json.loads(results.read_text(encoding="utf-8")))
    assert page.read_text(encoding="utf-8") == f"before\n<!-- measured -->\n{table}<!-- end -->\nafter\n"
    comparison.main(ReproductionConfig(**flags, table=True))
    assert page.read_text(encoding="utf-8") == f"before\n<!-- measured -->\n{table}<!-- end -->\nafter\n"
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(InputError, match="measured"):
        comparison.main(ReproductionConfig(**flags, table=True))


def test_the_page_in_docs_is_that_of_the_results():
    results = ROOT / "benchmarks" / "results" / "reproduce_small.json"
    page = (ROOT / "docs" / "reproduction_small.md").read_text(encoding="utf-8")
    assert report(json.loads(results.read_text(encoding="utf-8"))) in page


def test_a_mistake_gives_one_line(tmp_path):
    with pytest.raises(InputError, match="--minutes"):
        comparison.main(ReproductionConfig(minutes=-1, output_dir=str(tmp_path)))


@pytest.mark.slow
def test_every_column_runs_with_and_without_pretraining(tmp_path, monkeypatch, capsys):
    tiny = replace(
        QUICK,
        images=FEW_IMAGES,
        model={**QUICK.model, "embed_dim": 32, "num_heads": 2},
        dvae={**QUICK.dvae, "hidden_dim": 8},
        segmentation={start: {**recipe, "max_steps": 2} for start, recipe in QUICK.segmentation.items()},
        rows=("scratch", "pixels", "beit_v2"),
        labels_per_class=4,
        seeds=(0,),
    )
    monkeypatch.setitem(PRESETS, "quick", tiny)
    results = tmp_path / "results.json"
    comparison.main(ReproductionConfig(quick=True, output_dir=str(tmp_path), results=str(results)))
    cells = json.loads(results.read_text())["cells"]
    assert len(cells) == 3 * len(COLUMNS)
    assert all(0 <= cell["score"] <= 100 for cell in cells)
    assert "| from scratch | " in capsys.readouterr().out
