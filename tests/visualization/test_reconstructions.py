"""The pictures of a masked image, against a computation patch by patch."""

import torch
from torch import nn

from beit.visualization.reconstructions import hide_patches, reconstruct

PATCH, GRID, VOCABULARY = 4, (2, 3), 256


class GreyTokenizer:
    """A patch's token is its first red value; a token decodes to that grey."""

    def encode(self, images):
        return (images[:, 0, ::PATCH, ::PATCH] * 255).round().long()

    def decode(self, ids):
        grey = (ids / 255).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
        return grey[:, None].expand(-1, 3, -1, -1)


class Counting(nn.Module):
    """Predicts token 10 for the first masked patch of a batch, 11 for the second, and so on."""

    def __init__(self):
        super().__init__()
        self.saw = None

    def forward(self, images, masks):
        assert not self.training
        self.saw = images
        return nn.functional.one_hot(torch.arange(int(masks.sum())) + 10, VOCABULARY).float()


def example():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8, generator=generator)
    masks = torch.tensor([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 1, 0]]], dtype=torch.bool)
    return images, masks


def test_predicted_tokens_stand_at_masked_patches_and_true_ones_elsewhere():
    images, masks = example()
    images[0, :, 0, 0] = 10  # the first prediction is right, by chance
    model = Counting()
    result = reconstruct(model, GreyTokenizer(), images, images, masks, (0.5,) * 3, (0.25,) * 3)

    torch.testing.assert_close(model.saw, (images / 255 - 0.5) / 0.25)
    guess = iter(range(10, 20))
    for number in range(2):
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                true = images[number, 0, row * PATCH, column * PATCH].item()
                expected = next(guess) if masks[number, row, column] else true
                region = (
                    number,
                    slice(None),
                    slice(row * PATCH, row * PATCH + 4),
                    slice(column * PATCH, column * PATCH + 4),
                )
                assert torch.allclose(result.predicted[region], torch.tensor(expected / 255)), (number, row, column)
                assert torch.allclose(result.tokenized[region], torch.tensor(true / 255))
    assert result.masked_patches.tolist() == [2, 3]
    assert result.correct[0].item() == 1
    assert result.captions()[0] == "1 of 2 tokens right"
    assert [len(images) for images in result.panels().values()] == [2, 2, 2, 2]


def test_masked_patches_are_grey_and_no_others():
    images, masks = example()
    hidden = hide_patches(images / 255, masks)
    by_pixel = masks.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None].expand_as(hidden)
    assert (hidden[by_pixel] == 0.5).all()
    assert torch.equal(hidden[~by_pixel], (images / 255)[~by_pixel])
