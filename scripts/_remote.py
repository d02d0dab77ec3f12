"""Transfer files for pull_cache.sh and save_to_drive.sh.

fetch URL        download and print the local path
push FILE URL    upload
"""

import sys
from pathlib import Path

import _anemll

from wrinklefree import cli
from wrinklefree.training import storage


def main() -> None:
    verb, *rest = sys.argv[1:]
    if verb == "fetch":
        _anemll.run(lambda: cli.reported(lambda: print(storage.fetch(rest[0]))))
    else:
        _anemll.run(lambda: cli.reported(lambda: storage.push(Path(rest[0]), rest[1])))


if __name__ == "__main__":
    main()
