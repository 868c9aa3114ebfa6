"""Trains EpiGRAF. It is `epigraf train`, for a checkout: epigraf_fast/tools/train.py parses, builds, loops and saves.

$ python train.py demo
$ python train.py --help
"""

import sys

from epigraf_fast.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
