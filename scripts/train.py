"""The same as `wf train`: python scripts/train.py model=smollm2_135m training=fairy2_w2 ..."""

import sys

from wrinklefree.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
