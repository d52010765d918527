import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import InterpolatedUnivariateSpline
from torch._subclasses.fake_tensor import FakeTensorMode

from beit.errors import InputError
from beit.relative_position import (
    bias_by_rows,
    bias_by_sliding,
    geometric_ratio,
    num_table_rows,
    relative_position_bias,
    relative_position_index,
    resize_table,
    source_positions,
)

windows = st.tuples(st.integers(1, 7), st.integers(1, 7))
STORED = {"7to9": (4, 5), "27to47": (14, 24)}


def naive_index(window):
    height, width = window
    rows = {}
    for vertical in range(1 - height, height):
        for horizontal in range(1 - width, width):
            rows[vertical, horizontal] = len(rows)
    patches = [(row, column) for row in range(height) for column in range(width)]
    index = [[len(rows) + 2] + [len(rows)] * len(patches)]
    for query in patches:
        index.append([len(rows) + 1] + [rows[query[0] - key[0], query[1] - key[1]] for key in patches])
    return torch.tensor(index)


@given(windows)
def test_index_equals_a_count_over_all_pairs(window):
    # Breaks when an offset changes its sign, the strides mix height with width, or two class token rows change places.
    index = relative_position_index(window)
    assert index.dtype == torch.int64
    assert torch.equal(index, naive_index(window))
    assert sorted(index.unique().tolist()) == list(range(num_table_rows(window)))


def test_index_equals_the_official_buffer(golden):
    # Breaks when a released bias table would be read in another order.
    stored = torch.load(golden / "mim_small.pt", weights_only=True)["variants"]["shared_relpos_ls"]["state_dict"]
    assert torch.equal(relative_position_index((4, 4)), stored["rel_pos_bias.relative_position_index"])


@given(windows)
def test_bias_is_the_table_read_through_the_index(window):
    # Breaks when heads and rows are mixed by the reshape.
    table, index = torch.randn(num_table_rows(window), 3), relative_position_index(window)
    ways = (relative_position_bias(table, index, window), bias_by_sliding(table, window), bias_by_rows(table, window))
    for bias in ways:
        assert bias.is_contiguous()
        assert torch.equal(bias, table[index].permute(2, 0, 1))


@given(windows)
def test_a_table_has_the_gradient_of_a_gather(window):
    # Breaks when on a GPU, which slides, or in half precision, a table learns otherwise than on a CPU, which gathers.
    table = torch.randn(num_table_rows(window), 3, dtype=torch.float64, requires_grad=True)
    index = relative_position_index(window)
    upstream = torch.randn(3, *index.shape, dtype=torch.float64)
    (expected,) = torch.autograd.grad(table[index].permute(2, 0, 1), table, upstream)
    for way in (bias_by_sliding, bias_by_rows):
        (gradient,) = torch.autograd.grad(way(table, window), table, upstream)
        torch.testing.assert_close(gradient, expected)


def test_half_precision_copies_rows(monkeypatch):
    # Breaks when the bias of large images is gathered one small element at a time, which takes three times as long.
    monkeypatch.setattr("beit.relative_position.bias_by_rows", lambda table, window: (table.dtype, window))
    table, index = torch.zeros(num_table_rows((2, 3)), 3), relative_position_index((2, 3))
    assert relative_position_bias(table, index, (2, 3)).dtype == torch.float32
    assert relative_position_bias(table.half(), index, (2, 3)) == (torch.float16, (2, 3))


def test_a_gpu_slides(monkeypatch):
    # Breaks when a GPU scatters the table's gradient.
    monkeypatch.setattr("beit.relative_position.bias_by_sliding", lambda table, window: (table.device.type, window))
    with FakeTensorMode():
        table = torch.empty(num_table_rows((2, 3)), 3, device="cuda")
        assert relative_position_bias(table, relative_position_index((2, 3)), (2, 3)) == ("cuda", (2, 3))


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("kind", ["rand", "smooth"])
def test_resize_equals_the_stored_numbers_to_the_last_bit(golden, name, kind):
    # Breaks with another interpolation, another order of the axes, another width of the bisection, a lost class row.
    stored = np.load(golden / "rel_pos_interp2d.npz")
    source, target = STORED[name]
    class_rows = torch.randn(3, 2)
    table = torch.cat((torch.from_numpy(stored[f"{name}_{kind}_src"]), class_rows))
    resized = resize_table(table, (source, source), (target, target))
    assert torch.equal(resized[:-3], torch.from_numpy(stored[f"{name}_{kind}_dst"]))
    assert torch.equal(resized[-3:], class_rows)


@pytest.mark.parametrize("name", STORED)
def test_geometric_grid_equals_the_stored_numbers(golden, name):
    # Breaks when the bisection returns its bound instead of its last middle.
    stored = np.load(golden / "rel_pos_interp2d.npz")
    assert geometric_ratio(*STORED[name]) == stored[f"{name}_q"]
    np.testing.assert_array_equal(source_positions(*STORED[name]), stored[f"{name}_x"])


@pytest.mark.parametrize("case", ["D_mim64_to_80", "E_cls64_to_80_head_mismatch"])
def test_resize_equals_the_official_checkpoint_loader(golden, case):
    # Breaks when a fine-tuning at another resolution would start from other tables than the official one.
    stored = torch.load(golden / "ckpt_transfer.pt", weights_only=True)
    source = stored["sources"][stored["cases"][case]["source"]]["state_dict"]
    for name, expected in stored["cases"][case]["result_transformed"].items():
        if name.endswith("relative_position_bias_table"):
            table = source.get(name, source.get("rel_pos_bias.relative_position_bias_table"))
            assert torch.equal(resize_table(table, (4, 4), (5, 5)), expected)


def test_torch_bicubic_would_not_do(golden):
    # Guards the reason for scipy: were these ever equal, the dependency could go.
    stored = np.load(golden / "rel_pos_interp2d.npz")
    source = torch.from_numpy(stored["27to47_smooth_src"]).t().reshape(1, 2, 27, 27)
    bicubic = F.interpolate(source, size=(47, 47), mode="bicubic", align_corners=False)
    expected = torch.from_numpy(stored["27to47_smooth_dst"]).t().reshape(1, 2, 47, 47)
    assert (bicubic - expected).abs().max() > 0.05 * expected.std()


@settings(deadline=None, max_examples=40)
@given(st.tuples(st.integers(3, 8), st.integers(3, 8)), windows)
def test_each_axis_of_a_window_has_its_own_ratio(source, target):
    # A product of two functions resizes to the product of the resized functions, so each axis is checked by a spline in
    # one dimension. Breaks when an axis takes the other's ratio or the grid is transposed.
    generator = np.random.default_rng(0)
    factors = [generator.normal(size=2 * length - 1) for length in source]
    expected = []
    for values, length, wanted in zip(factors, source, target, strict=True):
        spline = InterpolatedUnivariateSpline(source_positions(length, wanted), values, k=3, ext="const")
        expected.append(spline(np.arange(1 - wanted, wanted)))
    table = torch.cat((torch.from_numpy(np.outer(*factors)).reshape(-1, 1), torch.zeros(3, 1, dtype=torch.float64)))
    resized = resize_table(table, source, target)[:-3].reshape(2 * target[0] - 1, 2 * target[1] - 1)
    np.testing.assert_allclose(resized.numpy(), np.outer(*expected), atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(windows, windows)
def test_any_window_resizes_to_any_other(source, target):
    # Breaks on the odd ones: one or two patches along an axis, a smaller target, an axis that stays.
    table = torch.randn(num_table_rows(source), 2)
    resized = resize_table(table, source, target)
    assert resized.shape == (num_table_rows(target), 2)
    assert resized.dtype == table.dtype
    assert torch.isfinite(resized).all()
    flat = resize_table(torch.full_like(table, 0.7), source, target)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.7))


def test_an_axis_that_stays_keeps_its_values():
    # Breaks when an unchanged axis is stretched by the smallest ratio of the bisection, 1.01.
    table = torch.randn(num_table_rows((6, 4)), 2, dtype=torch.float64)
    before = table[:-3].reshape(11, 7, 2)
    after = resize_table(table, (6, 4), (6, 9))[:-3].reshape(11, 17, 2)
    torch.testing.assert_close(after[:, 8], before[:, 3])  # horizontal offset 0 is a knot of both grids
    assert torch.equal(resize_table(table, (6, 4), (6, 4)), table)


def test_offsets_outside_the_grid_take_the_edge():
    # From 3 patches the grid reaches 1 + 1.5 = 2.5 at most. Breaks when the spline is extrapolated.
    table = torch.randn(num_table_rows((3, 3)), 1)
    resized = resize_table(table, (3, 3), (20, 20))[:-3].reshape(39, 39)
    assert (resized[22:, 22:] == resized[22, 22]).all()
    torch.testing.assert_close(resized[22, 22], table[:-3].reshape(5, 5)[4, 4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_resize_keeps_the_dtype_and_no_graph(dtype):
    # Breaks when a half-precision table reaches NumPy, or the resized table hangs on the old parameter.
    table = torch.nn.Parameter(torch.randn(num_table_rows((4, 4)), 2, dtype=dtype))
    resized = resize_table(table, (4, 4), (5, 6))
    assert resized.dtype == dtype
    assert not resized.requires_grad
    assert resize_table(table, (4, 4), (4, 4)).data_ptr() != table.data_ptr()


@pytest.mark.parametrize(
    ("shape", "source", "target", "message"),
    [
        ((732, 12), (14, 15), (24, 24), r"14 x 15 patches has shape \(786, heads\).*\(732, 12\)"),
        ((732,), (14, 14), (24, 24), r"\(732,\)"),
    ],
)
def test_wrong_shapes_are_named(shape, source, target, message):
    # Breaks when a mismatch ends in a reshape error somewhere inside.
    with pytest.raises(InputError, match=message):
        resize_table(torch.zeros(shape), source, target)
