"""``beit recipes``: what it lists and shows, and the commands it gives for other numbers of GPUs."""

import shlex
import subprocess
from pathlib import Path

import pytest

from beit.__main__ import main
from beit.commands.recipes import command, read_recipe
from beit.config import read_facts, recipe_names
from beit.errors import did_you_mean

ROOT = Path(__file__).parents[2]


def output_of(capsys, *arguments):
    assert main(["recipes", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    assert main(["recipes", *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


class TestList:
    def test_has_a_line_for_every_recipe(self, capsys):
        head, *lines = output_of(capsys, "list").splitlines()
        assert head.split("  ")[0] == "recipe"
        assert sorted(line.split()[0] for line in lines) == recipe_names()
        found = {line.split()[0]: line for line in lines}
        for word in (" fine-tuning ", " beit_base_patch16_224 ", "acc1 85.2, acc5 97.6", "8 V100-16GB"):
            assert word in found["finetune_base_pt22k_ft22k_224"]
        assert "train_loss 6.299" in found["pretrain_base_1k_300ep"]

    def test_of_one_task(self, capsys):
        _, *lines = output_of(capsys, "list", "--task", "linear probe").splitlines()
        assert [line.split()[0] for line in lines] == ["linear_probe_base", "linear_probe_large"]
        assert "did you mean 'segmentation'" in refused(capsys, "list", "--task", "segmentaton")


class TestShow:
    @pytest.mark.parametrize("name", recipe_names())
    def test_shows_all_there_is(self, name, capsys):
        text = output_of(capsys, "show", name)
        facts = read_facts(name)
        assert all(str(facts[key]) in text for key in ("task", "source", "data", "hardware", "time"))
        assert "not measured with this library" in text
        assert command(read_recipe(name), facts["gpus"]) in text

    def test_shows_settings_and_numbers(self, capsys):
        text = " ".join(output_of(capsys, "show", "finetune_large_22k").split())
        for shown in (
            "lr 0.002",
            "layer_decay 0.75",
            "nb_classes 21841",
            "total_batch_size 2048",
            "after finetune_large_pt22k_ft22k_224: acc1 87.396",
            "after finetune_large_pt22k_ft22k_224: acc5 98.282",
            "command for 16 GPUs",
        ):
            assert shown in text

    def test_shows_how_an_ablation_is_fine_tuned(self, capsys):
        text = " ".join(output_of(capsys, "show", "pretrain_ablation_layer_scale").split())
        assert "run_class_finetuning.py --config finetune_ablation_224 --layer_scale_init_value 0.1" in text

    def test_takes_a_recipe_of_ones_own(self, tmp_path, capsys):
        own = tmp_path / "mine.yaml"
        own.write_text(f"base: {ROOT}/beit/recipes/finetune_base_pt22k_224.yaml\nrecipe: {{source: me}}\nepochs: 7\n")
        text = output_of(capsys, "show", str(own))
        assert f"--config {own}" in text
        assert " ".join(text.split()).count("epochs 7") == 1

    @pytest.mark.parametrize(
        ("content", "hint"),
        [
            ("epochs: 7\n", "lacks task, source"),
            ("recipe: no facts\n", "recipe must hold 'key: value' lines"),
            (
                "recipe: {task: segmentation, source: me, gpus: 1, data_path: ade, quoted: {mIoU: 1}}\n",
                "recipe lacks config, start, model",
            ),
        ],
    )
    def test_a_file_without_facts(self, tmp_path, capsys, content, hint):
        (tmp_path / "mine.yaml").write_text(content)
        assert hint in refused(capsys, "show", str(tmp_path / "mine.yaml"))

    @pytest.mark.parametrize(
        ("base", "fact", "hint"),
        [
            ("finetune_base_pt22k_224", "gpus: eight", "gpus is 'eight'; it must be a whole number"),
            ("finetune_base_pt22k_224", "gpus: 0", "gpus is 0; it must be a whole number"),
            ("finetune_base_pt22k_224", "gpus: true", "gpus is True; it must be a whole number"),
            ("finetune_base_pt22k_224", "data_path: [a, b]", "data_path is ['a', 'b']; it must be text"),
            ("finetune_base_pt22k_224", "start: 7", "start is 7; it must be text"),
            ("finetune_base_pt22k_224", "quoted: 83.7", "quoted is 83.7; it must be a mapping"),
            ("segment_base_512_pt", "batch_size: 2.5", "batch_size is 2.5; it must be a whole number"),
        ],
    )
    def test_a_fact_of_the_wrong_kind(self, tmp_path, capsys, base, fact, hint):
        own = tmp_path / "mine.yaml"
        own.write_text(f"base: {ROOT}/beit/recipes/{base}.yaml\nrecipe: {{source: me, {fact}}}\n")
        assert hint in refused(capsys, "show", str(own))

    def test_a_wrong_name_gives_the_nearest(self, capsys):
        assert "did you mean 'pretrain_base_22k'" in refused(capsys, "show", "pretrain_base_2k")
        assert "beit recipes list" in refused(capsys, "show", "resnet")
        assert "no settings file" in refused(capsys, "show", "nowhere.yaml")


class TestCommand:
    def test_goes_into_a_shell_as_it_is(self):
        # Broken by a line that ends otherwise than in " \".
        text = command(read_recipe("finetune_base_pt22k_224"), 2)
        shell = subprocess.run(
            ["bash", "-c", f'torchrun() {{ printf "%s\\n" "$@"; }}\n{text}'], capture_output=True, text=True, check=True
        )
        assert shell.stdout.split() == [
            *("--nproc_per_node=2", "run_class_finetuning.py", "--config", "finetune_base_pt22k_224"),
            *("--data_path", "/path/to/imagenet", "--init_from", "beit_base_patch16_224_pt22k"),
            *("--output_dir", "/path/to/run"),
        ]

    @pytest.mark.parametrize("base", ["finetune_base_pt22k_224", "segment_base_512_pt", "segment_base_512_ms"])
    def test_paths_are_one_word_to_a_shell(self, base, tmp_path):
        own = tmp_path / "mine.yaml"
        facts = "source: me, data_path: /my images/$(rm), start: it's.pth"
        own.write_text(f"base: {ROOT}/beit/recipes/{base}.yaml\nrecipe: {{{facts}}}\n")
        words = shlex.split(command(read_recipe(str(own)), 8).replace("\\\n", ""))
        assert sum(word.endswith("/my images/$(rm)") for word in words) == 1
        assert sum(word.endswith("it's.pth") for word in words) == 1

    def test_is_for_the_gpus_that_are_asked_for(self, capsys):
        assert "--nproc_per_node=16" in output_of(capsys, "show", "pretrain_base_22k")
        assert "torchrun --nproc_per_node=4 " in output_of(capsys, "show", "pretrain_base_22k", "--gpus", "4")
        assert "\npython run_linear_eval.py" in output_of(capsys, "show", "linear_probe_base", "--gpus", "1")
        assert "dist_train.sh upernet_beit_base_12_512_slide_160k_ade20k_pt 2 " in output_of(
            capsys, "show", "segment_base_512_pt", "--gpus", "2"
        )

    @pytest.mark.parametrize(
        ("name", "gpus", "hint"),
        [
            ("pretrain_base_22k", "7", "2048 images per step cannot be split evenly; 4 GPUs would do"),
            ("segment_base_512_pt", "3", "16 images per step cannot be split evenly; 2 GPUs would do"),
            ("pretrain_base_22k", "0", "must be at least 1"),
        ],
    )
    def test_a_batch_that_cannot_be_split_is_refused(self, name, gpus, hint, capsys):
        assert hint in refused(capsys, "show", name, "--gpus", gpus)

    def test_a_test_runs_on_any_number_of_gpus(self):
        assert " 3 " in command(read_recipe("segment_base_640_ms"), 3)

    def test_says_that_fewer_images_at_once_change_segmentation(self, capsys):
        # Broken by the remark on a run whose batch norm sees what the published one's did.
        fewer = output_of(capsys, "show", "segment_base_640_pt2ft", "--gpus", "2")
        assert "batch norm sees 4 images at once, not 16" in fewer
        fewer = output_of(capsys, "show", "segment_large_640_pt2ft", "--gpus", "1")
        assert "batch norm sees 2 images at once, not 8" in fewer
        for name, gpus in [("segment_large_640_pt2ft", 8), ("segment_base_640_pt2ft", 16), ("pretrain_base_22k", 1)]:
            assert "batch norm" not in output_of(capsys, "show", name, "--gpus", str(gpus))


def test_a_name_that_is_there_twice_is_suggested_once():
    assert did_you_mean("visualise", ["visualize", "demo", "visualize"]) == " (did you mean 'visualize'?)"
