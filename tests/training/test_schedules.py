"""Schedules against the stored values of the official ones."""

import json

import pytest

from beit.training.schedules import WarmupCosine, WarmupPoly, duration_in_steps, warn_of_rate


def test_cosine_equals_the_stored_schedules(golden):
    for case in json.loads((golden / "schedules.json").read_text()):
        args = case["args"]
        per_epoch = args["niter_per_ep"]
        warmup = duration_in_steps(
            epochs=args.get("warmup_epochs", 0), steps=args.get("warmup_steps", -1), steps_per_epoch=per_epoch
        )
        schedule = WarmupCosine(
            args["base_value"],
            args["final_value"],
            args["epochs"] * per_epoch,
            warmup,
            args.get("start_warmup_value", 0.0),
        )
        # Breaks if the cosine does not start again at the base value, or the warm-up leaves an end out.
        assert [schedule(step) for step in range(case["n"])] == pytest.approx(case["values"], rel=1e-12, abs=1e-18)


def test_warmup_in_steps_alone():
    schedule = WarmupCosine(1.0, 0.0, 100, duration_in_steps(epochs=0, steps=10, steps_per_epoch=5))
    assert schedule(0) == 0.0
    assert schedule(9) == schedule(10) == 1.0


@pytest.mark.parametrize("warmup", [20, 50])
def test_warmup_as_long_as_the_run_or_longer(warmup):
    schedule = WarmupCosine(1.0, 0.0, 20, warmup)
    assert [schedule(step) for step in range(20)] == pytest.approx([step / (warmup - 1) for step in range(20)])


@pytest.mark.parametrize(
    ("rate", "warning"),
    [
        (WarmupCosine(1.5e-6, 1e-5, 100, 10), "rises from 1.5e-06 to --min_lr 1e-05: lower that, to 7.5e-08"),
        (WarmupPoly(1e-4, 2e-4, 100), "rises from 0.0001 to --min_lr 0.0002: lower that, to 5e-06"),
        (WarmupCosine(1e-3, 0.0, 100, 100), "the warm-up, 100 steps, is as long as the run, 100, or longer"),
        (WarmupCosine(1e-3, 1e-3, 100, 99), ""),
    ],
)
def test_a_rate_that_rises_to_the_end_is_warned_of(rate, warning, caplog):
    warn_of_rate(rate)
    assert warning in caplog.text
    assert len(caplog.records) == bool(warning)


def test_one_step_of_warmup_starts_at_its_start():
    assert WarmupCosine(1.0, 0.0, 10, 1)(0) == 0.0


@pytest.mark.parametrize(("base", "total", "warmup"), [(7e-4, 160_000, 1500), (2e-5, 320_000, 3000)])  # base, large
@pytest.mark.parametrize("scale", [1.0, 0.65**13, 0.95**25])
def test_poly_with_a_multiplied_warmup_equals_its_definition(base, total, warmup, scale):
    # Breaks if the warm-up is added instead of multiplied, runs to another end, or includes its last step.
    schedule = WarmupPoly(base, 0.0, total, warmup, warmup_ratio=1e-6)
    for t in (0, 1, 750, 1499, 1500, 2999, 3000, 80_000, total - 1):
        expected = base * scale * (1 - t / total)
        if t < warmup:
            expected *= 1 - (1 - t / warmup) * (1 - 1e-6)
        assert schedule(t) * scale == pytest.approx(expected, rel=1e-12)
    assert schedule(0) == pytest.approx(base * 1e-6)
    assert schedule(total) == 0.0


def test_poly_ends_at_its_final_value_by_its_power():
    schedule = WarmupPoly(1.0, 0.2, 10, power=2.0)
    assert schedule(5) == pytest.approx(0.8 * 0.25 + 0.2)
    assert schedule(10) == schedule(11) == pytest.approx(0.2)
