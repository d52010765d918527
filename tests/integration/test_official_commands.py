"""The official commands word for word, with what makes them small behind them: each one runs, on the last one's file.

Pre-training, intermediate fine-tuning on more classes, fine-tuning on fewer, evaluation and the linear probe follow one
another as in the official README and get-started page, and fetch their checkpoints from a server on this machine.
"""

import math
import shlex
import shutil
import threading
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml

from beit.config import read_command_line
from beit.tasks.settings import LinearProbeConfig
from tests.integration.conftest import SMALL_MODEL
from tests.integration.test_finetuning import log_of, reported, write_data
from tests.shell import run
from tests.test_finetuning_recipes import BLOB, EVALUATIONS, OFFICIAL, PUBLISHED
from tests.test_recipes import OFFICIAL as OFFICIAL_PRETRAINING
from tests.test_recipes import PATHS_OF, settings_of
from tests.test_recipes import PUBLISHED as PUBLISHED_PRETRAINING

pytestmark = pytest.mark.slow

# What the get-started page gives for the linear probe, after the launcher and the script.
LINEAR_PROBE = f"""
    --model beit_base_patch16_224
    --pretrained_weights {BLOB}/beit_base_patch16_224_pt22k.pth
    --data_path /path/to/imagenet
    --lr 4e-3
    --output_dir /path/to/save"""

LAUNCH = ("-m", "torch.distributed.launch", "--nproc_per_node=2", "--master_port")
TINY = ("patch_size=8", "embed_dim=32", "depth=2", "num_heads=2")
SMALL = ("--model", "beit_tiny_patch16_224", "--model_kwargs", *TINY, "--input_size", "32")
SHORT = ("--epochs", "1", "--num_workers", "0", "--device", "cpu")
MADE_SMALL = {"model", "input_size", "batch_size", "epochs", "warmup_epochs", "nb_classes"}
CLASSES_22K, CLASSES_1K = 12, 6


@dataclass(frozen=True)
class Site:
    """What is published at an address on this machine, and the images that the commands are given.

    Attributes:
        folder: What is served.
        address: Takes the place of the official one.
        home: The library's cache.
        requests: The paths asked for, in order.
        many: Images of the first fine-tuning, a folder for each class.
        few: Images of the second one, with ``train`` and ``val``.
        runs: Where runs are written.
    """

    folder: Path
    address: str
    home: Path
    requests: list[str]
    many: Path
    few: Path
    runs: Path

    def publish(self, checkpoint: Path, *names: str) -> None:
        for name in names:
            shutil.copy(checkpoint, self.folder / f"{name}.pth")

    def run(self, text: str, script: str, *small: str | Path, launcher: tuple[str, ...] = ()) -> CompletedProcess:
        """Runs an official command from this server, with ``small`` behind it."""
        command = shlex.split(text.replace(BLOB, self.address))
        return run(*launcher, script, *command, *small, *SHORT, BEIT_HOME=str(self.home), no_proxy="127.0.0.1")

    def finetune(self, name: str, *more: str | Path, launcher: tuple[str, ...] = ()) -> CompletedProcess:
        """Runs one of the official fine-tuning commands into ``runs/name``, where nothing is yet."""
        data = self.many if name.endswith("_22k") else self.few
        small = (*SMALL, "--batch_size", "4", "--warmup_epochs", "0", "--nb_classes", "0", "--data_path", data)
        where = ("--output_dir", self.runs / name)
        return self.run(OFFICIAL[name], "run_class_finetuning.py", *small, *where, *more, launcher=launcher)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "beit").mkdir()
    requests: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    many = write_data(tmp_path_factory.mktemp("many"), CLASSES_22K, train=2, val=1) / "train"
    few = write_data(tmp_path_factory.mktemp("few"), CLASSES_1K, train=4, val=3)
    home, runs = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("runs")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as http:
        address = f"http://127.0.0.1:{http.server_address[1]}/beit"
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield Site(folder / "beit", address, home, requests, many, few, runs)
        http.shutdown()


def settings_written(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())


def assert_the_published_run(folder: Path, published: dict) -> None:
    """Whatever was not made small is as published, down to the run's own record of its settings."""
    written = settings_written(folder)
    expected = {name: value for name, value in published.items() if name not in MADE_SMALL}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in expected.items()}
    assert {name: written[name] for name in plain} == plain


def head_of(folder: Path) -> torch.Tensor:
    return torch.load(folder / "checkpoint-0.pth", weights_only=True)["model"]["head.weight"]


@pytest.fixture(scope="module")
def pretrained(site, images, tokenizer) -> Path:
    """The official pre-training on ImageNet-1k, whose checkpoint is published under both sizes' names."""
    small = (*SMALL_MODEL, "--batch_size", "8", "--warmup_epochs", "0", "--data_path", images)
    where = ("--discrete_vae_weight_path", tokenizer, "--output_dir", site.runs / "pretrain")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    official = OFFICIAL_PRETRAINING["pretrain_base_1k_800ep"]
    site.run(official, "run_beit_pretraining.py", *small, *where, launcher=torchrun)
    names = (f"beit_{size}_patch16_224_pt22k" for size in ("base", "large"))
    site.publish(site.runs / "pretrain" / "checkpoint-0.pth", *names)
    return site.runs / "pretrain"


@pytest.fixture(scope="module")
def intermediate(site, pretrained) -> Path:
    """The official fine-tuning of BEiT-large on ImageNet-22k, with DeepSpeed as given there."""
    done = site.finetune("finetune_large_22k")
    assert "its shared bias table copied into 2 blocks" in done.stderr
    names = (f"beit_{size}_patch16_224_pt22k_ft22k" for size in ("base", "large"))
    site.publish(site.runs / "finetune_large_22k" / "checkpoint-0.pth", *names)
    return site.runs / "finetune_large_22k"


@pytest.fixture(scope="module")
def finetuned(site, intermediate) -> tuple[Path, str]:
    """The official fine-tuning on ImageNet-1k after that on 22k, and the accuracy that it reports."""
    name = "finetune_base_pt22k_ft22k_224"
    # So short a training leaves the head at 0, where every evaluation gives ln(classes); this one begins far from it.
    done = site.finetune(name, "--init_scale", "100")
    assert f"the head has {CLASSES_22K} outputs, the model {CLASSES_1K}" in done.stderr
    released = (f"{model}_pt22k_ft22kto1k" for _, model, _, _ in EVALUATIONS)
    site.publish(site.runs / name / "checkpoint-0.pth", *released)
    return site.runs / name, reported(done.stderr)


def test_pretraining_on_imagenet_1k(pretrained):
    # Broken by a flag of the official command that its job cannot run with.
    (entry,) = log_of(pretrained)
    assert math.isfinite(entry["train_loss"])
    made_small = {"min_mask_patches_per_block", "num_mask_patches", "second_input_size", "discrete_vae_type"}
    published = PUBLISHED_PRETRAINING["pretrain_base_1k_800ep"]
    assert_the_published_run(pretrained, {name: published[name] for name in published.keys() - made_small})


def test_intermediate_finetuning_with_deepspeed(site, intermediate):
    # Broken by a chain of jobs in which one does not read what the other writes, or asks for validation images.
    assert_the_published_run(intermediate, PUBLISHED["finetune_large_22k"])
    assert head_of(intermediate).shape == (CLASSES_22K, 32)
    assert (intermediate / "deepspeed_config.json").exists()
    assert "test_acc1" not in log_of(intermediate)[-1]
    assert site.requests[0] == "/beit/beit_large_patch16_224_pt22k.pth"


def test_intermediate_finetuning_of_base_without_deepspeed(site, pretrained):
    site.finetune("finetune_base_22k", "--no_enable_deepspeed")
    folder = site.runs / "finetune_base_22k"
    assert_the_published_run(folder, PUBLISHED["finetune_base_22k"])
    assert head_of(folder).shape == (CLASSES_22K, 32)
    assert not (folder / "deepspeed_config.json").exists()


def test_finetuning_after_intermediate_finetuning(finetuned):
    folder, _ = finetuned
    assert_the_published_run(folder, PUBLISHED["finetune_base_pt22k_ft22k_224"] | {"init_scale": 100})
    assert head_of(folder).shape == (CLASSES_1K, 32)


def test_the_launcher_of_the_official_commands_with_deepspeed(site, intermediate, free_port):
    # Broken by the --local-rank that this launcher passes on, or by two processes that fetch one file at once.
    before = len(site.requests)
    done = site.finetune("finetune_large_pt22k_ft22k_224", launcher=(*LAUNCH, free_port))
    folder = site.runs / "finetune_large_pt22k_ft22k_224"
    assert_the_published_run(folder, PUBLISHED["finetune_large_pt22k_ft22k_224"])
    assert "batch 16 = 4 images x 2 processes x 2" in done.stderr
    assert (folder / "deepspeed_config.json").exists()
    assert site.requests[before:] == ["/beit/beit_large_patch16_224_pt22k_ft22k.pth"]


@pytest.mark.parametrize("size", ["base", "large"])
def test_finetuning_from_pretraining_with_mixup_and_cutmix(site, pretrained, size):
    name = f"finetune_{size}_pt22k_224"
    done = site.finetune(name)
    assert_the_published_run(site.runs / name, PUBLISHED[name])
    assert "its shared bias table copied into 2 blocks" in done.stderr
    (entry,) = log_of(site.runs / name)
    assert math.isfinite(entry["train_loss"])
    assert 0 <= entry["test_acc1"] <= 100


@pytest.mark.parametrize(("flags", "model"), [row[:2] for row in EVALUATIONS])
def test_evaluation_from_an_address(site, finetuned, flags, model):
    # Broken by an evaluation that takes an address for a path, or counts other than the run that wrote the file.
    text = f"{flags} --resume {BLOB}/{model}_pt22k_ft22kto1k.pth "
    done = site.run(text, "run_class_finetuning.py", *SMALL, "--data_path", site.few)
    assert reported(done.stderr) == finetuned[1]
    assert site.requests[-1] == f"/beit/{model}_pt22k_ft22kto1k.pth"


def test_evaluation_of_the_dead_address_itself(site, finetuned):
    # The file lies in the cache under its name, so nothing is fetched from wherever it has gone.
    flags, model, _, _ = EVALUATIONS[0]
    (site.home / "checkpoints").mkdir(exist_ok=True)
    shutil.copy(site.folder / f"{model}_pt22k_ft22kto1k.pth", site.home / "checkpoints")
    text = shlex.split(f"{flags} --resume {BLOB}/{model}_pt22k_ft22kto1k.pth ")
    small = (*SMALL, *SHORT, "--data_path", site.few)
    done = run("run_class_finetuning.py", *text, *small, BEIT_HOME=str(site.home), BEIT_OFFLINE="1")
    assert reported(done.stderr) == finetuned[1]


def test_the_official_linear_probe_means_what_the_recipe_says():
    # Broken by an official flag that is spelled otherwise here, or read into another setting.
    given = vars(read_command_line(LinearProbeConfig, shlex.split(LINEAR_PROBE), "run_linear_eval.py", ""))
    recipe = settings_of("linear_probe_base")
    assert (given["opt"], recipe["weight_decay"]) == ("adamw", 1e-4)  # what it is where no flag gives it
    assert {name for name in given if given[name] != recipe[name]} == {
        *PATHS_OF["linear"],
        "weight_decay",
        "total_batch_size",
    }
    row = {"batch_size": 128, "lr": 4e-3, "epochs": 100, "weight_decay": None, "input_size": None}
    assert {name: given[name] for name in row} == row
    assert given["avgpool_patchtokens"]


def test_the_linear_probe(site, pretrained, free_port):
    small = (*SMALL, "--patch_size", "8", "--batch_size_per_gpu", "4", "--data_path", site.few)
    folder = site.runs / "probe"
    launcher = (*LAUNCH, free_port)
    done = site.run(LINEAR_PROBE, "run_linear_eval.py", *small, "--output_dir", folder, launcher=launcher)
    assert "* Acc@1" in done.stderr
    assert settings_written(folder)["lr"] == 4e-3
    (entry,) = log_of(folder)
    assert entry["test_acc1"] == max(entry[f"test_layer{layer}_cls_mean_acc1"] for layer in range(2))
    assert "/beit/beit_base_patch16_224_pt22k.pth" in site.requests
