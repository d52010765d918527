"""What a published model expects of its images. Without torch, for commands that only describe a checkpoint."""

COLOURS = 3  # channels of an image that is read as 8-bit RGB
IMAGENET_DEFAULT_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEFAULT_STD = (0.229, 0.224, 0.225)
IMAGENET_INCEPTION_MEAN = (0.5, 0.5, 0.5)
IMAGENET_INCEPTION_STD = (0.5, 0.5, 0.5)

CROP_PCT = 224 / 256
FULL_CROP_FROM = 384  # pixels


def default_crop_pct(size: tuple[int, int]) -> float:
    """Returns the share of the shorter side shown at evaluation: 224 of 256, and all of it from 384 pixels on."""
    return CROP_PCT if min(size) < FULL_CROP_FROM else 1.0


def normalization(imagenet: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the input's mean and standard deviation per channel, for images in [0, 1]: ImageNet's, or 0.5."""
    if imagenet:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
