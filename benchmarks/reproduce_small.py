"""The paper's comparison in the small: from scratch, BEiT, and BEiT without one of its parts, by four measures.

    python benchmarks/reproduce_small.py --amp_dtype bf16   # 88 minutes of one core with AMX, measured
    python benchmarks/reproduce_small.py                 # in float32: longer, not measured
    python benchmarks/reproduce_small.py --quick         # meant for ten minutes; shows that it works
    python benchmarks/reproduce_small.py --table         # the table of what is there already
    python benchmarks/reproduce_small.py --preset h200   # larger, on a GPU

Stopped, the same command goes on from where it was. docs/reproduction_small.md has the results and what they say.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout serves without being installed

from reproduction.comparison import ReproductionConfig, main

from beit.launch import launch

if __name__ == "__main__":
    sys.exit(launch(ReproductionConfig, main, __doc__))
