"""All tests. Math runs on one thread, as in the workers: the cores are for what runs side by side."""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # read when numpy is first imported
