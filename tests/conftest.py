"""Settings that count only before the first import of Triton or transformers, or the first compilation."""

import os
import tempfile

import torch

# Without a GPU, Triton's programs run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

# transformers copies the loader of a packed folder into a shared folder, where two processes would write at once.
_MODULES = tempfile.TemporaryDirectory(prefix="wrinklefree-modules-")
os.environ["HF_MODULES_CACHE"] = _MODULES.name

# torch.compile's cache does not ask for which instruction set it compiled: what an AVX-512 run left there gives wrong
# numbers in a run with AVX2 alone.
_COMPILED = f"wrinklefree-inductor-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), _COMPILED))
