r"""Probes a frozen backbone with linear classifiers, one for each block, and reports the best.

One process, CPU or GPU, on your own images (folders train/ and val/ with a folder for each class in them), with
whatever model the checkpoint is of:

    python run_linear_eval.py --model auto --pretrained_weights output/pretrain/checkpoint-99.pth \
        --data_path images/ --output_dir output/probe --batch_size_per_gpu 64 --epochs 20

One H200, the published batch of 1024 on ImageNet-1k:

    python run_linear_eval.py --config linear_probe_base --batch_size_per_gpu 1024 \
        --pretrained_weights beit_base_patch16_224_pt22k --data_path /path/to/imagenet --output_dir output/probe

8 GPUs, the published run:

    torchrun --nproc_per_node=8 run_linear_eval.py --model beit_base_patch16_224 \
        --pretrained_weights beit_base_patch16_224_pt22k --data_path /path/to/imagenet \
        --batch_size_per_gpu 128 --lr 4e-3 --output_dir output/probe

Pre-training and fine-tuning checkpoints are read as they are. docs/linear_probe.md says what the numbers mean.
"""

import sys

from beit.launch import launch
from beit.tasks.settings import LinearProbeConfig

if __name__ == "__main__":
    sys.exit(launch(LinearProbeConfig, "beit.tasks.linear_probe:main", __doc__))
