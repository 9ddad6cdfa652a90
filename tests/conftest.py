"""Tiny models compute slower on several threads than on one, most of all beside other processes."""

import torch

torch.set_num_threads(1)
