"""Whatever is given as a flag, in YAML or in a dataclass, a command reads it or says in one line why it cannot."""

import contextlib
import io
from dataclasses import fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beit.__main__ import COMMANDS
from beit.config import dump_yaml, read_settings
from beit.launch import launch
from beit.registry import locate
from semantic_segmentation.__main__ import COMMANDS as SEGMENTATION

JOBS = {name: locate(command.settings) for name, command in {**COMMANDS, **SEGMENTATION}.items()}
FIRST = {"train": ["upernet_beit_tiny_64_slide_ade20k"], "test": ["upernet_beit_tiny_64_slide_ade20k", "x.pth"]}
QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# fmt: off
WORDS = [
    "", "0", "-1", "1", "1.0", "1e-3", "1e400", "nan", "-inf", "9" * 30, "9" * 5000, "0x10", "1_0", "64x", "64x64x64",
    "None", "null", "true", "~", "~nobody-at-all/x", "a\0b", "\udcff", "\x1b[2J", "a\nb", "x" * 300, "/", ".", "é", "?",
    "1,2", "(1,2)", "[", "{", "}", "{1..3}", "*", "&a", "!!int x", "2024-13-45", "2024-01-02", "- a", "a: b", "=", "a=",
    "depth=2024-13-45", "depth=.nan", "=1", "a=[", "depth=!!timestamp x", "[[[[", "<<: 3", "\t", "\ufeff", "[1, 2]",
    "[1, a]", "{a: 1}", "{1: 2}", ".inf", "1:30", "no", "!!python/name:os.system", "!!binary ä", '"', "'",
]
VALUES = [
    None, True, -1, 10**400, 1.5, float("nan"), b"a", object, {}, {1: 2}, {"a": float("inf")}, [], [[]], (1, "a"), {1},
]
# fmt: on


def outcome(job, *argv):
    """Runs a command that does nothing with its settings; returns its status and what it says."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        status = launch(JOBS[job], read_settings, "", [*FIRST.get(job, ()), *argv], job)
    errors = [line for line in told.getvalue().splitlines() if line.startswith("error: ")]
    assert "Traceback" not in told.getvalue()
    assert (status, len(errors)) in ((0, 0), (2, 1)), told.getvalue()
    return status


def names(job):
    """The settings of a job by any of their names."""
    keys = ((field.name, *field.metadata["aliases"], *field.metadata["counts_batches"]) for field in fields(JOBS[job]))
    return st.sampled_from(sorted({key for some in keys for key in some}))


@pytest.mark.parametrize("job", JOBS)
@QUICK
@given(data=st.data())
def test_any_flags(job, data):
    argv = []
    for name in data.draw(st.lists(names(job), min_size=1, max_size=3)):
        argv += [f"--{name}", *data.draw(st.lists(st.sampled_from(WORDS), max_size=2))]
    outcome(job, *argv)


@pytest.mark.parametrize("job", [name for name in JOBS if "config" not in vars(JOBS[name]())])
@QUICK
@given(data=st.data())
def test_any_yaml(job, data, tmp_path):
    lines = data.draw(st.lists(st.tuples(names(job), st.sampled_from(WORDS)), max_size=3))
    text = "".join(f"{name}: {word}\n" for name, word in lines) + data.draw(st.sampled_from(["", *WORDS]))
    (tmp_path / "settings.yaml").write_bytes(text.encode(errors="surrogatepass"))
    outcome(job, "--config", str(tmp_path / "settings.yaml"))


@pytest.mark.parametrize("job", JOBS)
@QUICK
@given(data=st.data())
def test_any_dataclass(job, data, tmp_path):
    # What is read is plain: it can be written to config.yaml and read again.
    values = st.one_of(st.sampled_from(WORDS), st.sampled_from(VALUES))
    own = st.sampled_from([field.name for field in fields(JOBS[job])])
    given = data.draw(st.dictionaries(own, values, max_size=3))
    with contextlib.suppress(ValueError):  # an InputError is one
        read = read_settings(JOBS[job](**given))
        assert read_settings(read) == read
        dump_yaml(read)
