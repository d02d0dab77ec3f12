"""The same as `wf train`, but that it is BitDistill's continued pretraining where no training is named.

python scripts/train.py model=smollm2_135m training=stage1_subln distributed=single_gpu
python scripts/train.py model=smollm2_135m training=fairy2_w2
"""

import sys

from wrinklefree.cli import main

DEFAULT = "training=stage2_pretrain"

if __name__ == "__main__":
    given = sys.argv[1:]
    named = any(word.startswith(("training=", "+training=")) for word in given)
    main(["train", *([] if named else [DEFAULT]), *given])
