"""One of several processes that each see a folder of their own; run by test_segmentation_processes.py under torchrun.

segmentation_apart.py FOLDERS FLAGS     FOLDERS such as a,b: the --data_root of each process
"""

import os
import sys

from semantic_segmentation.__main__ import main

folders, *flags = sys.argv[1:]
sys.exit(main([*flags, "--data_root", folders.split(",")[int(os.environ["RANK"])]]))
