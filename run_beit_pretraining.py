r"""Pre-trains BEiT: predicts the visual tokens of masked patches (arXiv 2106.08254).

One CPU or GPU, your own images and a tokenizer from run_dvae_training.py:

    python run_beit_pretraining.py --data_path images/ --output_dir output/pretrain \
        --discrete_vae_type customized --discrete_vae_weight_path output/dvae \
        --model beit_tiny_patch16_224_8k_vocab --batch_size 64 --lr 4.7e-5 --epochs 100

Any number of GPUs (here one H200), the published 2048 images per step on ImageNet-1k, at most 512 at once per GPU:

    python run_beit_pretraining.py --config pretrain_base_1k_800ep --batch_size 512 \
        --data_path /path/to/imagenet/train --discrete_vae_weight_path tokenizer/ --output_dir output/pretrain

16 GPUs, the published ImageNet-22k run, with the official flags:

    torchrun --nproc_per_node=16 run_beit_pretraining.py --data_path /path/to/imagenet22k \
        --output_dir output/pretrain --num_mask_patches 75 --model beit_base_patch16_224_8k_vocab \
        --discrete_vae_weight_path tokenizer/ --batch_size 128 --lr 1.5e-3 --warmup_steps 10000 --epochs 150 \
        --clip_grad 3.0 --drop_path 0.1 --layer_scale_init_value 0.1

`beit download tokenizer tokenizer/` downloads OpenAI's tokenizer. To resume a stopped run, run the same command again.
"""

import sys

from beit.launch import launch
from beit.tasks.settings import PretrainingConfig

if __name__ == "__main__":
    sys.exit(launch(PretrainingConfig, "beit.tasks.pretraining:main", __doc__))
