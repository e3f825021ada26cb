"""python -m model.sharding: an older name of python -m model.planner."""

import sys

from model.planner.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
