"""The pages that recipes and runs are written out on: ``docs/reproducing.md``, the FAQ, the page about pictures."""

import importlib
import importlib.util
import json
import re
import shlex
import statistics
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest

from beit.__main__ import COMMANDS
from beit.commands.recipes import command, read_recipe
from beit.config import read_command_line, read_facts, recipe_names
from beit.tasks.settings import LinearProbeConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def writer():
    """The script that writes ``docs/reproducing.md``."""
    spec = importlib.util.spec_from_file_location("write_reproducing", ROOT / "docs" / "write_reproducing.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(writer):
    return writer.document()


class TestDocument:
    def test_is_current(self, writer):
        # Broken by a recipe that was changed and not written out: run docs/write_reproducing.py.
        for name, v2 in writer.PAGES.items():
            assert (ROOT / "docs" / name).read_text(encoding="utf-8") == writer.document(v2)

    def test_has_every_recipe_and_a_command_of_each_task(self, text, writer):
        both = text, writer.document(v2=True)
        for name in recipe_names():
            assert [f"`{name}`" in page for page in both].count(True) == 1
        for name in (*writer.EXAMPLES.values(), "vqkd_1x768x12_clip", "pretrain_v2_base_1600ep"):
            recipe = read_recipe(name)
            assert command(recipe, recipe.gpus) in "".join(both)
        assert all(len(page.splitlines()) <= 250 for page in both)

    @pytest.mark.parametrize(
        ("name", "cells"),
        [
            # Typed from the sources.
            ("pretrain_base_1k_300ep", ["2048", "0.0015", "train_loss 6.299, train_mlm_acc 0.0496"]),
            ("finetune_base_pt22k_224", ["1024", "0.004", "100 epochs", "acc1 83.7, acc5 96.6"]),
            ("finetune_large_22k", ["2048", "0.002", "90 epochs", "acc1 87.396, acc5 98.282"]),
            ("segment_base_640_pt2ft", ["16", "160k steps", "mIoU 53.61, mAcc 64.82, aAcc 84.62"]),
            ("segment_large_640_ms", ["mIoU 57.0"]),
            ("linear_probe_large", ["1024", "50 epochs", "acc1 73.5"]),
        ],
    )
    def test_has_the_published_numbers(self, name, cells, text):
        row, *_ = rows_of(text, f"`{name}`")
        for cell in cells:
            assert any(there.startswith(cell) or there.endswith(cell) for there in row), cell

    def test_does_not_mix_the_heads_of_the_ablations(self, text):
        (head,) = rows_of(text[text.index("## Ablations") :], "recipe")
        (row,) = rows_of(text, "`pretrain_ablation_layer_scale`")
        columns = [next(i for i, cell in enumerate(head) if cell.endswith(end)) for end in ("SETR-PUP", "UPerNet")]
        assert [row[column] for column in columns] == ["", "mIoU 45.43"]
        (reference,) = rows_of(text, "`pretrain_ablation_beit`")
        assert [reference[column] for column in columns] == ["mIoU 44.65", "mIoU 44.86"]

    def test_says_what_cannot_be_run(self, text):
        outside = text.partition("## Published results without a recipe")[2]
        assert all(number in outside for number in ("81.67", "36.73", "84.6", "86.3", "45.6", "47.7"))


def rows_of(text, first):
    """The rows of a page's tables that begin with a cell: the other cells of each."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [row[1:] for row in rows if row[0] == first]


class TestFaq:
    TEXT = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8").replace("\\\n", " ")
    MEASURED = json.loads((ROOT / "docs" / "measured" / "demo.json").read_text(encoding="utf-8"))

    def test_quotes_the_authors_log_as_the_recipe_does(self):
        quoted = read_facts("pretrain_base_1k_300ep")["quoted"]
        for key in ("train_loss", "train_mlm_acc", "train_grad_norm"):
            row, *_ = rows_of(self.TEXT, f"`{key}`")
            assert row[0] == str(quoted[key])

    @pytest.mark.parametrize(
        "key", ["train_loss", "train_mlm_acc", "train_grad_norm", "test_mlm_acc", "test_most_frequent_acc"]
    )
    def test_shows_the_last_epoch_as_measured(self, key):
        # Broken by a number of the table that no run gave.
        row, *_ = rows_of(self.TEXT.replace("`, held-out images |", "` |"), f"`{key}`")
        assert row[1] == rounded_like(row[1], [*self.MEASURED["pretraining"].values()][-1][key])

    @pytest.mark.parametrize("key", ["train_loss", "test_loss", "test_mlm_acc"])
    def test_shows_epochs_as_measured(self, key):
        (epochs,) = rows_of(self.TEXT, "epoch")
        assert len(epochs) == 6
        row = rows_of(self.TEXT, f"`{key}`")[-1]
        for epoch, shown in zip(epochs, row, strict=True):
            measured = self.MEASURED["pretraining"][epoch].get(key)
            assert shown == ("" if measured is None else rounded_like(shown, measured))

    def test_tells_of_the_tasks_as_measured(self):
        summary = self.MEASURED["summary"]
        digits, tuned = summary["knn_acc1"]["digits"], summary["finetuning_acc1"]
        text = " ".join(self.TEXT.split())
        for sentence in (
            f"k-NN on frozen features {digits['pretrained']:.1f} % against {digits['untrained']:.1f} %",
            f"fine-tuning for {self.MEASURED['fine_tuning_epochs']} epochs {tuned['pretrained']:.1f} % "
            f"against {tuned['scratch']:.1f} % from scratch",
            f"it reaches {100 * summary['masked_token_accuracy']:.1f} %, against "
            f"{100 * summary['most_frequent_token_accuracy']:.1f} % for the most frequent token",
            f"256 tokens, perplexity {summary['codebook_perplexity']:.0f}",
        ):
            assert sentence in text
        assert f"{self.MEASURED['pretraining']['1']['n_parameters']:,}" in text


def test_readmes_table_is_that_of_the_measured_seeds():
    runs = TestFaq.MEASURED["seeds"]["runs"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for row, decimals, ours, baseline in (
        ("loss of masked tokens", 2, ("masked_token_loss",), ("unigram_entropy",)),
        ("masked-token accuracy", 1, ("masked_token_accuracy",), ("most_frequent_token_accuracy",)),
        ("k-NN on", 1, ("knn_acc1", "digits", "pretrained"), ("knn_acc1", "digits", "untrained")),
        ("fine-tuning on", 1, ("finetuning_acc1", "pretrained"), ("finetuning_acc1", "scratch")),
        ("segmentation of", 1, ("mIoU", "pretrained"), ("mIoU", "scratch")),
        ("the tokenizer's reconstructions", 1, ("psnr",), None),
    ):
        (line,) = re.findall(rf"^\| {row}.*$", text, re.MULTILINE)
        for cell, keys in zip(line.split(" | ")[1:], (ours, baseline), strict=True):
            if keys:
                found = [reduce(getitem, keys, {**run["summary"], **run["segmentation"]}) for run in runs]
                found = [100 * value if keys[0] == "mIoU" or keys[0].endswith("accuracy") else value for value in found]
                assert cell.startswith(
                    f"{statistics.mean(found):.{decimals}f} ± {statistics.stdev(found):.{decimals}f}"
                )


def rounded_like(shown, number):
    """A number with as many decimals as another one is shown with."""
    return f"{number:.{len(shown.partition('.')[2])}f}"


def test_the_page_on_pictures_has_every_command():
    text = (ROOT / "docs" / "visualization.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^beit (visualize \w+) ", text, re.MULTILINE))
    assert shown == {name for name in COMMANDS if name.startswith("visualize ")}


def test_the_papers_linear_probe_is_shown():
    # Breaks when a flag of appendix D of the paper is lost; tests/test_docs.py parses all commands.
    text = (ROOT / "docs" / "linear_probe.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (words,) = re.findall(r"run_linear_eval\.py (--config linear_probe_base --epochs 50 .*)$", text, re.MULTILINE)
    paper = read_command_line(LinearProbeConfig, shlex.split(words), "docs", "")
    assert (paper.epochs, paper.lr, paper.weight_decay, paper.pool, paper.layers) == (50, 4e-3, 1e-4, ("mean",), (8,))
    assert (paper.rel_pos_bias, paper.abs_pos_emb, paper.layer_scale_init_value) == (False, True, 0)
