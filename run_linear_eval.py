r"""Probes a frozen backbone with linear classifiers, one per block, and reports the best.

One CPU or GPU, your own images (train/ and val/ with one folder per class) and the architecture of the checkpoint:

    python run_linear_eval.py --model auto --checkpoint output/pretrain/checkpoint-99.pth \
        --data_path images/ --output_dir output/probe --batch_size 64 --epochs 20

Any number of GPUs (here one H200), the published 1024 images per step on ImageNet-1k:

    python run_linear_eval.py --config linear_probe_base --batch_size 1024 \
        --checkpoint beit_base_patch16_224_pt22k --data_path /path/to/imagenet --output_dir output/probe

8 GPUs, the published run, with the official flags:

    torchrun --nproc_per_node=8 run_linear_eval.py --model beit_base_patch16_224 \
        --pretrained_weights beit_base_patch16_224_pt22k --data_path /path/to/imagenet \
        --batch_size_per_gpu 128 --lr 4e-3 --output_dir output/probe

Pre-training and fine-tuning checkpoints both work. docs/linear_probe.md explains the numbers.
"""

import sys

from beit.launch import launch
from beit.tasks.settings import LinearProbeConfig

if __name__ == "__main__":
    sys.exit(launch(LinearProbeConfig, "beit.tasks.linear_probe:main", __doc__))
