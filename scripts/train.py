"""Run `wf train` with the same settings. Without `training=...` it runs BitDistill's continued pretraining.

python scripts/train.py model=smollm2_135m training=stage1_subln distributed=single_gpu
python scripts/train.py model=smollm2_135m training=fairy2_w2
"""

import sys

from wrinklefree.cli import main

DEFAULT = "training=stage2_pretrain"

if __name__ == "__main__":
    settings = sys.argv[1:]
    named = any(word.startswith(("training=", "+training=")) for word in settings)
    main(["train", *([] if named else [DEFAULT]), *settings])
