"""`beit report`: what a run folder tells is on the page, as it is, and nothing is fetched to show it."""

import json
import re
import shlex
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from beit.__main__ import main as beit
from beit.commands.published import read_recipe
from beit.commands.report import ReportConfig, compose, main, read_runs
from beit.commands.report_results import rows, verdict
from beit.commands.report_runs import command
from beit.commands.run_record import read_run
from beit.config import dump_yaml, read_command_line
from beit.errors import InputError
from beit.tasks.settings import DvaeConfig, FinetuningConfig, LinearProbeConfig, PretrainingConfig
from tests.visualization.test_page import HOSTILE, Reader

ENVIRONMENT = {"torch": "2.9.9+test", "device": "GPU of the test", "processes": 8}
# What makes a browser fetch something: attributes, style sheets, and a page's script.
OUTSIDE = re.compile(
    r"""(?:\b(?:src|href|srcset|action|poster|data)\s*=\s*["']?|url\(\s*["']?|@import\s*["']?)(?!\#|data:)[^"'\s>]""",
    re.IGNORECASE,
)
FETCHES = re.compile(r"fetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|importScripts|\bimport\b\s*[\"'({]")


def pretraining_entry(epoch):
    return {
        "train_loss": 8.0 / (epoch + 1),
        "train_mlm_acc": 0.01 * epoch,
        "train_lr": 1.5e-3 / (epoch + 1),
        "epoch": epoch,
        "n_parameters": 91965776,
        "skipped_steps": 0,
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
    return compose(read_runs([str(folder) for folder in folders]), "Title", **options)


def texts(page):
    return " ".join(" ".join(Reader(page).texts).split())


def test_the_page_stands_alone_is_well_formed_and_small(pretraining, finetuning):
    page = page_of(pretraining, finetuning)
    Reader(page)  # each element is closed, in order
    assert OUTSIDE.findall(page) == []
    assert FETCHES.findall(page) == []
    addresses = set(re.findall(r"\bhttps?://[^\s\"'<]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # the name of a language
    assert len(page.encode()) < 1_000_000


@pytest.mark.parametrize(
    "harmful",
    [
        '<img src="https://a.b/c.png">',
        "<link href=//a.b/c.css>",
        "<style>p{background:url(https://a.b)}</style>",
        '@import "a.css"',
        "<img srcset='a.png 2x'>",
    ],
)
def test_the_check_for_outside_addresses_sees_them(harmful):
    assert OUTSIDE.search(harmful)


def test_every_number_of_the_last_line_is_there_exactly(pretraining, finetuning):
    page = page_of(pretraining, finetuning)
    values = {attributes["value"] for tag, attributes in Reader(page).tags if tag == "data"}
    for folder in (pretraining, finetuning):
        last = json.loads((folder / "log.txt").read_text().splitlines()[-1])
        assert {repr(value) for value in last.values()} <= values


def test_curves_of_a_kind_share_a_diagram_and_kinds_do_not(pretraining, finetuning, tmp_path):
    other = tmp_path / "runs" / "other"
    shutil.copytree(finetuning, other)
    figures = [a for tag, a in Reader(page_of(pretraining, finetuning, other)).tags if tag == "figure"]
    curves = [[curve["label"] for curve in json.loads(figure["data-curves"])] for figure in figures]
    assert ["train"] in curves  # the loss of the pre-training, alone
    assert ["fine train", "fine test", "other train", "other test"] in curves
    points = json.loads(figures[0]["data-curves"])[0]["points"]
    assert points == [[1, 8.0], [2, 4.0], [3, pytest.approx(8 / 3, abs=1e-5)], [4, 2.0]]


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (PretrainingConfig(), "pre-training"),
        (DvaeConfig(), "tokenizer (discrete VAE)"),
        (FinetuningConfig(), "fine-tuning"),
        (LinearProbeConfig(), "linear probe"),
    ],
)
def test_the_kind_of_a_run_is_told_from_its_settings(tmp_path, config, kind):
    run = read_run(make_run(tmp_path / "run", config, [{"epoch": 0, "train_loss": 1.0}]), "run")
    assert run.kind.name == kind


@pytest.mark.parametrize(
    ("logged", "kind"),
    [
        ("train_mlm_acc", "pre-training"),
        ("train_kl", "tokenizer (discrete VAE)"),
        ("train_class_acc", "fine-tuning"),
        ("test_best_layer", "linear probe"),
        ("train_pixel_acc", "segmentation"),
        ("train_else", "training"),
    ],
)
def test_without_settings_the_log_tells_the_kind(tmp_path, logged, kind):
    (tmp_path / "log.txt").write_text(json.dumps({"epoch": 0, logged: 1.0}) + "\n")
    run = read_run(tmp_path, "run")
    assert run.kind.name == kind
    assert "no config.yaml" in " ".join(run.notes)
    Reader(compose([run], "Title"))


def test_a_segmentation_counts_steps_and_is_read_in_percent(tmp_path):
    pytest.importorskip("semantic_segmentation")
    from semantic_segmentation.config import TrainConfig

    entries = [{"epoch": n, "step": 50 * (n + 1), "test_mIoU": 0.4 + 0.1 * n, "train_pixel_acc": 0.5} for n in range(2)]
    folder = make_run(tmp_path / "run", TrainConfig(config="x", max_iters=200, update_freq=2), entries)
    run = read_run(folder, "run")
    assert (run.kind.name, run.unit, run.done, run.planned) == ("segmentation", "step", 100, 100)
    assert run.changed == {"config", "max_iters", "update_freq"}  # as the file says: beit does not know the defaults
    page = page_of(folder)
    assert "50.00\N{NO-BREAK SPACE}%" in page
    figure = next(a for tag, a in Reader(page).tags if tag == "figure")
    assert [x for x, _ in json.loads(figure["data-curves"])[0]["points"]] == [50, 100]


# ------------------------------------------------------------------------------------------- quoted and measured
def test_a_run_of_a_recipe_has_the_quoted_numbers_beside_its_own(tmp_path):
    # Numbers by hand: finetune_base_pt22k_224 is quoted with 83.7 and 96.6; the run ends at 82.0 and 95.0.
    recipe = read_recipe("finetune_base_pt22k_224")
    words = ["python", "run_class_finetuning.py", "--config", "finetune_base_pt22k_224", "--output_dir", "x"]
    config = replace(FinetuningConfig(**recipe.settings), epochs=3)
    folder = make_run(
        tmp_path / "run", config, map(finetuning_entry, range(3)), processes=8, command=words, torch="2.9"
    )
    run = read_run(folder, "run")
    assert run.recipe is not None
    table = {label: (quoted, measure and run.last(measure.key)) for label, quoted, measure in rows(run)}
    assert table["accuracy on test images"] == ("83.7\N{NO-BREAK SPACE}%", 82.0)
    assert table["right among the first five"] == ("96.6\N{NO-BREAK SPACE}%", 95.0)
    assert table["parameters"] == ("86,530,984", 86530984)
    assert run.departures() == {"epochs": (recipe.settings["epochs"], 3)}
    read = texts(page_of(folder))
    assert "accuracy on test images: 1.7 below the quoted 83.7; it was run with other settings" in read
    assert f"epochs {recipe.settings['epochs']} → 3" in read


def test_fewer_gpus_with_the_same_batch_are_no_departure_and_another_batch_is(tmp_path):
    recipe = read_recipe("finetune_base_pt22k_224")  # 128 images x 8 GPUs
    settings = FinetuningConfig(**recipe.settings)
    for number, (images, times, processes, expected) in enumerate(
        [(64, 2, 8, {}), (128, 8, 1, {}), (128, 1, 1, {"images an update": (1024, 128)})]
    ):
        config = replace(settings, batch_size=images, update_freq=times)
        folder = make_run(tmp_path / str(number), config, [finetuning_entry(0)], processes=processes)
        assert read_run(folder, "run", "finetune_base_pt22k_224").departures() == expected
    # 1024 is the published batch, however many processes share it: 3 do not multiply to it.
    total = make_run(
        tmp_path / "total", replace(settings, batch_size=64, total_batch_size=1024), [finetuning_entry(0)], processes=3
    )
    assert read_run(total, "run", "finetune_base_pt22k_224").departures() == {}


def test_what_came_of_a_published_run_later_is_not_taken_for_its_own(pretraining):
    run = read_run(pretraining, "run", "pretrain_ablation_random_masks")
    later = [(quoted, measure) for label, quoted, measure in rows(run) if label.startswith("after fine-tuning")]
    assert later == [("82.77", None)]


def test_without_a_recipe_the_quoted_cell_says_so(finetuning):
    page = page_of(finetuning)
    assert page.count("no published number") == len(rows(read_run(finetuning, "run"))) == 4
    with_none = page_of(finetuning)
    assert "quoted from" not in with_none


def test_the_best_epoch_is_the_lowest_loss_and_the_highest_accuracy(finetuning):
    run = read_run(finetuning, "run")
    best = {measure.key: run.best(measure) for measure in run.measures()}
    assert best["test_acc1"] == (82.0, 3)
    assert best["test_loss"] == (pytest.approx(1.05), 3)
    assert best["test_acc5"] == (95.0, 1)  # the first of equals


def test_a_quoted_norm_has_a_measured_value_and_no_best(pretraining):
    # And a share that is 0.0104 off 0.0496 is not the same: shares are small numbers.
    entry = {**pretraining_entry(3), "train_mlm_acc": 0.06, "train_grad_norm": 0.5, "epoch": 4}
    with (pretraining / "log.txt").open("a") as log:
        log.write(json.dumps(entry) + "\n")
    page = compose([read_run(pretraining, "run", "pretrain_base_1k_300ep")], "Title")
    row = re.search(r">train_grad_norm</th>.*?</tr>", page, flags=re.DOTALL)[0]
    assert "0.424" in row
    assert '<data value="0.5">' in row
    assert "epoch" not in row
    assert "in training: 0.01 above the quoted 0.0496" in texts(page)


def test_the_verdict_ranks_runs_of_a_kind_and_names_unfinished_ones(finetuning, tmp_path):
    worse = make_run(tmp_path / "runs" / "worse", FinetuningConfig(epochs=30), [finetuning_entry(1)])
    text = verdict(read_runs([str(worse), str(finetuning)]))
    assert text.startswith("Not finished: worse.")
    assert "accuracy on test images: 82.00 % fine, 81.00 % worse." in text.replace("\N{NO-BREAK SPACE}", " ")


def test_a_loss_that_is_not_finite_is_said_and_drawn_around(finetuning):
    with (finetuning / "log.txt").open("a") as log:
        log.write('{"train_loss": NaN, "test_acc1": Infinity, "epoch": 3}\n')
    page = page_of(finetuning)
    assert "diverged: the loss is nan" in page
    for attributes in (a for tag, a in Reader(page).tags if tag == "figure"):
        assert "NaN" not in attributes["data-curves"]


# --------------------------------------------------------------------------------- settings, environment, commands
def test_settings_that_differ_come_first_with_their_defaults(pretraining):
    page = page_of(pretraining)
    assert page.index(">lr<") < page.index("With their defaults") < page.index(">momentum<")
    assert "<code>0.003</code>" in page
    assert "<code>0.0005</code>" in page
    assert "my photos/*.jpg" in page


def test_the_environment_is_the_runs_own_or_said_to_be_another(pretraining, finetuning):
    assert "GPU of the test" in page_of(pretraining)
    assert "not stored by the run" not in page_of(pretraining)
    assert "not stored by the run" in page_of(finetuning)


@pytest.mark.parametrize(
    "config",
    [
        PretrainingConfig(data_path="my photos/$HOME/it's.txt", lr=3e-3, model_kwargs={"depth": 6}, pin_mem=False),
        FinetuningConfig(input_size=(192, 256), opt_betas=(0.9, 0.95), finetune="a b.pth", cutmix_minmax=(0.1, 0.9)),
        LinearProbeConfig(layers=(3, -1), avgpool_patchtokens=False, pool=("cls", "mean"), lr=1e-5),
        DvaeConfig(num_tokens=256, eval_data_path="x"),
    ],
)
def test_the_command_makes_the_run_again(tmp_path, config):
    # What a shell makes of it, read by the launcher, is the run's settings but for where it writes.
    run = read_run(make_run(tmp_path / "run", config, [{"epoch": 0, "train_loss": 1.0}], processes=4), "a/run")
    words = shlex.split(command(run).replace("\\\n", " "))
    assert words[:2] == ["torchrun", "--nproc_per_node=4"]
    assert read_command_line(type(config), words[3:], "prog", "") == replace(config, output_dir="reproduced/a/run")


def test_the_command_as_it_was_started_is_quoted_for_a_shell(tmp_path):
    words = ["beit", "pretrain", "--data_path", "my photos"]
    folder = make_run(tmp_path / "run", PretrainingConfig(), [pretraining_entry(0)], command=words)
    assert "beit pretrain --data_path 'my photos'" in texts(page_of(folder))


def test_nothing_that_a_run_says_becomes_markup(tmp_path):
    # A path, a setting, a key of the log, an environment, a file's name: all come from somewhere.
    folder = tmp_path / "<script>alert(3)<"
    config = PretrainingConfig(data_path=HOSTILE, model_kwargs={HOSTILE: HOSTILE})
    entry = {**pretraining_entry(0), HOSTILE: 1.0, "note": HOSTILE}
    make_run(folder, config, [entry, {**entry, "epoch": 1}], **{HOSTILE: HOSTILE, "command": ["a", HOSTILE]})
    (folder / "<img src=x>.json").write_text(json.dumps({HOSTILE: {HOSTILE: 1.0}}))
    Image.new("RGB", (8, 8)).save(folder / "<img src=x>.png")
    tags = Reader(compose(read_runs([str(folder)]), HOSTILE)).tags
    assert [tag for tag, _ in tags].count("script") == 1
    sources = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert not [attributes for _, attributes in tags if any(name.startswith("on") for name in attributes)]


# ----------------------------------------------------------------------------------------------- further contents
def test_pictures_and_results_of_a_folder_and_of_elsewhere_are_shown(pretraining, tmp_path):
    Image.new("RGB", (30, 20)).save(pretraining / "reconstructions.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "more.png")
    (pretraining / "knn.json").write_text(json.dumps({"best": {"layer": 5, "acc1": 71.375}, "results": [{}]}))
    (tmp_path / "summary.json").write_text(json.dumps({"ok": True, "deep": {"deeper": 0.123456}, "text": "x"}))
    page = page_of(pretraining, pictures=[str(tmp_path / "more.png")], results=[str(tmp_path / "summary.json")])
    alternatives = [attributes["alt"] for tag, attributes in Reader(page).tags if tag == "img"]
    assert alternatives == ["Picture more", "Picture reconstructions of pre"]
    assert '<data value="71.375">' in page
    assert '<data value="0.123456">' in page
    assert "pre/knn.json" in page


def test_many_large_runs_and_pictures_stay_under_five_megabytes(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8))
    folders = [tmp_path / f"run{number}" for number in range(12)]
    for folder in folders:
        make_run(folder, PretrainingConfig(epochs=1600), map(pretraining_entry, range(1600)))
        noise.save(folder / "noise.png", compress_level=1)
    page = page_of(*folders)
    assert len(page.encode()) < 5_000_000
    assert page.count("<img ") >= 3
    assert "Left out, since" in page
    curve = json.loads(next(a for tag, a in Reader(page).tags if tag == "figure")["data-curves"])[0]["points"]
    assert (curve[0][0], curve[-1][0]) == (1, 1600)


# ------------------------------------------------------------------------------------------------------- mistakes
def refused(capsys, *arguments):
    status = beit(["report", *map(str, arguments)])
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    return error


def test_mistakes_are_one_line(pretraining, tmp_path, capsys):
    output = ("-o", tmp_path / "report.html")
    assert "there is no folder" in refused(capsys, tmp_path / "nowhere", *output)
    assert "-o is missing" in refused(capsys, pretraining)
    assert "is a folder: give a file" in refused(capsys, pretraining, "-o", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "has no log.txt, so no run has finished an epoch there; it holds nothing" in refused(
        capsys, tmp_path / "empty", *output
    )
    (tmp_path / "empty" / "a.txt").touch()
    assert "it holds a.txt" in refused(capsys, tmp_path / "empty", *output)
    assert f"is no run folder, but holds some: {pretraining}" in refused(capsys, pretraining.parent, *output)
    assert "is a file: give the run's folder" in refused(capsys, pretraining / "log.txt", *output)
    assert "is given twice" in refused(capsys, pretraining, f"{pretraining}/", *output)
    (tmp_path / "empty" / "log.txt").write_text("half a li")
    assert "has no finished epoch: none of its 1 lines is one" in refused(capsys, tmp_path / "empty", *output)
    assert "no recipe 'pretrain_base'" in refused(capsys, pretraining, "--recipe", "pretrain_base", *output)
    assert "2 names for 1 runs" in refused(capsys, pretraining, "--recipe", "a", "b", *output)
    assert "--pictures no.png: there is no such file" in refused(capsys, pretraining, "--pictures", "no.png", *output)
    assert "--results no.json: No such file" in refused(capsys, pretraining, "--results", "no.json", *output)
    assert "required: RUNS" in refused(capsys, *output)
    assert not (tmp_path / "report.html").exists()


def test_a_line_cut_off_is_left_out_with_a_note_and_folders_are_made(pretraining, tmp_path, capsys):
    with (pretraining / "log.txt").open("a") as log:
        log.write('{"train_loss": 0.1, "epo')
    output = tmp_path / "new" / "folder" / "report.html"
    assert beit(["report", str(pretraining), "-o", str(output)]) == 0
    assert "1 lines that cannot be read were skipped" in capsys.readouterr().err
    assert "One line of log.txt could not be read" in output.read_text()


def test_broken_files_beside_the_log_do_not_stop_the_report(pretraining):
    (pretraining / "config.yaml").write_text("a: [")
    (pretraining / "environment.json").write_text("{")
    (pretraining / "knn.json").write_text("[1]")
    (pretraining / "broken.png").write_text("no picture")
    read = texts(page_of(pretraining))
    assert "The settings cannot be read" in read
    assert "environment.json cannot be read" in read
    assert "knn.json cannot be read" in read
    assert "Left out, since they are no pictures or the page would become too large: pre/broken.png" in read


def test_settings_of_another_version_are_shown_but_make_no_command(pretraining):
    (pretraining / "config.yaml").write_text("num_mask_patches: many\nold_flag: 3\n")
    run = read_run(pretraining, "run")
    assert command(run) == ""
    assert "old_flag" in page_of(pretraining)


def test_it_can_be_called_from_python(pretraining, tmp_path):
    main(ReportConfig(runs=(str(pretraining),), output=str(tmp_path / "a.html"), title="My runs"))
    assert "<h1>My runs</h1>" in (tmp_path / "a.html").read_text()
    with pytest.raises(InputError, match="-o is missing"):
        main(ReportConfig(runs=(str(pretraining),)))
