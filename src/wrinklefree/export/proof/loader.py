"""Proves that a packed folder can be read by the loader in it, in a process that cannot import this package."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from wrinklefree.export.proof.certify import LOGITS, CertificateError

TOKENS = 16  # compared; a wrong weight shows at the first one

# The process gets: the folder, a file with token ids, a file for the logits, the number of threads.
SCRIPT = """
import sys
sys.modules["wrinklefree"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
folder, ids, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model, info = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
)
odd = sorted(info["missing_keys"] | info["unexpected_keys"] | {key[0] for key in info["mismatched_keys"]})
if odd:
    sys.exit(f"{odd[0]}: not read from the folder ({len(odd)} such tensors)")
def drop(module, inputs, output):
    module.dense = None  # a decoded weight is used once, and all of them would be the whole model
for module in model.modules():
    module.register_forward_hook(drop)
with torch.no_grad():
    torch.save(model.eval()(torch.load(ids, weights_only=True), use_cache=False).logits, out)
"""


def prove(folder: Path, ids: Tensor, expected: Tensor) -> None:
    """Load `folder` with its own loader, offline, and compare its logits for `ids` [1, L] with `expected` [1, L, V].

    Raises CertificateError if it cannot be loaded without this package, or gives other logits.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch, "ids.pt"), Path(scratch, "logits.pt")
        torch.save(ids.cpu(), given)
        # transformers copies a folder's code before it runs it: into `scratch`, so that nothing stays.
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_MODULES_CACHE": scratch}
        arguments = [str(folder.absolute()), str(given), str(found), str(torch.get_num_threads())]
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, *arguments],
            env=os.environ | offline | {"CUDA_VISIBLE_DEVICES": ""},
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        if result.returncode != 0:
            said = result.stderr.strip().rpartition("\n")[2] or f"exit code {result.returncode}"
            raise CertificateError(f"the folder cannot be loaded without this package: {said}")
        logits: Tensor = torch.load(found, weights_only=True)
    difference = ((logits - expected.cpu()).abs().max() / expected.abs().max()).item()
    if not difference <= LOGITS:
        raise CertificateError(
            f"loaded without this package, logits differ by {difference:.1e} of the largest (allowed {LOGITS:g}): the "
            f"folder's loader does not give the packed model"
        )
