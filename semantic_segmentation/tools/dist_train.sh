#!/usr/bin/env bash
# Trains on several GPUs: dist_train.sh CONFIG GPUS [flags of train.py]
# Environment: PORT (29500), PYTHON; for several machines NNODES, NODE_RANK and MASTER_ADDR.
set -euo pipefail

if [[ $# -lt 2 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: ${0##*/} CONFIG GPUS [--work-dir FOLDER] [--options KEY=VALUE ...] [...]" >&2
    exit 2
fi
config=$1
gpus=$2
shift 2

exec "${PYTHON:-python}" -m torch.distributed.run --nproc_per_node="$gpus" \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$(dirname -- "${BASH_SOURCE[0]}")/train.py" "$config" --launcher pytorch "$@"
