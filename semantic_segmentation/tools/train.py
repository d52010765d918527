r"""Trains BEiT for semantic segmentation (arXiv 2106.08254, section 2.5), with mmsegmentation's flags.

One process on a CPU, a small model on small scenes, in minutes:

    python semantic_segmentation/tools/train.py upernet_beit_tiny_64_slide_ade20k \
        --work-dir output/tiny --data_root output/scenes --device cpu

One GPU, the published batch of 16:

    python semantic_segmentation/tools/train.py upernet_beit_base_12_512_slide_160k_ade20k_pt2ft \
        --work-dir output/base --options data_root=/path/to/ADEChallengeData2016 \
        model.pretrained=beit_base_patch16_224_pt22k_ft22k data.samples_per_gpu=8 optimizer_config.update_interval=2 \
        runner.max_iters=320000 lr_config.warmup_iters=3000

8 GPUs, the published run:

    bash semantic_segmentation/tools/dist_train.sh \
        configs/beit/upernet/upernet_beit_base_12_640_slide_160k_ade20k_pt2ft.py 8 --work-dir output/base \
        --seed 0 --deterministic --options model.pretrained=beit_base_patch16_224_pt22k_ft22k

SLURM, 8 processes:

    srun --ntasks=8 --ntasks-per-node=8 --gres=gpu:8 python semantic_segmentation/tools/train.py \
        upernet_beit_base_12_640_slide_160k_ade20k_pt2ft --work-dir output/base --launcher slurm

A run that was stopped goes on with the same command.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script, from wherever: the packages are beside semantic_segmentation/
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from beit.launch import launch
from semantic_segmentation.config import TrainConfig

if __name__ == "__main__":
    sys.exit(launch(TrainConfig, "semantic_segmentation.task:main", __doc__))
