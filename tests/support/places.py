"""The paths of the checkout, its folders, and the scripts of the environment that runs the tests."""

import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
EXAMPLES = ROOT / "examples"
SCRIPTS = Path(sysconfig.get_path("scripts"))
