"""`python -m fastssl`: as `fastssl`, without the current folder among the places from which modules are imported.

Python looks there first, and a `loaders.py` of somebody's would pass for ours. Where a `fastssl.py` lies, Python runs
that before anything here can prevent it: `fastssl` and `python -P -m fastssl` do not look there.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # and not in ranks, which import this file by another name, with the path of their launcher
    ours = Path(__file__).parents[1]
    if not sys.flags.safe_path and Path(sys.path[0]) != ours:  # a clone that is not installed is found in no other way
        del sys.path[0]
    from fastssl.commands.main import main

    main()
