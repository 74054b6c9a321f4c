"""Start `moveimg demo` from a checkout: `python apps/demo.py --model digits`; see docs/demo.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds the checkout from any folder
from moveimg.cli import main

sys.argv.insert(1, "demo")
main()
