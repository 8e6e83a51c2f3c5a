"""What processes that a test starts must know."""

import os
from pathlib import Path

# The tests' own modules, and whatever this process was told, wherever the new one starts.
PATH = os.pathsep.join(
    [str(Path(__file__).parent), *(str(Path(p).resolve()) for p in os.environ.get("PYTHONPATH", "").split(":") if p)]
)
