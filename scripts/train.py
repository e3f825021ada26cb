"""train.py, under the name that MLPerf v0.7 and DeepSparkHub give it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train

if __name__ == "__main__":
    sys.exit(train.main())
