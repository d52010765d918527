r"""Tests a segmentor, with mmsegmentation's flags: mIoU, mAcc, aAcc, label maps and pictures.

One CPU or GPU, a run's best checkpoint with its own settings:

    python semantic_segmentation/tools/test.py output/tiny/config.yaml output/tiny/checkpoint-best.pth --eval mIoU

One GPU, a released checkpoint, with the results painted over the images:

    python semantic_segmentation/tools/test.py upernet_beit_base_12_640_slide_160k_ade20k_pt2ft \
        beit_base_patch16_640_pt22k_ft22ktoade20k --data_path /path/to/ADEChallengeData2016 --show-dir output/pictures

8 GPUs, multi-scale (six sizes) + flip:

    bash semantic_segmentation/tools/dist_test.sh \
        configs/beit/upernet/upernet_beit_base_12_640_slide_160k_ade20k_ms.py \
        beit_base_patch16_640_pt22k_ft22ktoade20k 8 --eval mIoU

SLURM, 8 processes, label maps for the ADE20K server:

    srun --ntasks=8 --ntasks-per-node=8 --gres=gpu:8 python semantic_segmentation/tools/test.py \
        upernet_beit_base_12_640_slide_160k_ade20k_ms beit_base_patch16_640_pt22k_ft22ktoade20k --launcher slurm \
        --format-only --eval-options imgfile_prefix=output/label_maps
"""

import sys
from pathlib import Path

if not __package__:  # run as a script, from wherever: the packages are beside semantic_segmentation/
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from beit.launch import launch
from semantic_segmentation.config import TestConfig

if __name__ == "__main__":
    sys.exit(launch(TestConfig, "semantic_segmentation.testing:main", __doc__))
