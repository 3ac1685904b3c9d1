#!/usr/bin/env python
"""Train and evaluate any Detectron2 model: the same as ``solo-d2 train``."""

import sys

from solo_d2.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    sys.exit(main())
