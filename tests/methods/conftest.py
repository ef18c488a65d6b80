"""Make the reference implementations of this folder, and the small layers of the core's tests, importable."""

import sys
from pathlib import Path


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "core")]
