"""How many images fit on a GPU: an estimate on the safe side, from the sizes of a model.

It adds up what training keeps: weights, gradients, the optimizer's state, and what each image leaves for the backward
pass. The numbers of values per token were counted with autograd's saved tensors, and rounded up; the tests count again.
It is an estimate all the same: the first step of a run is the measurement.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from beit.zoo import create_model

AMP, FP32 = "amp", "fp32"

USABLE = 0.9  # of a card; the rest is for what the allocator cannot use
CONTEXT = 1.5e9  # bytes that CUDA, cuBLAS and NCCL take before the first tensor
# Bytes of a trained parameter: weight 4, gradient 4, its copy in DistributedDataParallel's buckets 4, Adam's moments 8,
# and in mixed precision the 16-bit copy, 2.
PER_PARAMETER = {AMP: 22, FP32: 20}
# Bytes that a block keeps of a value (token x channel) and of an attention weight (head x token x token), as if the GPU
# had no kernel that recomputes the latter. Counted: 40 and 6 in mixed precision, 72 and 4 in float32.
PER_VALUE = {AMP: 48, FP32: 84}
PER_ATTENTION_WEIGHT = {AMP: 6, FP32: 6}
PER_LOGIT = 16  # bytes: logits in 16 and 32 bits, their softmax, its gradient, with room to spare
# OpenAI's encoder looks at an image before the model does, without gradients: some five maps of 256 channels x 112 x
# 112 values of 4 bytes at a time. They are free again when the model needs its memory.
TOKENIZER_PER_IMAGE = 5 * 256 * 112 * 112 * 4
# UPerNet: maps of head channels x (crop / 4)^2 values, counting smaller ones in proportion: pyramid, lateral and output
# convolutions with their normalisation, and the bottleneck's four-fold input.
HEAD_MAPS = 32
HEAD_PARAMETERS_PER_CHANNEL_SQUARED = 130  # UPerNet's base model has 163 M parameters in all, large 441 M
# What the terms above lack to the peaks that mmsegmentation quotes for 640 pixels (15.88 and 22.64 GB, read as 2**30
# bytes): 2000 bytes for each pair of channels at that size (base), 3000 (large). Put down to the working space of the
# heads' convolutions, in proportion to the map; fitted, not derived.
HEAD_WORKSPACE_PER_CHANNEL_SQUARED = 3100
HEAD_WORKSPACE_CROP = 640
SEGMENTATION_CLASSES = 150
TOKENIZER_PARAMETERS = 98_000_000  # OpenAI's encoder and decoder


@dataclass(frozen=True)
class Workload:
    """What a job asks of a GPU's memory.

    Args:
        parameters: Numbers that are trained.
        frozen: Numbers that are not.
        depth: Blocks of the backbone.
        width: Channels of a token.
        heads: Attention heads of a block.
        tokens: Tokens of an image, the class token included.
        logits: Predicted numbers of an image.
        extra_values: Values of 16 bits (or 32, in float32) that an image leaves outside the backbone.
        transient: Bytes of an image that are needed before the model is, and then no more.
        workspace: Bytes that are needed whatever the number of images.
        backward: Whether the backbone's blocks take part in the backward pass.
    """

    parameters: int
    frozen: int
    depth: int
    width: int
    heads: int
    tokens: int
    logits: int = 0
    extra_values: int = 0
    transient: int = 0
    workspace: int = 0
    backward: bool = True


def needed(work: Workload, images: int, precision: str = AMP, checkpointing: bool = False) -> float:
    """Returns the estimated peak of a GPU's memory, in bytes, with a batch of so many images.

    Args:
        work: The job.
        images: Images on this GPU at once.
        precision: ``amp`` (16 bits where it can be) or ``fp32``.
        checkpointing: Whether blocks are recomputed in the backward pass.
    """
    fixed = work.parameters * PER_PARAMETER[precision] + work.frozen * 6 + work.workspace + CONTEXT
    return fixed + images * max(work.transient, _per_image(work, precision, checkpointing))


def images_that_fit(work: Workload, gigabytes: float, precision: str = AMP, checkpointing: bool = False) -> int:
    """Returns how many images of the job fit at once on a GPU of so many gigabytes (1e9 bytes); 0 if not even one."""
    empty = needed(work, 0, precision, checkpointing)
    one = needed(work, 1, precision, checkpointing) - empty
    return max(0, int((gigabytes * 1e9 * USABLE - empty) / one))


def _per_image(work: Workload, precision: str, checkpointing: bool) -> float:
    values = work.tokens * work.width
    block = values * PER_VALUE[precision] + work.heads * work.tokens**2 * PER_ATTENTION_WEIGHT[precision]
    if not work.backward:
        blocks: float = block
    elif checkpointing:  # every block's input, and all of the one that is being recomputed
        blocks = work.depth * values * 4 + block
    else:
        blocks = work.depth * block
    bytes_of_value = 2 if precision == AMP else 4
    return blocks + work.logits * PER_LOGIT + work.extra_values * bytes_of_value


def pretraining_workload(model: str, size: Any, predicted_patches: int | None, pixels: bool = False) -> Workload:
    """Returns what pre-training asks for: the model, its predictions, and the tokenizer's look at the images.

    Args:
        model: Name of the model.
        size: Size of its images, in pixels.
        predicted_patches: Patches of an image that are predicted; None for all.
        pixels: Whether a patch's pixels are predicted, which takes no tokenizer.
    """
    backbone, parameters, tokens = _measure(model, size)
    if pixels:
        outputs = 3 * math.prod(backbone.patch_embed.patch_size)
        backbone, parameters, tokens = _measure(model, size, vocab_size=outputs)
    logits = (tokens - 1 if predicted_patches is None else predicted_patches) * backbone.vocab_size
    shape = _shape(backbone)
    if pixels:
        return Workload(parameters, 0, *shape, tokens, logits)
    return Workload(parameters, TOKENIZER_PARAMETERS, *shape, tokens, logits, transient=TOKENIZER_PER_IMAGE)


def finetuning_workload(model: str, size: Any, classes: int) -> Workload:
    """Returns what fine-tuning asks for; ``classes`` 0 counts as ImageNet's 1000."""
    backbone, parameters, tokens = _measure(model, size, num_classes=classes or 1000)
    return Workload(parameters, 0, *_shape(backbone), tokens, classes or 1000)


def probe_workload(model: str, classes: int) -> Workload:
    """Returns what a linear probe asks for: a frozen backbone, and one linear layer on each block's features."""
    backbone, parameters, tokens = _measure(model, None)
    depth, width, heads = _shape(backbone)
    trained = depth * 2 * width * classes
    return Workload(trained, parameters, depth, width, heads, tokens, depth * classes, backward=False)


def segmentation_workload(model: str, crop: int) -> Workload:
    """Returns what UPerNet on ADE20K asks for: the backbone, the heads' maps, and logits of both heads in full size."""
    backbone, parameters, tokens = _measure(model, crop)
    depth, width, heads = _shape(backbone)
    maps = HEAD_MAPS * width * (crop // 4) ** 2
    trained = parameters + HEAD_PARAMETERS_PER_CHANNEL_SQUARED * width**2
    logits = 2 * SEGMENTATION_CLASSES * crop**2
    workspace = HEAD_WORKSPACE_PER_CHANNEL_SQUARED * width**2 * crop**2 // HEAD_WORKSPACE_CROP**2
    return Workload(trained, 0, depth, width, heads, tokens, logits, extra_values=maps, workspace=workspace)


@cache
def _measure(name: str, size: Any, **options: Any) -> tuple[Any, int, int]:
    """Returns a model without memory for its weights, its number of parameters, and an image's number of tokens."""
    sized = {} if size is None else {"img_size": size}
    with torch.device("meta"):
        model: Any = create_model(name, **sized, **options)
    return model, sum(parameter.numel() for parameter in model.parameters()), model.patch_embed.num_patches + 1


def _shape(model: Any) -> tuple[int, int, int]:
    return len(model.blocks), model.embed_dim, model.blocks[0].attn.num_heads
