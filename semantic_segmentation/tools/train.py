r"""Trains BEiT for semantic segmentation (arXiv 2106.08254, section 2.5), with mmsegmentation's flags.

One CPU, a small model on small scenes, in minutes:

    python semantic_segmentation/tools/train.py upernet_beit_tiny_64_slide_ade20k \
        --output_dir output/tiny --data_path output/scenes --device cpu

One GPU, the published 16 images per step (--total_batch_size of the config), at most 8 at once:

    python semantic_segmentation/tools/train.py upernet_beit_base_12_512_slide_160k_ade20k_pt2ft \
        --output_dir output/base --data_path /path/to/ADEChallengeData2016 \
        --init_from beit_base_patch16_224_pt22k_ft22k --batch_size 8

8 GPUs, the published run, with the official flags:

    bash semantic_segmentation/tools/dist_train.sh \
        configs/beit/upernet/upernet_beit_base_12_640_slide_160k_ade20k_pt2ft.py 8 --work-dir output/base \
        --seed 0 --deterministic --options model.pretrained=beit_base_patch16_224_pt22k_ft22k

SLURM, 8 processes:

    srun --ntasks=8 --ntasks-per-node=8 --gres=gpu:8 python semantic_segmentation/tools/train.py \
        upernet_beit_base_12_640_slide_160k_ade20k_pt2ft --work-dir output/base --launcher slurm

To resume a stopped run, run the same command again.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script, from wherever: the packages are beside semantic_segmentation/
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from beit.launch import launch
from semantic_segmentation.config import TrainConfig

if __name__ == "__main__":
    sys.exit(launch(TrainConfig, "semantic_segmentation.task:main", __doc__))
