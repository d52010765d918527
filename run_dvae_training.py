r"""Trains a discrete VAE on a folder of images: the tokenizer that BEiT pre-training predicts.

One CPU, a small tokenizer for small images:

    python run_dvae_training.py --data_path images/ --output_dir output/dvae \
        --input_size 64 --codebook_size 256 --codebook_dim 64 --hidden_dim 32 \
        --batch_size 16 --epochs 20 --num_workers 2

One GPU, a vocabulary of 8192 tokens of 8 x 8 pixels, for pre-training with --second_input_size 112:

    python run_dvae_training.py --data_path images/ --eval_data_path held_out/ --output_dir output/dvae \
        --log_dir output/dvae/tensorboard --batch_size 128 --epochs 20

16 GPUs, ImageNet-1k, 512 images per step:

    torchrun --nproc_per_node=16 run_dvae_training.py --data_path /path/to/imagenet/train --output_dir output/dvae \
        --eval_data_path /path/to/imagenet/val --total_batch_size 512 --epochs 20

output/dvae is the tokenizer, as soon as there are codes (`--quantize_from`): start pre-training with
`--discrete_vae_type customized --discrete_vae_weight_path output/dvae`. Watch test_psnr and test_perplexity in log.txt,
the quality of the reconstructions and the effective number of codes in use; docs/tokenizers.md says what to expect. To
resume a stopped run, run the same command again.
"""

import sys

from beit.launch import launch
from beit.tasks.settings import DvaeConfig

if __name__ == "__main__":
    sys.exit(launch(DvaeConfig, "beit.tasks.dvae_training:main", __doc__))
