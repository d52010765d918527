"""The launch files of docs/clusters/: run with commands that only write down how they were called."""

import itertools
import re
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from beit.commands.recipes import read_recipe
from beit.config import read_command_line
from beit.tasks.base import resolve_batch
from beit.tasks.settings import PretrainingConfig
from beit.training.distributed import CUDA_12_6

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "clusters"


@dataclass(frozen=True)
class Expected:
    """What a launch file is for."""

    recipe: str
    machines: int
    gpus: int  # on all machines
    amp_dtype: str


FILES = {
    "slurm_2x8_v100.sbatch": Expected("pretrain_base_22k", 2, 16, "fp16"),
    "slurm_elastic_2x8_v100.sbatch": Expected("pretrain_base_22k", 2, 16, "fp16"),
    "torchrun_2x8_v100.sh": Expected("pretrain_base_22k", 2, 16, "fp16"),
    "openmpi_2x8_v100.sh": Expected("pretrain_base_22k", 2, 16, "fp16"),
    "one_h200.sh": Expected("pretrain_base_22k", 1, 1, "bf16"),
    "slurm_8_h200.sbatch": Expected("pretrain_large_1k_800ep", 1, 8, "bf16"),
}
BATCH_FILES = [name for name in FILES if name.endswith(".sbatch")]
# sbatch's own options, by its manual.
SBATCH_OPTIONS = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "output"),
    *("open-mode", "signal", "requeue", "no-kill"),
}
RECORD = """#!/bin/bash
printf '%q ' "${0##*/}" "$@" >> "$RECORD"
echo >> "$RECORD"
"""
COMMANDS = {
    **dict.fromkeys(("python", "torchrun", "mpirun", "beit"), RECORD),
    "srun": RECORD + 'exit "$STATUS"\n',
    "scontrol": RECORD + '[ "$1" = show ] && printf "node1\\nnode2\\n"\nexit 0\n',
}
GIVEN = {
    **{"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "5", "SLURM_JOB_NODELIST": "node[1-2]"},
    **{"MASTER_ADDR": "node1", "HOSTS": "node1:8,node2:8"},
}


def calls(name: str, folder: Path, status: int = 0, **environment: str) -> list[list[str]]:
    """Runs a launch file; returns the commands that it called, word by word."""
    commands, record = folder / "bin", folder / "record"
    commands.mkdir()
    for command, text in COMMANDS.items():
        (commands / command).write_text(text)
        (commands / command).chmod(0o755)
    env = {"PATH": f"{commands}:/usr/bin:/bin", "RECORD": str(record), "STATUS": str(status), **GIVEN, **environment}
    done = subprocess.run(["bash", FOLDER / name], env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert not done.stderr
    return [shlex.split(line) for line in record.read_text().splitlines()]


def start_of(name: str, folder: Path, **environment: str) -> list[str]:
    """Returns the one command of a launch file that starts processes."""
    (command,) = [words for words in calls(name, folder, **environment) if words[0] not in ("scontrol", "beit")]
    return command


def config_of(command: list[str]) -> PretrainingConfig:
    flags = command[command.index("run_beit_pretraining.py") + 1 :]
    return read_command_line(PretrainingConfig, flags, "run_beit_pretraining.py", "")


def directives(name: str) -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", (FOLDER / name).read_text(), re.MULTILINE)
    return dict(lines)


def test_each_file_is_tested_and_told_of():
    assert {path.name for path in FOLDER.iterdir()} == FILES.keys()
    page = (ROOT / "docs" / "clusters.md").read_text()
    assert {name for name in FILES if f"(clusters/{name})" in page} == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_a_file_starts_the_published_run_shared_out_as_the_recipe_would(name, tmp_path):
    # Breaks with a flag that does not exist, a batch that is not the published one, a pattern that the shell expands.
    expected, config = FILES[name], config_of(start_of(name, tmp_path))
    recipe = read_recipe(expected.recipe)
    shared = resolve_batch(config, expected.gpus)
    assert shared.batch_size * shared.update_freq * expected.gpus == recipe.batch == 2048
    departures = {key for key, value in recipe.settings.items() if value != getattr(config, key)}
    sharing = {"batch_size", "update_freq", "total_batch_size", "amp_dtype", "compile", "tokenizer_compile"}
    surroundings = {"data_path", "discrete_vae_weight_path", "output_dir", "num_workers", "dist_on_itp", "dist_timeout"}
    assert departures <= sharing | surroundings
    assert config.amp_dtype == expected.amp_dtype
    assert re.fullmatch(r"/path/to/imagenet\S*/shards-\{000000\.\.\d{6}\}\.tar", config.data_path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_starts_one_process_for_each_gpu(name, tmp_path):
    expected, words = FILES[name], start_of(name, tmp_path)
    asked = directives(name) if name in BATCH_FILES else {}
    tasks = int(asked.get("nodes", 1)) * int(asked.get("ntasks-per-node", 1))
    if words[0] == "mpirun":
        tasks = int(words[words.index("-np") + 1])
        assert config_of(words).dist_on_itp
    if "torchrun" in words:
        flags = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
        most = int(flags.nnodes.split(":")[-1])
        tasks = most * int(flags.nproc_per_node)
        assert most == expected.machines
        assert flags.rdzv_endpoint == "node1:29500"
    assert tasks == expected.gpus
    if asked:
        assert int(asked["nodes"]) * int(asked["gpus-per-node"]) == expected.gpus
        assert asked.keys() <= SBATCH_OPTIONS


def test_the_elastic_file_keeps_the_batch_on_one_machine(tmp_path):
    shared = resolve_batch(config_of(start_of("slurm_elastic_2x8_v100.sbatch", tmp_path)), 8)
    assert (shared.batch_size, shared.update_freq) == (128, 2)


@pytest.mark.parametrize("name", [name for name in FILES if "2x8" in name])
def test_images_are_listed_before_processes_wait_for_it(name, tmp_path):
    # Breaks when the list of millions of images is made while the other processes' patience runs out.
    called = [words for words in calls(name, tmp_path) if words[0] != "scontrol"]
    assert [words[0] for words in called] == ["beit", called[1][0]]
    assert called[0][1:] == ["index", config_of(called[1]).data_path]


def test_the_elastic_file_sets_what_late_agents_need():
    # As the tests of elastic runs do.
    text = (FOLDER / "slurm_elastic_2x8_v100.sbatch").read_text()
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text


def test_open_mpi_hands_the_variables_on(tmp_path):
    # Breaks when what is set for NCCL counts on the first machine alone.
    words = start_of("openmpi_2x8_v100.sh", tmp_path, NCCL_SOCKET_IFNAME="eth0", BEIT_HOME="/shared", UNRELATED="1")
    handed_on = {after for word, after in itertools.pairwise(words) if word == "-x"}
    assert {"NCCL_SOCKET_IFNAME", "BEIT_HOME", "MASTER_ADDR"} <= handed_on
    assert "UNRELATED" not in handed_on


@pytest.mark.parametrize(
    ("name", "status", "seconds_left", "again"),
    [
        ("slurm_2x8_v100.sbatch", 143, 9999, True),  # SIGTERM, and it has saved
        ("slurm_2x8_v100.sbatch", 2, 9999, False),  # a mistake: it would be the same again
        ("slurm_8_h200.sbatch", 143, 9999, True),
        ("slurm_8_h200.sbatch", 0, 9999, False),
        ("slurm_elastic_2x8_v100.sbatch", 1, 280, True),
        ("slurm_elastic_2x8_v100.sbatch", 1, 9999, False),
        ("slurm_elastic_2x8_v100.sbatch", 0, 280, False),
    ],
)
def test_a_job_is_queued_again_when_its_time_was_up_and_not_when_it_failed(name, status, seconds_left, again, tmp_path):
    called = calls(name, tmp_path, status, SLURM_JOB_END_TIME=str(int(time.time()) + seconds_left))
    assert (["scontrol", "requeue", "7"] in called) is again


def test_files_for_v100s_say_which_pytorch_they_need():
    # Broken by a second place that says which PyTorch that is.
    torch, torchvision, *rest = CUDA_12_6.replace("'", "").split()
    lines = (ROOT / "requirements-v100.txt").read_text().splitlines()
    assert f"--extra-index-url {rest[1]}" in lines
    assert [line for line in lines if line[0] not in "#-"] == [torch.replace("<", ">=2.6,<"), f"{torchvision}>=0.21"]
    for name in FILES:
        assert ("requirements-v100.txt" in (FOLDER / name).read_text()) == ("v100" in name)
