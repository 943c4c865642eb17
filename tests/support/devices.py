"""Choose the device of the kernel tests."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = "triton" if DEVICE == "cuda" else "interpreter"
