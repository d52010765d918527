r"""Pre-trains BEiT v2: predicts the codes of VQ-KD for masked patches, also through the class token (arXiv 2208.06366).

The job of run_beit_pretraining.py with the defaults of BEiT v2. One CPU or GPU, your own images and a tokenizer from
run_vqkd_training.py:

    python run_beitv2_pretraining.py --data_path images/ --output_dir output/pretrain_v2 \
        --tokenizer_weight output/vqkd/checkpoint-99.pth --second_interpolation bicubic \
        --model beit_base_patch16_224_8k_vocab_cls_pt --batch_size 64 --lr 4.7e-5 --epochs 100

Any number of GPUs, the published 2048 images per step on ImageNet-1k, at most 128 at once per GPU:

    torchrun --nproc_per_node=8 run_beitv2_pretraining.py --config pretrain_v2_base_1600ep \
        --data_path /path/to/imagenet/train --output_dir output/pretrain_v2 \
        --tokenizer_weight vqkd_encoder_base_decoder_3x768x12_clip

16 GPUs, the published run of 1600 epochs, with the official flags:

    torchrun --nproc_per_node=16 run_beitv2_pretraining.py --data_set image_folder \
        --data_path /path/to/imagenet/train --output_dir output/pretrain_v2 --log_dir output/pretrain_v2 \
        --model beit_base_patch16_224_8k_vocab_cls_pt --shared_lm_head True --early_layers 9 --head_layers 2 \
        --num_mask_patches 75 --second_input_size 224 --second_interpolation bicubic --min_crop_scale 0.2 \
        --tokenizer_model vqkd_encoder_base_decoder_3x768x12_clip \
        --tokenizer_weight vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth \
        --batch_size 128 --lr 1.5e-3 --warmup_epochs 10 --clip_grad 3.0 --drop_path 0.1 --layer_scale_init_value 0.1 \
        --imagenet_default_mean_and_std --opt_betas 0.9 0.999 --opt_eps 1e-8 --epochs 1600 --save_ckpt_freq 20

To resume a stopped run, run the same command again.
"""

import sys

from beit.launch import launch
from beit.tasks.settings import PretrainingV2Config

if __name__ == "__main__":
    sys.exit(launch(PretrainingV2Config, "beit.tasks.pretraining:main", __doc__))
