"""`beit report`: what a run folder holds is on the page, as text, and nothing is fetched to show it."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from beit.__main__ import main as beit
from beit.commands.recipes import read_recipe
from beit.commands.report import main, read_run, read_runs, render
from beit.commands.settings import ReportConfig
from beit.config import dump_yaml
from beit.errors import InputError
from beit.tasks.settings import DvaeConfig, FinetuningConfig, LinearProbeConfig, PretrainingConfig, VqkdConfig
from beit.visualization.plots import draw_curves

ENVIRONMENT = {"torch": "2.9.9+test", "device": "GPU of the test", "processes": 8}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"'&"
VOID = {"br", "hr", "img", "input", "link", "meta"}
SPACE = "\N{NO-BREAK SPACE}"


class Reader(HTMLParser):
    """Reads a page as a browser does; what is opened must be closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """Draws the same curves, which most pages here show, only once."""
    drawn = {}

    def draw(path, curves):
        if repr(curves) not in drawn:
            draw_curves(path, curves)
            drawn[repr(curves)] = path.read_bytes()
        path.write_bytes(drawn[repr(curves)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("beit.commands.report.draw_curves", draw)
        yield


def pretraining_entry(epoch):
    return {
        "train_loss": 8.0 / (epoch + 1),
        "train_mlm_acc": 0.01 * epoch,
        "train_lr": 1.5e-3 / (epoch + 1),
        "train_grad_norm": 0.5,
        "epoch": epoch,
        "n_parameters": 91965776,
    }


def finetuning_entry(epoch):
    return {
        "train_loss": 2.0,
        "train_class_acc": 0.5,
        "test_loss": 1.25 - 0.1 * epoch,
        "test_acc1": 80.0 + epoch,
        "test_acc5": 95.0,
        "epoch": epoch,
        "n_parameters": 86530984,
    }


def make_run(folder, config, entries, **environment):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(config))
    (folder / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    if environment:
        (folder / "environment.json").write_text(json.dumps(environment))
    return folder


@pytest.fixture
def pretraining(tmp_path):
    config = PretrainingConfig(data_path="my photos/*.jpg", lr=3e-3, epochs=4, output_dir="out", batch_size=32)
    return make_run(tmp_path / "runs" / "pre", config, map(pretraining_entry, range(4)), **ENVIRONMENT)


@pytest.fixture
def finetuning(tmp_path):
    config = FinetuningConfig(epochs=3, data_path="images")
    return make_run(tmp_path / "runs" / "fine", config, map(finetuning_entry, range(3)))


def page_of(*folders, **options):
    return render(read_runs([str(folder) for folder in folders]), "Title", **options)


def texts(page):
    return " ".join(" ".join(Reader(page).texts).split()).replace(SPACE, " ")


def rows_of(page):
    """The cells of the rows of results, by what stands first."""
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", page)
    return {name: re.findall(r"<td[^>]*>(.*?)</td>", cells.replace(SPACE, " ")) for name, cells in rows}


def test_the_page_stands_alone_and_is_well_formed(pretraining, finetuning):
    page = page_of(pretraining, finetuning)
    reader = Reader(page)
    assert not {"script", "iframe", "object"} & {tag for tag, _ in reader.tags}
    sources = [value for _, attributes in reader.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(sources) > 4
    assert all(source.startswith("data:") for source in sources)
    assert not re.findall(r"url\(|@import|\bhttps?://", page)
    assert "default-src 'none'" in page
    assert len(page) < 1_000_000


def test_nothing_that_a_run_holds_becomes_markup(tmp_path):
    # A path, a setting, a key of the log, the environment, a file's name: each comes from somewhere.
    folder = tmp_path / "<script>alert(3)<"
    config = PretrainingConfig(data_path=HOSTILE, model_kwargs={HOSTILE: HOSTILE})
    entry = {**pretraining_entry(0), HOSTILE: 1.0, "note": HOSTILE}
    make_run(folder, config, [entry, {**entry, "epoch": 1}], **{HOSTILE: HOSTILE, "command": ["a", HOSTILE]})
    (folder / "<img src=x>.json").write_text(json.dumps({HOSTILE: {HOSTILE: 1.0}}))
    Image.new("RGB", (8, 8)).save(folder / "<img src=x>.png")
    tags = Reader(render(read_runs([str(folder)]), HOSTILE)).tags
    assert "script" not in [tag for tag, _ in tags]
    assert all(attributes["src"].startswith("data:image/") for tag, attributes in tags if tag == "img")
    assert not [attributes for _, attributes in tags if any(name.startswith("on") for name in attributes)]


def test_every_value_of_the_last_line_is_there(pretraining):
    rows = rows_of(page_of(pretraining))
    last = json.loads((pretraining / "log.txt").read_text().splitlines()[-1])
    assert {key: rows[key] for key in last} == {key: [f"{value:.6g}" if isinstance(value, float) else str(value)]
                                                for key, value in last.items()}  # fmt: skip


def test_curves_of_a_kind_share_a_diagram_and_kinds_do_not(pretraining, finetuning, tmp_path):
    other = tmp_path / "runs" / "other"
    shutil.copytree(finetuning, other)
    page = page_of(pretraining, finetuning, other)
    drawn = [attributes["alt"] for tag, attributes in Reader(page).tags if tag == "img"]
    # Pre-training: loss and accuracy, then lr and gradient norm; fine-tuning: loss, class_acc and acc1, then acc5.
    assert drawn == [*["Curves of pre-training"] * 2, *["More curves of pre-training"] * 2,
                     *["Curves of fine-tuning"] * 3, "More curves of fine-tuning"]  # fmt: skip


def test_a_single_epoch_has_results_and_no_curve(tmp_path):
    page = page_of(make_run(tmp_path / "run", FinetuningConfig(), [finetuning_entry(0)]))
    assert "<img" not in page
    assert "<h2>Curves" not in page
    assert "<h3>Fine-tuning" not in page
    assert rows_of(page)["top-1 accuracy"] == ["80.00 %"]  # neither a best nor a quoted column


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (PretrainingConfig(), "pre-training"),
        (DvaeConfig(), "tokenizer"),
        (VqkdConfig(), "tokenizer"),
        (FinetuningConfig(), "fine-tuning"),
        (LinearProbeConfig(), "linear probe"),
    ],
)
def test_the_kind_of_a_run_follows_from_its_settings(tmp_path, config, kind):
    run = read_run(make_run(tmp_path / "run", config, [{"epoch": 0, "train_loss": 1.0}]), "run")
    assert run.kind == kind


def test_a_segmentation_run_counts_steps_and_is_shown_in_percent(tmp_path):
    pytest.importorskip("semantic_segmentation")
    from semantic_segmentation.config import TrainConfig

    entries = [{"epoch": n, "step": 50 * (n + 1), "test_mIoU": 0.4 + 0.1 * n} for n in range(2)]
    folder = make_run(tmp_path / "run", TrainConfig(config="x"), entries)
    run = read_run(folder, "run")
    assert (run.kind, run.unit) == ("segmentation", "step")
    assert run.state.startswith("100")
    assert run.state.endswith("steps")
    assert rows_of(page_of(folder))["mean IoU"] == ["50.00 %", "50.00 % (step 100)"]


def test_the_recipe_a_segmentation_run_was_started_from_is_found_by_its_config(tmp_path):
    # Recipes quote mIoU in percent, logs have fractions.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text(json.dumps({"epoch": 0, "step": 5, "test_mIoU": 0.5}) + "\n")
    (tmp_path / "run" / "config.yaml").write_text(
        "config: configs/beit/upernet/upernet_beit_base_12_640_slide_160k_ade20k_pt2ft.py\ndecode_head: uper\n"
    )
    assert rows_of(page_of(tmp_path / "run"))["mean IoU"] == ["50.00 %", "53.61 %"]


# Quoted and measured
def test_a_run_of_a_recipe_has_the_quoted_numbers_beside_its_own(tmp_path):
    # Numbers by hand: finetune_base_pt22k_224 is quoted with 83.7 and 96.6; the run ends at 82.0 and 95.0.
    recipe = read_recipe("finetune_base_pt22k_224")
    words = ["python", "run_class_finetuning.py", "--config", "finetune_base_pt22k_224", "--output_dir", "x"]
    config = replace(FinetuningConfig(**recipe.settings), epochs=3)
    folder = make_run(tmp_path / "run", config, map(finetuning_entry, range(3)), processes=8, command=words)
    rows = rows_of(page_of(folder))
    assert rows["top-1 accuracy"] == ["82.00 %", "82.00 % (epoch 3)", "83.70 %"]
    assert rows["top-5 accuracy"] == ["95.00 %", "95.00 % (epoch 1)", "96.60 %"]  # the first of equals
    assert rows["validation loss"] == ["1.05", "1.05 (epoch 3)", ""]
    assert rows["parameters"] == ["86,530,984", "", "86,530,984"]
    assert read_run(folder, "run").departures() == {"epochs": (recipe.settings["epochs"], 3)}
    assert "This run differs: epochs 3, not 100." in texts(page_of(folder))


def test_the_split_of_a_batch_is_no_departure_and_another_batch_is(tmp_path):
    recipe = read_recipe("finetune_base_pt22k_224")
    settings = FinetuningConfig(**recipe.settings)
    for number, (images, total, expected) in enumerate(
        [(64, 1024, {}), (64, 512, {"total_batch_size": (1024, 512)}), (64, 0, {})]
    ):
        config = replace(settings, batch_size=images, total_batch_size=total)
        folder = make_run(tmp_path / str(number), config, [finetuning_entry(0)])
        assert read_run(folder, "run", "finetune_base_pt22k_224").departures() == expected


def test_what_came_of_a_published_run_later_has_no_measured_number(pretraining):
    page = render([read_run(pretraining, "run", "pretrain_ablation_random_masks")], "Title")
    assert rows_of(page)["after fine-tuning on ImageNet-1k at 224 pixels: acc1"] == ["", "", "82.77 %"]


def test_accuracies_are_percentages_on_both_sides(pretraining):
    rows = rows_of(render([read_run(pretraining, "run", "pretrain_base_1k_300ep")], "Title"))
    assert rows["masked-token accuracy, training"] == ["3.00 %", "3.00 % (epoch 4)", "4.96 %"]
    assert rows["gradient norm"] == ["0.5", "", "0.424"]


def test_without_a_recipe_there_is_no_quoted_column(pretraining, finetuning):
    assert "uoted" not in texts(page_of(finetuning))
    runs = [read_run(pretraining, "a", "pretrain_base_1k_300ep"), read_run(finetuning, "b", "-")]
    with_recipe = render(runs, "Title")
    assert rows_of(with_recipe)["top-1 accuracy"][2] == ""
    assert "Quoted from recipe pretrain_base_1k_300ep" in texts(with_recipe)


def test_an_unfinished_and_a_diverged_run_are_marked(finetuning):
    with (finetuning / "log.txt").open("a") as log:
        log.write('{"train_loss": NaN, "test_acc1": Infinity, "epoch": 3}\n')
    text = (finetuning / "config.yaml").read_text().replace("epochs: 3", "epochs: 30", 1)
    (finetuning / "config.yaml").write_text(text)
    page = page_of(finetuning)
    assert "fine-tuning, 4 of 30 epochs, diverged" in texts(page)
    assert rows_of(page)["top-1 accuracy"][1] == "82.00 % (epoch 3)"


# Settings, environment, command
def test_settings_that_differ_come_first_and_the_rest_is_folded(pretraining):
    page = page_of(pretraining)
    assert page.index('row">lr<') < page.index("Other settings") < page.index('row">momentum<')
    assert rows_of(page)["lr"] == ["0.003"]
    assert rows_of(page)["data_path"] == ["my photos/*.jpg"]
    assert page[page.index("Other settings") :].count("</details>") >= 3


def test_environment_and_command_are_those_that_the_run_recorded(tmp_path):
    words = ["beit", "pretrain", "--data_path", "my photos"]
    folder = make_run(tmp_path / "run", PretrainingConfig(), [pretraining_entry(0)], command=words, **ENVIRONMENT)
    text = texts(page_of(folder))
    assert shlex.join(words) in text
    assert "GPU of the test" in text


def test_pictures_and_results_of_a_folder_and_of_elsewhere_are_shown(pretraining, tmp_path, caplog):
    Image.new("RGB", (30, 20)).save(pretraining / "reconstructions.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "more.png")
    (pretraining / "broken.png").write_text("no picture")
    (pretraining / "knn.json").write_text(json.dumps({"best": {"layer": 5, "acc1": 71.375}, "results": [{}]}))
    (pretraining / "list.json").write_text("[1]")
    results = {"ok": True, "deep": {"deeper": 0.123456}, "text": "x", "token_accuracy": 0.5}
    (tmp_path / "summary.json").write_text(json.dumps(results))
    page = page_of(pretraining, pictures=[str(tmp_path / "more.png")], results=[str(tmp_path / "summary.json")])
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert captions == [str(tmp_path / "more.png"), "pre/reconstructions.png"]
    assert "broken.png left out" in caplog.text
    rows = rows_of(page)
    shown = [rows[name] for name in ("best: acc1", "deep: deeper", "ok", "token_accuracy")]
    assert shown == [["71.38 %"], ["0.1235"], ["True"], ["50.00 %"]]
    assert "pre/knn.json" in page


# Mistakes
def refused(capsys, *arguments):
    status = beit(["report", *map(str, arguments)])
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    return error


def test_mistakes_are_one_line(pretraining, tmp_path, capsys):
    output = ("-o", tmp_path / "report.html")
    assert "no such file or folder" in refused(capsys, tmp_path / "nowhere", *output)
    assert "give the file to write, such as report.html" in refused(capsys, pretraining)
    assert "is a folder; name a file in it" in refused(capsys, pretraining, "-o", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "has no log.txt" in refused(capsys, tmp_path / "empty", *output)
    assert f"runs inside it: {pretraining}" in refused(capsys, pretraining.parent, *output)
    assert "is given twice" in refused(capsys, pretraining, f"{pretraining}/", *output)
    (tmp_path / "empty" / "log.txt").write_text("half a li")
    assert "has no finished epoch" in refused(capsys, tmp_path / "empty", *output)
    assert "no recipe 'pretrain_base'" in refused(capsys, pretraining, "--recipe", "pretrain_base", *output)
    assert "no.png: no such file" in refused(capsys, pretraining, "--pictures", "no.png", *output)
    assert "no.json: no such file" in refused(capsys, pretraining, "--results", "no.json", *output)
    (pretraining / "config.yaml").write_text("a: [")
    assert "not a YAML file" in refused(capsys, pretraining, *output)
    assert not (tmp_path / "report.html").exists()


def test_only_pages_of_its_own_are_overwritten(pretraining, tmp_path, capsys):
    # Breaks if a log, or any other file, can be lost to a slip of the hand.
    log = (pretraining / "log.txt").read_bytes()
    assert "was not written by beit" in refused(capsys, pretraining, "-o", pretraining / "log.txt")
    assert (pretraining / "log.txt").read_bytes() == log
    (tmp_path / "other.html").write_text("<!DOCTYPE html><title>mine</title>")
    assert "was not written by" in refused(capsys, pretraining, "-o", tmp_path / "other.html")
    page = tmp_path / "new" / "folder" / "report.html"
    for title in ("first", "\udcff", "second"):
        main(ReportConfig(runs=(str(pretraining),), output=str(page), title=title))
    assert "<h1>second</h1>" in page.read_text()


def test_a_line_cut_off_is_left_out_and_settings_may_be_missing(pretraining):
    with (pretraining / "log.txt").open("a") as log:
        log.write('{"train_loss": 0.1, "epo')
    (pretraining / "config.yaml").unlink()
    run = read_run(pretraining, "run")
    assert (len(run.entries), run.kind, run.settings) == (4, "training", {})
    Reader(render([run], "Title"))


def test_settings_of_another_version_are_shown(pretraining):
    (pretraining / "config.yaml").write_text("num_mask_patches: many\nold_flag: 3\n")
    assert rows_of(page_of(pretraining))["old_flag"] == ["3"]


def test_a_json_file_that_is_asked_for_must_hold_an_object(pretraining, tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match="is not a JSON object, but of type list"):
        page_of(pretraining, results=[str(tmp_path / "list.json")])
