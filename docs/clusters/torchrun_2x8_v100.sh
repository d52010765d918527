#!/bin/bash
# BEiT-base on ImageNet-22k, 2 machines x 8 V100 of 32 GB, without a scheduler. Run it on both, with the address of
# the first one.
# V100s need PyTorch with CUDA 12.6: pip install -r requirements-v100.txt
#   MASTER_ADDR=10.0.0.1 bash docs/clusters/torchrun_2x8_v100.sh
set -eu

DATA=${DATA:-'/path/to/imagenet22k/shards-{000000..001418}.tar'}
TOKENIZER=${TOKENIZER:-/path/to/tokenizer}
OUTPUT=${OUTPUT:-/path/to/run}

export OMP_NUM_THREADS=1
beit index "$DATA" # once, before 15 processes wait for it
exec torchrun --nnodes=2 --nproc-per-node=8 \
    --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:29500" --rdzv-id=beit-base \
    run_beit_pretraining.py --config pretrain_base_22k \
    --batch_size 128 --amp_dtype fp16 --num_workers 4 \
    --data_path "$DATA" --discrete_vae_weight_path "$TOKENIZER" --output_dir "$OUTPUT"
