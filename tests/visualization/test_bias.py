"""Bias tables as images, against table rows at known offsets and against the bias that the model adds."""

import torch

from beit.relative_position import relative_position_bias, relative_position_index
from beit.visualization.bias import bias_images, bias_images_of
from beit.zoo import create_model

WINDOW = (2, 3)  # tables of 3 x 5 + 3 rows
TINY = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}


def test_a_pixel_is_the_table_row_of_its_offset():
    # Rows count query minus key, row-major from (-1, -2): (0, 0) is row 7. A key one row below and two columns right of
    # the query is the offset (-1, -2), row 0; two columns left, (0, 2), is row 9.
    table = torch.arange(18.0)[:, None] * torch.tensor([1.0, 100.0])
    images = bias_images(table, WINDOW, "block 3")
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
    bias = relative_position_bias(table, relative_position_index(WINDOW), WINDOW)
    images = bias_images(table, WINDOW)
    for row in range(2):
        for column in range(3):
            around = images.grids[:, 1 - row : 3 - row, 2 - column : 5 - column]
            assert torch.equal(around.flatten(1), bias[:, 1 + row * 3 + column, 1:])
    assert torch.equal(images.class_token, torch.stack([bias[:, 0, 1], bias[:, 1, 0], bias[:, 0, 0]], dim=1))


def test_a_shared_table_is_one_a_table_of_each_block_several_and_none_none():
    shared = create_model("beit_tiny_patch16_224_8k_vocab", **TINY)
    assert [images.name for images in bias_images_of(shared)] == ["all blocks"]
    own = create_model("beit_tiny_patch16_224", **TINY)
    own.blocks[1].attn.relative_position_bias_table.data.normal_()
    images = bias_images_of(own)
    assert [image.name for image in images] == ["block 0", "block 1"]
    assert [bool(image.grids.any()) for image in images] == [False, True]
    assert bias_images_of(create_model("beit_tiny_patch16_224", use_rel_pos_bias=False, **TINY)) == []
