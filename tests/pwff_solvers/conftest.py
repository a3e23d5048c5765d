"""Let the tests of these folders share their random cells."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
