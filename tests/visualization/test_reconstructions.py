"""The pictures of a masked image, against a computation patch by patch."""

import torch
from torch import nn

from beit.targets import PixelTarget, TokenTarget
from beit.visualization.reconstructions import hide_patches, reconstruct

PATCH, GRID, VOCABULARY = 4, (2, 3), 256


class GreyTokenizer:
    """A patch's token is its first red value; a token decodes to that grey."""

    vocab_size = VOCABULARY

    def encode(self, images, index=None):
        ids = (images[:, 0, ::PATCH, ::PATCH] * 255).round().long()
        return ids if index is None else ids.flatten()[index]

    def decode(self, ids):
        grey = (ids / 255).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
        return grey[:, None].expand(-1, 3, -1, -1)


class Counting(nn.Module):
    """Predicts token 10 for the first masked patch of a batch, 11 for the second, and so on; of others token 0."""

    def forward(self, _images, masks):
        assert not self.training
        answers = torch.zeros(masks.shape, dtype=torch.long)
        answers[masks] = torch.arange(int(masks.sum())) + 10
        return nn.functional.one_hot(answers.flatten(1), VOCABULARY).float()


def outputs_of_all(model, batch):
    return model(batch["image"], batch["mask"])


def example():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8, generator=generator)
    masks = torch.tensor([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 1, 0]]], dtype=torch.bool)
    return images, masks


def test_predicted_tokens_stand_at_masked_patches_and_true_ones_elsewhere():
    images, masks = example()
    images[0, :, 0, 0], images[1, :, 0, 2 * PATCH] = 10, 12  # the first predictions of each are right, by chance
    batch = {"image": images, "token_image": images, "mask": masks}
    panels, captions = reconstruct(Counting(), outputs_of_all, TokenTarget(GreyTokenizer()), batch)

    guess = iter(range(10, 20))
    for number in range(2):
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                true = images[number, 0, row * PATCH, column * PATCH].item()
                expected = next(guess) if masks[number, row, column] else true
                rows, columns = (slice(place * PATCH, place * PATCH + PATCH) for place in (row, column))
                region = (number, slice(None), rows, columns)
                predicted = panels["predicted tokens decoded"][region]
                assert torch.allclose(predicted, torch.tensor(expected / 255)), (number, row, column)
                assert torch.allclose(panels["tokens decoded"][region], torch.tensor(true / 255))
    assert captions == ["1 of 2 tokens right", "1 of 3 tokens right"]
    titles = ["image", "masked", "tokens decoded", "predicted tokens decoded", "predictions in the image"]
    assert list(panels) == titles
    assert [len(images) for images in panels.values()] == [2, 2, 2, 2, 2]
    hidden = masks.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
    pasted = torch.where(hidden, panels["predicted tokens decoded"], images / 255)
    torch.testing.assert_close(panels["predictions in the image"], pasted)


def test_in_several_passes_the_surest_patches_are_seen_in_the_next_one():
    # Three masked patches in three passes: after them ceil(3 cos 30°) = 3, ceil(3 cos 60°) = 2 and no patch is left.
    images, masks = torch.zeros(1, 3, 8, 12, dtype=torch.uint8), torch.tensor([[[1, 1, 0], [0, 1, 0]]]).bool()
    seen = []

    def predict(_model, batch):
        seen.append((batch["mask"].clone(), batch["image"][:, 0, ::PATCH, ::PATCH].clone()))
        logits = torch.zeros(1, 6, VOCABULARY)
        for patch, (token, confidence) in {0: (10, 3.0), 1: (20, 9.0), 4: (30, 6.0)}.items():
            logits[0, patch, token + len(seen)] = confidence
        return logits

    panels, _ = reconstruct(
        nn.Identity(), predict, TokenTarget(GreyTokenizer()), {"image": images, "token_image": images, "mask": masks}, 3
    )
    left = [mask.flatten().nonzero().flatten().tolist() for mask, _ in seen]
    assert left == [[0, 1, 4], [0, 1, 4], [0, 4]]
    assert seen[2][1].flatten().tolist() == [12, 22, 0, 0, 32, 0]  # what the second pass predicted, where it was masked
    drawn = (panels["predicted tokens decoded"][0, 0, ::PATCH, ::PATCH] * 255).round().flatten().tolist()
    assert drawn == [13, 22, 0, 0, 33, 0]  # kept from the pass after which it was no longer masked


def test_predicted_pixels_stand_at_masked_patches_and_true_ones_elsewhere():
    # A model that says 0 of every number: in raw pixels of mean 0.5 that is grey, and no variance is explained.
    images, masks = example()
    target = PixelTarget((PATCH, PATCH), (0.5,) * 3, (0.25,) * 3, normalised=False)

    def nothing(_model, batch):
        return torch.zeros(2, 6, 3 * PATCH * PATCH)

    panels, captions = reconstruct(nn.Identity(), nothing, target, {"image": images, "mask": masks})
    torch.testing.assert_close(panels["predicted pixels"], hide_patches(images / 255, masks))
    for number, caption in enumerate(captions):
        hidden = images[number].unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)[:, masks[number]] / 255  # (3, m, p, p)
        r2 = 1 - ((hidden - 0.5) ** 2).sum() / ((hidden - hidden.mean()) ** 2).sum()
        assert caption == f"r2 {r2.item():.2f}"


def test_masked_patches_are_grey_and_no_others():
    images, masks = example()
    hidden = hide_patches(images / 255, masks)
    by_pixel = masks.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None].expand_as(hidden)
    assert (hidden[by_pixel] == 0.5).all()
    assert torch.equal(hidden[~by_pixel], (images / 255)[~by_pixel])
