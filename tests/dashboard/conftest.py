import sys
from pathlib import Path

# `serving`, which starts servers, is theirs.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "clients"))
