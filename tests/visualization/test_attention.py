"""Attention maps, distances and bias images, against naive computations from the state dict."""

import math

import pytest
import torch
import torch.nn.functional as F

from beit.errors import InputError
from beit.relative_position import relative_position_bias, relative_position_index
from beit.visualization.attention import (
    attention_by_block,
    bias_images,
    bias_images_of,
    check_queries,
    default_queries,
    mean_distances,
    patch_distances,
    query_maps,
)
from beit.zoo import create_model

GRID, PATCH, HEADS, DIM = (3, 5), (4, 8), 2, 16
TINY = {"img_size": (12, 40), "patch_size": PATCH, "embed_dim": DIM, "depth": 3, "num_heads": HEADS}


def model_with_biases(name, **options):
    torch.manual_seed(0)
    model = create_model(name, **{**TINY, **options}).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    return model


def naive_bias(table):
    """The bias of each pair of tokens, from the definition of the table's rows: row-major query minus key offsets."""
    height, width = GRID
    bias = torch.empty(table.shape[1], height * width + 1, height * width + 1)
    for query in range(height * width + 1):
        for key in range(height * width + 1):
            if query == 0 or key == 0:
                row = len(table) - 3 + (2 if query == key else 0 if query == 0 else 1)
            else:
                (qy, qx), (ky, kx) = divmod(query - 1, width), divmod(key - 1, width)
                row = (qy - ky + height - 1) * (2 * width - 1) + qx - kx + width - 1
            bias[:, query, key] = table[row]
    return bias


def naive_attention(state, images, mask=None):
    """softmax(q kᵀ / sqrt(d) + bias) of every block, from the state dict alone."""
    patches = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    tokens = patches.flatten(2).transpose(1, 2)
    if mask is not None:
        tokens[mask.flatten(1)] = state["mask_token"][0, 0]
    tokens = torch.cat([state["cls_token"].expand(len(images), -1, -1), tokens], dim=1)
    for block in range(TINY["depth"]):
        own = {name.removeprefix(f"blocks.{block}."): t for name, t in state.items() if f"blocks.{block}." in name}
        x = F.layer_norm(tokens, (DIM,), own["norm1.weight"], own["norm1.bias"], 1e-6)
        q, k, v = (x @ own["attn.qkv.weight"].T).chunk(3, dim=-1)
        q, v = q + own["attn.q_bias"], v + own["attn.v_bias"]
        table = own.get("attn.relative_position_bias_table", state.get("rel_pos_bias.relative_position_bias_table"))
        bias, heads, size = naive_bias(table), [], DIM // HEADS
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size) + bias[head]
            heads.append(torch.softmax(logits, dim=-1))
        yield torch.stack(heads, dim=1)
        mixed = torch.cat([p @ v[..., h * size : (h + 1) * size] for h, p in enumerate(heads)], dim=-1)
        tokens = tokens + own["gamma_1"] * F.linear(mixed, own["attn.proj.weight"], own["attn.proj.bias"])
        x = F.layer_norm(tokens, (DIM,), own["norm2.weight"], own["norm2.bias"], 1e-6)
        x = F.gelu(F.linear(x, own["mlp.fc1.weight"], own["mlp.fc1.bias"]))
        tokens = tokens + own["gamma_2"] * F.linear(x, own["mlp.fc2.weight"], own["mlp.fc2.bias"])


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        ("beit_tiny_patch16_224", False),
        ("beit_tiny_patch16_224_8k_vocab", False),
        ("beit_tiny_patch16_224_8k_vocab", True),
    ],
)
def test_the_maps_are_the_eager_probabilities(name, masked):
    # Broken by a missing norm, bias, scale or query bias, by the block's output in place of its input, by a
    # transposed map, and by heads or patches in another order.
    model, images = model_with_biases(name), torch.randn(2, 3, 12, 40)
    mask = (torch.rand(2, *GRID) < 0.4) if masked else None
    found = [model.get_attention_maps(images, block, mask) for block in range(TINY["depth"])]
    expected = list(naive_attention(model.state_dict(), images, mask))
    for maps, naive in zip(found, expected, strict=True):
        torch.testing.assert_close(maps, naive, atol=2e-5, rtol=1e-4)
    queries = [(0, 0), (2, 3)]
    chosen = query_maps(found[1], queries, GRID)
    assert chosen.shape == (2, 2, HEADS, *GRID)
    for number, (row, column) in enumerate(queries):
        for y in range(GRID[0]):
            for x in range(GRID[1]):
                naive = expected[1][:, :, 1 + row * GRID[1] + column, 1 + y * GRID[1] + x]
                torch.testing.assert_close(chosen[:, number, :, y, x], naive, atol=2e-5, rtol=1e-4)


def test_one_pass_gives_what_the_model_gives_block_by_block():
    model, images = model_with_biases("beit_tiny_patch16_224"), torch.randn(1, 3, 12, 40)
    for block, maps in enumerate(attention_by_block(model, images)):
        assert torch.equal(maps, model.get_attention_maps(images, block))


def test_a_model_without_biases_has_maps_too():
    model = model_with_biases("beit_tiny_patch16_224", use_rel_pos_bias=False, use_abs_pos_emb=True)
    (*_, maps) = attention_by_block(model, torch.randn(1, 3, 12, 40))
    torch.testing.assert_close(maps.sum(-1), torch.ones(1, HEADS, 16))


@pytest.mark.parametrize("query", [(3, 0), (0, 5), (-1, 0), (0, -1)])
def test_a_patch_outside_the_image_is_refused(query):
    with pytest.raises(
        InputError,
        match=rf"--query {query[0]},{query[1]} is outside the image's 3 x 5 patches: rows are 0 to 2, columns 0 to 4",
    ):
        check_queries([query], GRID)


def test_distances_are_those_of_a_double_loop():
    # Broken by a class token that counts, by rows and columns of a patch exchanged, by distances in patches.
    attention = torch.rand(2, HEADS, 16, 16, dtype=torch.float64).softmax(-1)
    distances = patch_distances(GRID, PATCH)
    found = mean_distances(attention, distances)
    for image in range(2):
        for head in range(HEADS):
            total = 0.0
            for query in range(15):
                far = weight = 0.0
                for key in range(15):
                    down = (query // 5 - key // 5) * PATCH[0]
                    right = (query % 5 - key % 5) * PATCH[1]
                    probability = attention[image, head, query + 1, key + 1].item()
                    far += probability * math.hypot(down, right)
                    weight += probability
                total += far / weight
            assert found[image, head].item() == pytest.approx(total / 15, rel=1e-9)


def test_who_looks_at_himself_looks_no_distance_far_and_at_the_neighbour_one_patch():
    distances = patch_distances((1, 4), (16, 16))
    himself = torch.eye(5)[None, None]
    assert mean_distances(himself, distances).item() == 0
    neighbour = torch.zeros(1, 1, 5, 5)
    for query, key in ((0, 0), (1, 2), (2, 1), (3, 4), (4, 3)):
        neighbour[0, 0, query, key] = 1
    assert mean_distances(neighbour, distances).item() == 16


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (2, 2), (14, 14), (24, 32)])
def test_default_queries_are_in_the_image_and_all_different(grid):
    queries = default_queries(grid)
    assert len(set(queries)) == len(queries) >= 1
    assert all(0 <= row < grid[0] and 0 <= column < grid[1] for row, column in queries)


# Bias tables: against table rows at known offsets, and against the bias that the model adds.

SMALL = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}  # tables of 3 x 5 + 3 rows


def test_a_pixel_is_the_table_row_of_its_offset():
    # Rows count query minus key, row-major from (-1, -2): (0, 0) is row 7. A key one row below and two columns right of
    # the query is the offset (-1, -2), row 0; two columns left, (0, 2), is row 9.
    table = torch.arange(18.0)[:, None] * torch.tensor([1.0, 100.0])
    images = bias_images(table, (2, 3), "block 3")
    assert images.name == "block 3"
    assert images.grids.shape == (2, 3, 5)
    for head, factor in enumerate((1, 100)):
        assert images.grids[head, 1, 2] == 7 * factor
        assert images.grids[head, 1 + 1, 2 + 2] == 0
        assert images.grids[head, 1, 2 - 2] == 9 * factor
        assert images.class_token[head].tolist() == [15 * factor, 16 * factor, 17 * factor]


def test_the_image_is_what_attention_adds():
    # The image around a query, cut to the window, is the query's row of the bias. Broken by one that is not turned.
    table = torch.randn(18, 2)
    bias = relative_position_bias(table, relative_position_index((2, 3)), (2, 3))
    images = bias_images(table, (2, 3))
    for row in range(2):
        for column in range(3):
            around = images.grids[:, 1 - row : 3 - row, 2 - column : 5 - column]
            assert torch.equal(around.flatten(1), bias[:, 1 + row * 3 + column, 1:])
    assert torch.equal(images.class_token, torch.stack([bias[:, 0, 1], bias[:, 1, 0], bias[:, 0, 0]], dim=1))


def test_a_shared_table_is_one_a_table_of_each_block_several_and_none_none():
    shared = create_model("beit_tiny_patch16_224_8k_vocab", **SMALL)
    assert [images.name for images in bias_images_of(shared)] == ["all blocks"]
    own = create_model("beit_tiny_patch16_224", **SMALL)
    own.blocks[1].attn.relative_position_bias_table.data.normal_()
    images = bias_images_of(own)
    assert [image.name for image in images] == ["block 0", "block 1"]
    assert [bool(image.grids.any()) for image in images] == [False, True]
    assert bias_images_of(create_model("beit_tiny_patch16_224", use_rel_pos_bias=False, **SMALL)) == []
