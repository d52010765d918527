"""``beit recipes``: what it lists and shows, the commands it works out, the memory it estimates, the page it writes."""

import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from beit.__main__ import main
from beit.commands import memory
from beit.commands.published import command, plan, read_recipe, workload
from beit.config import read_facts, recipe_names
from beit.errors import InputError, did_you_mean
from beit.zoo import create_model

ROOT = Path(__file__).parents[2]
GIB = 2**30


def output_of(capsys, *arguments):
    assert main(["recipes", *arguments]) == 0
    return capsys.readouterr()


def refused(capsys, *arguments):
    assert main(["recipes", *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


class TestList:
    def test_has_a_line_for_every_recipe(self, capsys):
        head, *lines = output_of(capsys, "list").out.splitlines()
        assert head.split("  ")[0] == "recipe"
        assert sorted(line.split()[0] for line in lines) == recipe_names()

    def test_says_what_is_expected_and_on_what_hardware(self, capsys):
        lines = {line.split()[0]: line for line in output_of(capsys, "list").out.splitlines()}
        line = lines["finetune_base_pt22k_ft22k_224"]
        for word in (" fine-tuning ", " beit_base_patch16_224 ", "acc1 85.2, acc5 97.6", "8 V100-16GB"):
            assert word in line
        assert "train_loss 6.299" in lines["pretrain_base_1k_300ep"]

    def test_of_one_task(self, capsys):
        _, *lines = output_of(capsys, "list", "--task", "linear probe").out.splitlines()
        assert [line.split()[0] for line in lines] == ["linear_probe_base", "linear_probe_large"]
        assert "did you mean 'segmentation'" in refused(capsys, "list", "--task", "segmentaton")


class TestShow:
    @pytest.mark.parametrize("name", recipe_names())
    def test_says_all_there_is(self, name, capsys):
        text = output_of(capsys, "show", name).out
        facts = read_facts(name)
        assert all(str(facts[key]) in text for key in ("task", "source", "data", "hardware", "time"))
        assert "not measured with this library" in text
        assert command(read_recipe(name), plan(read_recipe(name), facts["gpus"])) in text

    def test_shows_settings_and_numbers(self, capsys):
        text = " ".join(output_of(capsys, "show", "finetune_large_22k").out.split())
        for shown in (
            "lr 0.002",
            "layer_decay 0.75",
            "nb_classes 21841",
            "after finetune_large_pt22k_ft22k_224: acc1 87.396",
            "after finetune_large_pt22k_ft22k_224: acc5 98.282",
        ):
            assert shown in text
        assert "16 GPUs x 64 images x 2 batches = 2048 images an update" in text

    def test_says_how_an_ablation_is_fine_tuned(self, capsys):
        text = " ".join(output_of(capsys, "show", "pretrain_ablation_layer_scale").out.split())
        assert "run_class_finetuning.py --config finetune_ablation_224 --layer_scale_init_value 0.1" in text

    def test_takes_a_recipe_of_ones_own(self, tmp_path, capsys):
        own = tmp_path / "mine.yaml"
        own.write_text(f"base: {ROOT}/beit/recipes/finetune_base_pt22k_224.yaml\nrecipe: {{source: me}}\nepochs: 7\n")
        text = output_of(capsys, "show", str(own)).out
        assert f"--config {own}" in text
        assert " ".join(text.split()).count("epochs 7") == 1

    @pytest.mark.parametrize(
        ("content", "hint"),
        [("epochs: 7\n", "has no task, source"), ("recipe: no facts\n", "recipe must hold 'key: value' lines")],
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
            ("finetune_base_pt22k_224", "task: [fine-tuning]", "task is ['fine-tuning']; it must be text"),
            ("finetune_base_pt22k_224", "quoted: 83.7", "quoted is 83.7; it must hold 'key: value' lines"),
            ("segment_base_512_pt", "updates: 160000", "updates is 160000; it must hold 'key: value' lines"),
            ("segment_base_512_pt", "updates: {max_iters: many}", "max_iters is 'many'; it must be a whole number"),
            ("segment_base_512_pt", "batch_size: 2.5", "batch_size is 2.5; it must be a whole number"),
        ],
    )
    def test_a_fact_of_the_wrong_kind(self, tmp_path, capsys, base, fact, hint):
        own = tmp_path / "mine.yaml"
        own.write_text(f"base: {ROOT}/beit/recipes/{base}.yaml\nrecipe: {{source: me, {fact}}}\n")
        for asked in ("show", "command"):
            assert hint in refused(capsys, asked, str(own))

    def test_a_segmentation_without_what_its_launcher_needs(self, tmp_path, capsys):
        facts = "task: segmentation, source: me, gpus: 1, data_path: ade, quoted: {mIoU: 1}"
        (tmp_path / "mine.yaml").write_text(f"recipe: {{{facts}}}\n")
        assert "recipe has no model, input_size" in refused(capsys, "show", str(tmp_path / "mine.yaml"))

    def test_a_wrong_name_gives_the_nearest(self, capsys):
        assert "did you mean 'pretrain_base_22k'" in refused(capsys, "show", "pretrain_base_2k")
        assert "beit recipes list" in refused(capsys, "command", "resnet")
        assert "no settings file" in refused(capsys, "show", "nowhere.yaml")


class TestCommand:
    def test_goes_into_a_shell_as_it_is(self, capsys, tmp_path):
        # Broken by a remark on standard output, or by a line that ends otherwise than in " \".
        done = output_of(capsys, "command", "finetune_base_pt22k_224", "--gpus", "2", "--gpu-memory", "16")
        assert "2 GPUs x 64 images x 8 batches = 1024 images an update" in done.err
        shell = subprocess.run(
            ["bash", "-c", f'torchrun() {{ printf "%s\\n" "$@"; }}\n{done.out}'],
            capture_output=True,
            text=True,
            check=True,
        )
        assert shell.stdout.split() == [
            *("--nproc_per_node=2", "run_class_finetuning.py", "--config", "finetune_base_pt22k_224"),
            *("--batch_size", "64", "--update_freq", "8", "--data_path", "/path/to/imagenet"),
            *("--finetune", "beit_base_patch16_224_pt22k", "--output_dir", "/path/to/run"),
        ]

    @pytest.mark.parametrize("base", ["finetune_base_pt22k_224", "segment_base_512_pt", "segment_base_512_ms"])
    def test_paths_are_one_word_to_a_shell(self, base, tmp_path, capsys):
        own = tmp_path / "mine.yaml"
        facts = "source: me, data_path: /my images/$(rm), start: it's.pth"
        own.write_text(f"base: {ROOT}/beit/recipes/{base}.yaml\nrecipe: {{{facts}}}\n")
        words = shlex.split(output_of(capsys, "command", str(own)).out.replace("\\\n", ""))
        assert sum(word.endswith("/my images/$(rm)") for word in words) == 1
        assert sum(word.endswith("it's.pth") for word in words) == 1

    def test_says_that_fewer_images_at_once_change_segmentation(self, capsys):
        # Broken by the remark on a run whose batch norm sees what the published one's did.
        fewer = output_of(capsys, "command", "segment_base_640_pt2ft", "--gpus", "2")
        assert "batch norm sees 4 images at once, not 16" in fewer.err
        fewer = output_of(capsys, "command", "segment_large_640_pt2ft", "--gpus", "1")
        assert "batch norm sees 2 images at once, not 8" in fewer.err
        more = output_of(capsys, "command", "segment_large_640_pt2ft", "--gpu_memory", "80")
        assert "batch norm sees 16 images at once, not 8" in more.err
        for same in (
            ["segment_large_640_pt2ft"],
            ["segment_base_640_pt2ft", "--gpus", "16"],
            ["pretrain_base_22k", "--gpus", "1"],
            ["segment_base_640_ms", "--gpus", "1"],
        ):
            assert "batch norm" not in output_of(capsys, "command", *same).err

    def test_takes_the_published_gpus_by_default(self, capsys):
        assert "--nproc_per_node=16" in output_of(capsys, "command", "pretrain_base_22k").out

    def test_one_gpu_needs_no_launcher(self, capsys):
        assert output_of(capsys, "command", "linear_probe_base", "--gpus", "1").out.startswith(
            "python run_linear_eval.py"
        )

    def test_several_machines(self, capsys):
        done = output_of(capsys, "command", "pretrain_base_22k", "--gpus", "16", "--nnodes", "2")
        assert done.out.startswith("torchrun --nnodes=2 --nproc_per_node=8 ")
        assert "on every machine" in done.err
        done = output_of(capsys, "command", "segment_base_640_pt2ft", "--nnodes", "2")
        assert done.out.startswith("NNODES=2 NODE_RANK=$NODE_RANK MASTER_ADDR=$MASTER_ADDR ")
        assert "ade20k_pt2ft 4 " in done.out

    @pytest.mark.parametrize(
        ("arguments", "hint"),
        [
            (
                ("pretrain_base_22k", "--gpus", "7"),
                "2048 images an update cannot be shared out evenly; 4 or 8 GPUs can",
            ),
            (("pretrain_base_22k", "--gpus", "4096"), "2048 GPUs can"),
            # 1024 GPUs would have one image each, and mixup takes two
            (
                ("finetune_base_pt22k_224", "--gpus", "1024"),
                "in pairs, for mixup) cannot be shared out evenly; 512 GPUs",
            ),
            (
                ("segment_base_512_pt", "--gpus", "3"),
                "16 images an update cannot be shared out evenly; 2 or 4 GPUs can",
            ),
            (("pretrain_base_22k", "--gpus", "0"), "must be at least 1"),
            (("pretrain_base_22k", "--gpus", "8", "--nnodes", "3"), "as many on each machine"),
            (("pretrain_base_22k", "--gpu_memory", "-1"), "--gpu_memory -1: must be"),
            (("pretrain_base_22k", "--gpu_memory", "nan"), "--gpu_memory nan: must be"),
            (("pretrain_base_22k", "--gpu_memory", "inf"), "--gpu_memory inf: must be"),
            (("segment_large_640_pt2ft", "--gpu_memory", "16"), "even with --grad_checkpointing"),
            # One image would fit, but one alone cannot be trained on.
            (("segment_large_640_pt2ft", "--gpus", "1", "--gpu_memory", "24"), "2 images of segment_large_640_pt2ft"),
            (("linear_probe_base", "--gpu_memory", "2"), "1 image of linear_probe_base cannot fit; it takes"),
        ],
    )
    def test_what_cannot_be_is_one_line(self, arguments, hint, capsys):
        assert hint in refused(capsys, "command", *arguments)

    @pytest.mark.parametrize("gigabytes", [16, 32, 80, 141])
    @pytest.mark.parametrize("gpus", [1, 4, 16])
    @pytest.mark.parametrize("name", ["pretrain_base_22k", "finetune_large_22k", "finetune_large_pt22k_ft22k_512"])
    def test_the_memory_changes_how_the_batch_is_shared_out_not_the_batch(self, name, gpus, gigabytes):
        recipe = read_recipe(name)
        how = plan(recipe, gpus, gigabytes=gigabytes)
        assert how.gpus * how.images * how.update_freq == recipe.batch
        most = memory.images_that_fit(workload(recipe), gigabytes, checkpointing=how.checkpointing)
        assert how.images <= most
        # Nothing between what was chosen and what fits would have divided the share of a GPU.
        share = recipe.batch // gpus
        assert not [size for size in range(how.images + 1, min(most, share) + 1) if share % size == 0]

    def test_checkpointing_is_asked_for_where_nothing_fits_without(self, capsys):
        done = output_of(capsys, "command", "segment_large_512_pt2ft", "--gpu_memory", "20")
        assert "grad_checkpointing=True" in done.out
        assert "not even one image fits without it" in done.err
        assert "grad_checkpointing" not in output_of(capsys, "command", "segment_large_512_pt2ft").out

    def test_float32_takes_more_memory_and_is_a_flag(self, capsys):
        recipe = read_recipe("pretrain_base_22k")
        assert plan(recipe, 1, gigabytes=16, precision="fp32").images < plan(recipe, 1, gigabytes=16).images
        assert "--amp_dtype fp32" in output_of(capsys, "command", "pretrain_base_22k", "--precision", "fp32").out


class TestMemory:
    @pytest.mark.parametrize(
        ("name", "quoted"), [("segment_base_640_pt2ft", 15.88), ("segment_large_640_pt2ft", 22.64)]
    )
    def test_the_estimate_is_above_what_mmsegmentation_reports_and_near_it(self, name, quoted):
        # What is quoted is PyTorch's counter, so without the context, and in 2**30 bytes at worst.
        recipe = read_recipe(name)
        estimate = memory.needed(workload(recipe), recipe.images) - memory.CONTEXT
        assert quoted * GIB <= estimate <= 1.1 * quoted * GIB

    @pytest.mark.parametrize("name", ["pretrain_base_22k", "finetune_base_22k", "finetune_large_22k"])
    def test_runs_published_on_32_gb_nearly_fit_there(self, name):
        # The fine-tunings ran with DeepSpeed, which keeps less than the estimate counts.
        recipe = read_recipe(name)
        fit = memory.images_that_fit(workload(recipe), 32)
        assert 0.75 * recipe.images <= fit <= 2 * recipe.images

    @pytest.mark.parametrize("precision", ["amp", "fp32"])
    @pytest.mark.parametrize("size", [128, 448])
    def test_covers_what_autograd_keeps(self, precision, size):
        # Broken by a forgotten term: the eager path keeps whatever a kernel might recompute.
        kept = [bytes_kept(images, size, precision) for images in (1, 3)]
        per_image = (kept[1] - kept[0]) / 2
        work = memory.finetuning_workload("beit_tiny_patch16_224", size, 10)
        estimate = memory.needed(work, 1, precision) - memory.needed(work, 0, precision)
        assert per_image <= estimate <= 1.6 * per_image

    def test_parameters_are_those_of_the_model(self):
        assert workload(read_recipe("finetune_base_pt22k_224")).parameters == 86_530_984
        assert workload(read_recipe("pretrain_base_22k")).parameters == 91_965_776
        assert workload(read_recipe("segment_base_640_pt2ft")).parameters == pytest.approx(163e6, rel=0.02)
        assert workload(read_recipe("segment_large_640_pt2ft")).parameters == pytest.approx(441e6, rel=0.02)

    def test_pixels_as_targets_take_no_tokenizer_and_have_768_outputs(self):
        pixels, tokens = (workload(read_recipe(f"pretrain_ablation_{name}")) for name in ("pixels", "beit"))
        assert (pixels.frozen, pixels.transient, pixels.logits) == (0, 0, 75 * 768)
        assert tokens.logits == 75 * 8192
        assert tokens.frozen > 0
        assert tokens.parameters - pixels.parameters == (8192 - 768) * (768 + 1)

    def test_what_fits_fits_and_one_more_does_not(self):
        work = memory.finetuning_workload("beit_base_patch16_224", 224, 0)
        fit = memory.images_that_fit(work, 32)
        assert memory.needed(work, fit) <= 32e9 * memory.USABLE < memory.needed(work, fit + 1)
        assert memory.images_that_fit(work, 2) == 0
        assert memory.images_that_fit(work, 32, checkpointing=True) > fit


def bytes_kept(images, size, precision):
    """Bytes of the tensors that autograd keeps for the backward pass, each storage once, without the weights."""
    model = create_model("beit_tiny_patch16_224", img_size=size, num_classes=10, drop_path_rate=0.1)
    model.set_attention("eager")
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp"):
        model.train()(torch.randn(images, 3, size, size))
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


def test_a_name_that_is_there_twice_is_suggested_once():
    assert did_you_mean("visualise", ["visualize", "demo", "visualize"]) == " (did you mean 'visualize'?)"


def test_the_largest_divisor_below_what_fits_is_taken():
    # 4096 images over 16 GPUs are 256 on each; of those at most 100 at once: 4 batches of 64.
    recipe = read_recipe("finetune_base_22k")
    gigabytes = memory.needed(workload(recipe), 100) / 1e9 / memory.USABLE + 1e-6
    how = plan(recipe, 16, gigabytes=gigabytes)
    assert (how.images, how.update_freq) == (64, 4)
    with pytest.raises(InputError, match="cannot be shared out"):
        plan(recipe, 3)
