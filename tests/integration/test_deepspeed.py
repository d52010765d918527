"""--enable_deepspeed in fine-tuning and pre-training: the same training, other checkpoints."""

import json
import re
from pathlib import Path

import pytest
import torch

from beit.storage import save_checkpoint
from beit.zoo import create_model
from tests.integration.test_finetuning import KILLED, NOTHING_RANDOM, SCRIPT, TORCHRUN, log_of, write_data
from tests.shell import run

pytestmark = pytest.mark.slow

PRETRAIN = "run_beit_pretraining.py"


@pytest.fixture(scope="module")
def ten(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("ten"), classes=10, train=4, val=3)


@pytest.fixture(scope="module")
def flags(ten) -> tuple[str, ...]:
    small = (
        "--model",
        "beit_tiny_patch16_224",
        "--model_kwargs",
        "patch_size=8",
        "embed_dim=32",
        "depth=2",
        "num_heads=2",
    )
    run_ = ("--input_size", "32", "--batch_size", "8", "--epochs", "3", "--warmup_epochs", "1", "--save_ckpt_freq", "1")
    where = ("--device", "cpu", "--num_workers", "0", "--data_path", str(ten))
    return (*small, *run_, *where, *NOTHING_RANDOM, "--lr", "1e-3", "--init_scale", "1", "--clip_grad", "1.0")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, flags) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    run(SCRIPT, *flags, "--output_dir", folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint-2.pth", weights_only=True)["model"]


# A tenth of the smallest lr: Adam moves a weight whose gradient is mostly rounding error by a share of lr a step where
# sums are in another order; state at the wrong parameter moves it by several lr.
ANOTHER_ORDER = 5e-5


def assert_close(folder: Path, reference: Path, tolerance: float) -> None:
    ours, theirs = weights(folder), weights(reference)
    assert ours.keys() == theirs.keys()
    assert max((tensor - theirs[name]).abs().max().item() for name, tensor in ours.items()) <= tolerance
    last, expected = (log_of(path)[-1] for path in (folder, reference))
    for name in ("train_loss", "train_grad_norm", "train_lr"):
        assert last[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize("stage", ["0", "1", "2"])
def test_one_process_equals_the_plain_loop_and_a_killed_run_itself(tmp_path, flags, plain, stage):
    deep = (*flags, "--enable_deepspeed", "--zero_stage", stage, "--save_ckpt_steps", "2")
    run(SCRIPT, *deep, "--output_dir", tmp_path / "whole", TORCH_EXTENSIONS_DIR=str(tmp_path / "compiled"))
    assert not (tmp_path / "compiled").exists()  # a minute of C++, which gloo does not need
    # Breaks if the loss is divided twice by the batches, or the schedules do not reach DeepSpeed's optimizer.
    assert_close(tmp_path / "whole", plain, ANOTHER_ORDER)
    settings = json.loads((tmp_path / "whole" / "deepspeed_config.json").read_text())
    assert settings["zero_optimization"]["stage"] == int(stage)
    assert (tmp_path / "whole" / "checkpoint-2").is_dir()

    killed = run(KILLED, "step", "8", "--", *deep, "--output_dir", tmp_path / "killed", check=False)
    assert killed.returncode == -9, killed.stderr
    finished = run(SCRIPT, *deep, "--output_dir", tmp_path / "killed")
    assert "resuming" in finished.stderr
    assert_close(tmp_path / "killed", tmp_path / "whole", 0.0)


def test_two_processes_share_optimizer_and_gradients(tmp_path, flags, plain, free_port):
    deep = (*flags, "--enable_deepspeed", "--zero_stage", "2", "--batch_size", "2", "--update_freq", "2")
    run(*TORCHRUN, free_port, SCRIPT, *deep, "--output_dir", tmp_path)
    assert_close(tmp_path, plain, ANOTHER_ORDER)
    assert len(list((tmp_path / "checkpoint-2").glob("*_optim_states.pt"))) == 2
    # The plain file beside it is read by everyone, here by an evaluation without DeepSpeed …
    alone = run(SCRIPT, *flags, "--eval", "--resume", tmp_path / "checkpoint-2.pth")
    assert "* Acc@1" in alone.stderr
    # … but to resume it takes as many processes, and DeepSpeed.
    for extra, message in ((deep[len(flags) :], "can be resumed by as many"), ((), "add --enable_deepspeed")):
        refused = run(SCRIPT, *flags, *extra, "--output_dir", tmp_path, "--epochs", "4", check=False)
        assert refused.returncode == 2
        assert len(re.findall(rf"^error: .*{message}", refused.stderr, re.MULTILINE)) == 1


def test_pretraining_equals_the_plain_loop_from_given_weights_on(tmp_path, pretraining_flags):
    # Breaks if the weights come after DeepSpeed has made its own copy of them.
    torch.manual_seed(1)
    model = create_model(
        "beit_tiny_patch16_224_8k_vocab", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, vocab_size=16,
        use_shared_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1,
    )  # fmt: skip
    save_checkpoint(tmp_path / "start.pth", {"model": model.state_dict()})
    small = (*pretraining_flags, "--drop_path", "0", "--clip_grad", "1.0", "--init_from", tmp_path / "start.pth")
    run(PRETRAIN, *small, "--output_dir", tmp_path / "plain")
    deep = (
        *small,
        "--enable_deepspeed",
        "--zero_stage",
        "2",
        "--output_dir",
        tmp_path / "deep",
        "--save_ckpt_freq",
        "1",
    )
    run(PRETRAIN, *deep)
    assert_close(tmp_path / "deep", tmp_path / "plain", ANOTHER_ORDER)
    assert not torch.equal(weights(tmp_path / "deep")["cls_token"], model.cls_token)
    # Another target is refused by the same line as without DeepSpeed.
    refused = run(PRETRAIN, *deep, "--epochs", "4", "--target", "pixels", check=False)
    assert refused.returncode == 2
    assert "another prediction target" in refused.stderr


def test_a_piece_that_would_run_code_is_refused(tmp_path, flags):
    deep = (*flags, "--enable_deepspeed", "--epochs", "1", "--output_dir", tmp_path)
    run(SCRIPT, *deep)
    (piece,) = (tmp_path / "checkpoint-0").glob("*model_states.pt")
    torch.save({"module": Marker(tmp_path / "code was run")}, piece)
    refused = run(SCRIPT, *deep, "--epochs", "2", check=False)
    assert refused.returncode == 2
    assert "refused" in refused.stderr
    assert not (tmp_path / "code was run").exists()


class Marker:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_without_deepspeed_one_line_names_the_extra(tmp_path, flags):
    (tmp_path / "deepspeed.py").write_text("raise ImportError('not installed')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[0] = 'x'; import runpy; "
    code += f"runpy.run_path({SCRIPT!r}, run_name='__main__')"
    refused = run("-c", code, *flags, "--enable_deepspeed", check=False)
    assert refused.returncode == 2
    assert len(re.findall(r"^error: .*pip install deepspeed", refused.stderr, re.MULTILINE)) == 1
