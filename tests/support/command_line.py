"""The command line in a process of its own, from the checkout."""

import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
# Arguments of a Python that runs `blip3o`; the command's own follow.
LAUNCH = (
    f"import sys; sys.path.insert(0, {str(TESTS)!r}); import conftest; "
    "from comfyui_blip3o.cli import main; sys.exit(main())"
)


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """A finished command with what it wrote."""
    return subprocess.run([sys.executable, "-c", LAUNCH, *arguments], capture_output=True, **options)
