"""beit.config: dataclass <-> flags <-> YAML."""

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from beit.config import Size, dump_yaml, option, read_command_line, read_yaml
from beit.errors import InputError


@dataclass(frozen=True)
class Config:
    epochs: int = option(300, "passes over the data")
    lr: float = option(5e-4, "learning rate")
    clip_grad: float | None = option(None, "largest gradient norm")
    opt_betas: tuple[float, ...] = option((0.9, 0.999), "decay rates of Adam")
    model: str = option("base", "model name")
    model_kwargs: dict[str, Any] | None = option(None, "constructor arguments")
    input_size: Size = option(224, "pixels")
    pin_mem: bool = option(True, "pin memory", off="--no_pin_mem")
    abs_pos_emb: bool = option(False, "absolute positions")
    amp_dtype: str = option("auto", "number format, 100 % of the time", choices=("auto", "fp16"))
    local_rank: int = option(-1, "rank")
    amp_forward: bool = option(True, "mixed precision", written_out=True)
    layers: tuple[int, ...] = option((), "blocks")
    warmup_lr: float = option(1e-6, "unused", no_effect="the warm-up starts at 0")


def read(*argv: str) -> Config:
    return read_command_line(Config, argv, "prog", "text")


def test_defaults_when_nothing_is_given():
    assert read() == Config()


def test_flags_are_converted_to_the_fields_types():
    config = read(
        *("--epochs", "3", "--lr", "1e-3", "--clip_grad", "3.0", "--opt_betas", "0.9", "0.98", "--no_pin_mem"),
        *("--abs_pos_emb", "--input_size", "192x256", "--model_kwargs", "depth=6", "qkv_bias=false"),
    )
    assert (config.epochs, config.lr, config.clip_grad, config.opt_betas) == (3, 1e-3, 3.0, (0.9, 0.98))
    assert (config.pin_mem, config.abs_pos_emb, config.input_size) == (False, True, (192, 256))
    assert config.model_kwargs == {"depth": 6, "qkv_bias": False}


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--amp_forward", "false"], False),
        (["--amp_forward=0"], False),
        (["--amp_forward", "Off"], False),
        (["--no_amp_forward"], False),
        (["--amp_forward", "True"], True),
        (["--amp_forward", "1", "--epochs", "3"], True),
        (["--amp_forward", "--epochs", "3"], True),
    ],
)
def test_a_truth_value_may_be_written_out(argv, value):
    # As the official linear evaluation takes it.
    assert read(*argv).amp_forward is value
    with pytest.raises(InputError, match="'maybe' is neither true nor false"):
        read("--amp_forward", "maybe")


def test_whole_numbers_in_a_row(tmp_path):
    assert read("--layers", "3", "-1").layers == (3, -1)
    (tmp_path / "config.yaml").write_text(dump_yaml(read("--layers", "3", "-1")))
    assert read("--config", str(tmp_path / "config.yaml")).layers == (3, -1)
    with pytest.raises(InputError, match=r"1\.5"):
        read("--layers", "1.5")


@pytest.mark.parametrize("spelling", [["--local-rank=2"], ["--local_rank=2"], ["--local-rank", "2"]])
def test_launchers_may_spell_local_rank_with_a_dash(spelling):
    assert read(*spelling).local_rank == 2


def test_flags_override_yaml_and_yaml_overrides_defaults(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("epochs: 10\nlr: 1e-3\nmodel: small\nabs_pos_emb: true\n")
    child = tmp_path / "child.yaml"
    child.write_text("base: base.yaml\nrecipe: {source: a paper}\nmodel: large\n")
    config = read("--config", str(child), "--epochs", "3", "--no_abs_pos_emb")
    # 1e-3 without a dot is a string to YAML 1.1: it must arrive as a number all the same
    assert (config.epochs, config.lr, config.model, config.abs_pos_emb) == (3, 1e-3, "large", False)


def test_dumped_settings_read_back_equal(tmp_path):
    config = read("--input_size", "192x256", "--opt_betas", "0.9", "0.98", "--model_kwargs", "depth=6")
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert read("--config", str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epoch", "3"], "unknown argument --epoch (did you mean '--epochs'?)"),
        (["--epochs", "three"], "invalid int value: 'three'"),
        (["--amp_dtype", "fp8"], "invalid choice: 'fp8'"),
        (["--input_size", "0"], "invalid size value"),
        (["--model_kwargs", "depth"], "invalid parse_assignment value"),
        (["--config", "nowhere.yaml"], "no settings file nowhere.yaml"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(argv, message):
    with pytest.raises(InputError) as caught:
        read(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3\n", "unknown key 'epoch' (did you mean 'epochs'?)"),
        ("epochs: many\n", "epochs: cannot use 'many'"),
        ("epochs: 3.5\n", "epochs: cannot use 3.5: a whole number expected"),
        ("epochs: true\n", "epochs: cannot use True: a whole number expected"),
        ("amp_dtype: fp8\n", "amp_dtype: cannot use 'fp8': choose auto, fp16"),
        ("base: settings.yaml\n", "leads back to a file that builds on it"),
        ("pin_mem: 1\n", "pin_mem: cannot use 1: true or false expected"),
        ("a: [\n", "is not a YAML file"),
        ("- 3\n", "must hold 'key: value' lines"),
        ("x: !!python/object/apply:os.system [echo]\n", "is not a YAML file"),
    ],
)
def test_mistakes_in_yaml_name_the_file(tmp_path, text, message):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_yaml(Config, str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flag_without_effect_says_so_when_used(caplog):
    with caplog.at_level(logging.WARNING):
        read()
        assert not caplog.records
        read("--warmup_lr", "1e-5")
    assert [record.getMessage() for record in caplog.records] == ["--warmup_lr has no effect: the warm-up starts at 0"]


def test_help_shows_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in yaml.safe_load(dump_yaml(Config())))
    assert "--no_pin_mem" in text
    assert "(default: 300)" in text
    assert "100 % of the time" in text
