"""One thread a process: the networks are small, and two threads on a busy machine wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of children too, whose sums must be taken in the same order
