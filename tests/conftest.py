"""One thread a process: tests are small, and two of them may run side by side."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")      # for the scripts that tests start

import torch

torch.set_num_threads(1)
