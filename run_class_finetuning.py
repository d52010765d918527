r"""Fine-tunes BEiT for image classification (arXiv 2106.08254, section 2.5), and evaluates the result.

One CPU or GPU, your own images in one folder per class, from a released checkpoint:

    python run_class_finetuning.py --data_set image_folder --data_path images/train --eval_data_path images/val \
        --model beit_base_patch16_224 --init_from beit_base_patch16_224_pt22k_ft22k --output_dir output/finetune \
        --batch_size 32 --lr 1.25e-6 --layer_decay 0.85 --weight_decay 1e-8 --epochs 30

Any number of GPUs (here one), the published 512 images per step on ImageNet-1k, at most 128 at once per GPU:

    python run_class_finetuning.py --config finetune_base_pt22k_ft22k_224 --batch_size 128 \
        --data_path /path/to/imagenet --init_from beit_base_patch16_224_pt22k_ft22k --output_dir output/finetune

8 GPUs, the published run of the large model, with the official flags:

    torchrun --nproc_per_node=8 run_class_finetuning.py --model beit_large_patch16_224 --data_path /path/to/imagenet \
        --finetune beit_large_patch16_224_pt22k_ft22k --output_dir output/finetune --batch_size 32 --lr 2e-5 \
        --update_freq 2 --warmup_epochs 5 --epochs 30 --layer_decay 0.9 --drop_path 0.4 --weight_decay 1e-8

To evaluate a checkpoint, add `--eval --resume output/finetune/checkpoint-best.pth`.
To resume a stopped run, run the same command again.
"""

import sys

from beit.launch import launch
from beit.tasks.settings import FinetuningConfig

if __name__ == "__main__":
    sys.exit(launch(FinetuningConfig, "beit.tasks.finetuning:main", __doc__))
