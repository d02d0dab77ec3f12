"""Before anything imports Triton: without a GPU its programs run in its interpreter."""

import os

import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
