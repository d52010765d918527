#!/bin/bash
# BEiT-base on ImageNet-22k, 2 machines x 8 V100 of 32 GB, started by Open MPI from the first one.
# V100s need PyTorch with CUDA 12.6: pip install -r requirements-v100.txt
#   HOSTS=node1:8,node2:8 MASTER_ADDR=node1 bash docs/clusters/openmpi_2x8_v100.sh
set -eu

DATA=${DATA:-'/path/to/imagenet22k/shards-{000000..001418}.tar'}
TOKENIZER=${TOKENIZER:-/path/to/tokenizer}
OUTPUT=${OUTPUT:-/path/to/run}

export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500} OMP_NUM_THREADS=1
# mpirun passes only the variables that it is told to on to the other machine.
given=$(compgen -e | grep -E '^(NCCL_|TORCH_|BEIT_HOME$|LD_LIBRARY_PATH$)' | sed 's/^/-x /') || true
beit index "$DATA" # once, before 15 processes wait for it
# shellcheck disable=SC2086  (split into words on purpose)
exec mpirun -np 16 --host "$HOSTS" --map-by ppr:8:node --bind-to none \
    -x MASTER_ADDR -x MASTER_PORT -x OMP_NUM_THREADS -x PATH $given \
    python run_beit_pretraining.py --dist_on_itp --config pretrain_base_22k \
    --batch_size 128 --amp_dtype fp16 --num_workers 4 \
    --data_path "$DATA" --discrete_vae_weight_path "$TOKENIZER" --output_dir "$OUTPUT"
