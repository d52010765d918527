"""Who a process is, from the environments of the launchers."""

import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from beit.errors import InputError
from beit.relative_position import resize_table
from beit.tokenizers.dvae import codebook_statistics
from beit.training.distributed import is_loss_of_another, on_main, select_device, threads_left
from beit.training.placement import Placement, find_placement, first_slurm_host, leads, may_follow_another
from beit.visualization.attention import mean_distances, patch_distances
from tests.shell import ROOT, run


def test_one_plain_process():
    assert find_placement({}) == Placement(0, 1, 0)


def test_torchrun():
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "99"}
    assert find_placement(env) == Placement(5, 8, 1, "env://")


def test_local_rank_of_old_launchers_counts_only_without_the_variable():
    env = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "head", "MASTER_PORT": "99"}
    assert find_placement(env, local_rank=3).local_rank == 3
    assert find_placement({**env, "LOCAL_RANK": "1"}, local_rank=3).local_rank == 1


def test_slurm_under_srun():
    env = {
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURM_JOB_ID": "1234567",
    }
    assert find_placement(env) == Placement(9, 16, 1, f"tcp://gpu03:{20000 + 1234567 % 20000}", True)
    assert find_placement({**env, "MASTER_ADDR": "head", "MASTER_PORT": "99"}).init_method == "tcp://head:99"


def test_slurm_allocation_without_srun_is_one_process():
    # Breaks if SLURM_NTASKS were read: a plain `python run_….py` in a batch script would wait for 15 others.
    assert find_placement({"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}) == Placement(0, 1, 0)


def test_open_mpi_only_when_asked_for():
    env = {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "MASTER_ADDR": "head",
        "MASTER_PORT": "99",
    }
    assert find_placement(env, use_open_mpi=True) == Placement(3, 4, 1, "tcp://head:99", True)
    assert find_placement(env) == Placement(0, 1, 0)
    with pytest.raises(InputError, match="OMPI_COMM_WORLD_RANK"):
        find_placement({"MASTER_ADDR": "head", "MASTER_PORT": "99"}, use_open_mpi=True)


def test_one_process_tells_of_mistakes_whatever_started_it():
    # Breaks if each process of mpirun prints a misspelt flag, or the first one of a node where torchrun counts.
    mpi = {"OMPI_COMM_WORLD_RANK": "9" * 5000}
    first = {}, {"RANK": "x"}, mpi, {**mpi, "OMPI_COMM_WORLD_RANK": "00"}, {"RANK": "0", "SLURM_PROCID": "1"}
    assert all(leads(env) for env in first)  # without an address to meet at, mpirun's processes are runs of their own
    assert not any(leads(env) for env in ({"RANK": "8", "SLURM_PROCID": "0"}, {**mpi, "MASTER_ADDR": "head"}))


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "head", "MASTER_PORT": "99"}
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "MASTER_ADDR": "head"}
WRONG = [(TORCHRUN, name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
WRONG += [(TORCHRUN, name, value) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") for value in ("x", "-1", "9" * 5000)]
WRONG += [(TORCHRUN, "RANK", "2"), (TORCHRUN, "WORLD_SIZE", "0"), (TORCHRUN, "MASTER_PORT", "99999")]
WRONG += [(SRUN, name, "x") for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_JOB_ID", "MASTER_PORT")]


@pytest.mark.parametrize(("environment", "name", "value"), WRONG)
def test_an_environment_that_makes_no_sense_names_the_variable(environment, name, value):
    find_placement(environment)
    with pytest.raises(InputError, match=f"^{name}='{value}', no whole number from "):
        find_placement({**environment, name: value})


@pytest.mark.parametrize(
    ("environment", "lacks"), [({"WORLD_SIZE": "2"}, "RANK"), ({"RANK": "1"}, "WORLD_SIZE"), ({"RANK": "0"}, ""),
                               ({"WORLD_SIZE": "1"}, ""), ({"WORLD_SIZE": "2", **SRUN}, "")],
)  # fmt: skip
def test_half_of_a_launchers_variables_is_no_single_process(environment, lacks):
    # Breaks if a process of several goes its own way without a word.
    if not lacks:
        assert find_placement(environment).rank == 0
        return
    with pytest.raises(InputError, match=f"the launcher did not set {lacks}; .* or unset RANK and WORLD_SIZE"):
        find_placement(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("node1,node2", "node1"), ("gpu[03-07,11]", "gpu03"), ("a[1,2]-ib,b", "a1-ib")],
)
def test_first_slurm_host(nodes, first):
    assert first_slurm_host(nodes) == first


def test_cuda_without_cuda_says_so_and_uses_the_cpu(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("cuda", 0) == torch.device("cpu")
    assert "no CUDA device" in caplog.text


@pytest.mark.parametrize("name", ["xpu", "meta", "cuda:99", "cuda:x", "gpu", ""])
def test_a_device_that_is_none_of_ours_is_refused(name, monkeypatch):
    # Breaks when torch knows a device of that name, and fails once something is moved there.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match=f"--device {name}: use cuda, cpu or mps"):
        select_device(name, 0)


class OnMps(torch.Tensor):
    """A tensor like those on an Apple GPU, where float64 does not exist."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.Tensor.cpu:
                return args[0].as_subclass(torch.Tensor)
            if function is torch.Tensor.double:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return super().__torch_function__(function, types, args, kwargs or {})


CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("capability", "built", "remedy"),
    [
        ((7, 0), CUDA_13, r"pip install 'torch<2\.15' torchvision --index-url .*/cu126$"),  # V100
        ((7, 0), CUDA_12_6, None),
        ((8, 9), CUDA_12_6, None),  # sm_86 runs on it
        ((10, 0), CUDA_12_6, "install a newer one"),
        ((10, 0), [*CUDA_12_6, "compute_90"], None),  # compiled when it starts
        ((12, 1), CUDA_13, None),
        ((9, 0), ["sm_90a"], None),
        ((7, 0), ["compute_80"], r"pip install"),
        ((9, 0), ["gfx90a", "gfx942"], None),  # AMD's have other names
        ((7, 0), [], None),
    ],
)
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_pytorch_has_no_code_for_is_named_before_anything_else(name, capability, built, remedy, monkeypatch):
    made_current = []
    for function, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda _device: capability,
        "get_arch_list": lambda: built,
        "get_device_name": lambda _device: "Tesla V100-SXM2-32GB",
        "set_device": made_current.append,
    }.items():
        monkeypatch.setattr(torch.cuda, function, value)
    if remedy is None:
        assert select_device(name, 0) == torch.device("cuda", 0) == made_current[0]
        return
    found = f"was built without code for this Tesla V100-SXM2-32GB \\(sm_{capability[0]}{capability[1]}\\): .*{remedy}"
    with pytest.raises(InputError, match=found) as raised:
        select_device(name, 0)
    assert "\n" not in str(raised.value)
    assert not made_current


def test_float64_is_computed_on_the_host():
    attention = torch.rand(1, 2, 5, 5).as_subclass(OnMps)
    assert mean_distances(attention, patch_distances((2, 2), (8, 8))).shape == (1, 2)
    assert codebook_statistics(torch.tensor([3, 0, 3]).as_subclass(OnMps)).perplexity == pytest.approx(2)
    table = resize_table(torch.rand(3 * 3 + 3, 2).as_subclass(OnMps), (2, 2), (3, 3))
    assert table.shape == (5 * 5 + 3, 2)


def test_on_main_gives_the_result():
    assert on_main(lambda: 3) == 3


@pytest.mark.parametrize(
    ("environment", "again"),
    [
        ({}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "0", "SLURM_RESTART_COUNT": ""}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "many", "SLURM_RESTART_COUNT": "-1"}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "0"}, True),  # an agent that came later
        ({"SLURM_RESTART_COUNT": "1"}, True),
    ],
)
def test_whether_a_run_may_have_been_started_again(environment, again):
    assert may_follow_another(environment) is again


def test_the_loss_of_another_process_is_told_from_other_errors():
    closed = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:4213")
    assert is_loss_of_another(closed)
    assert is_loss_of_another(torch.distributed.DistBackendError("NCCL error in: ..., remote process exited"))
    assert not is_loss_of_another(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


TRAIN_AND_LEAVE = """
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
from beit.training import distributed
distributed.connect_alone(torch.device("cpu"))
DistributedDataParallel(torch.nn.Linear(2, 2))(torch.ones(1, 2)).sum().backward()
def threads():
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]
assert threads()
distributed.disconnect()
print("left:", *threads())
"""


@pytest.mark.slow
def test_no_thread_of_gloo_outlives_the_process_group():
    # Breaks if something keeps the group; a thread that outlives the interpreter too aborts the process, though rarely.
    # In a process of its own: what keeps it is a module that is first imported while there is a group.
    assert run("-c", TRAIN_AND_LEAVE).stdout.strip() == "left:"


def watch_a_thread(queue):
    before = threads_left()
    named, done = threading.Event(), threading.Event()

    def wait():
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("pt_gloo_loop")
        named.set()
        done.wait()

    threading.Thread(target=wait).start()
    named.wait()
    queue.put((before, threads_left()))
    done.set()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads have names under /proc on Linux only")
def test_threads_of_gloo_that_are_left_are_seen():
    # Breaks when a run on CPUs whose process group is kept by something ends with an abort in place of its status.
    # In a process of its own, as other tests leave such threads in this one; a fork has none of them.
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=watch_a_thread, args=(queue,))
    process.start()
    process.join()
    assert queue.get() == (False, True)


@pytest.mark.parametrize(("argv", "owner"), [("None", True), ("['--nonsense']", False)])
def test_only_a_process_started_for_the_job_is_ended_at_once_where_threads_are_left(argv, owner):
    # Breaks when a program that runs a job with arguments of its own is ended by it, as a test of many once was.
    code = f"""if True:
        import atexit, sys, types
        from beit import launch
        from beit.tasks import settings
        sys.modules["beit.training.distributed"] = types.SimpleNamespace(threads_left=lambda: True)
        atexit.register(print, "the interpreter ended")
        sys.exit(launch.launch(settings.PretrainingConfig, "", "", {argv}, "prog"))
    """
    done = subprocess.run([sys.executable, "-c", code, "--nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--nonsense" in done.stderr
    assert ("the interpreter ended" in done.stdout) is not owner
