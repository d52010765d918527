#!/bin/bash
# BEiT-base on ImageNet-22k on one H200.
#   bash docs/clusters/one_h200.sh
set -eu

DATA=${DATA:-'/path/to/imagenet22k/shards-{000000..001418}.tar'}
TOKENIZER=${TOKENIZER:-/path/to/tokenizer}
OUTPUT=${OUTPUT:-/path/to/run}

export OMP_NUM_THREADS=1
exec python run_beit_pretraining.py --config pretrain_base_22k \
    --batch_size 512 --amp_dtype bf16 --compile --tokenizer_compile --num_workers 14 \
    --data_path "$DATA" --discrete_vae_weight_path "$TOKENIZER" --output_dir "$OUTPUT"
