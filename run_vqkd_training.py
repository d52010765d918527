r"""Trains VQ-KD, the tokenizer of BEiT v2, on a folder of images: codes that tell what a teacher sees in each patch.

One CPU, a small tokenizer for small images, taught by a BEiT of your own:

    python run_vqkd_training.py --data_path images/ --output_dir output/vqkd --input_size 64 \
        --teacher output/pretrain/checkpoint-99.pth --codebook_size 256 --codebook_dim 16 --quantize_kmeans_init \
        --model_kwargs patch_size=8 embed_dim=96 depth=4 num_heads=3 decoder_depth=1 \
        --batch_size 64 --lr 2e-3 --epochs 20 --num_workers 2

One GPU, taught by CLIP, which is downloaded:

    python run_vqkd_training.py --data_path images/ --eval_data_path held_out/ --output_dir output/vqkd \
        --quantize_kmeans_init --codebook_size 1024 --epochs 100

8 GPUs, ImageNet-1k, the published run with the official flags:

    torchrun --nproc_per_node=8 run_vqkd_training.py --data_path /path/to/imagenet/train \
        --eval_data_path /path/to/imagenet/val --output_dir output/vqkd --quantize_kmeans_init \
        --model vqkd_encoder_base_decoder_3x768x12_clip --codebook_n_emd 8192 --codebook_emd_dim 32 --batch_size 64 \
        --opt_betas 0.9 0.99 --warmup_epochs 10 --epochs 100

Every checkpoint is a tokenizer: start pre-training with `--tokenizer_weight output/vqkd/checkpoint-99.pth`. Watch
train_rec_loss in log.txt, which falls from about 1, and train_Unused_code, the codes that an epoch did not use; a
warning says what to change if there are too many. To resume a stopped run, run the same command again.
"""

import sys

from beit.launch import launch
from beit.tasks.settings import VqkdConfig

if __name__ == "__main__":
    sys.exit(launch(VqkdConfig, "beit.tasks.vqkd_training:main", __doc__))
