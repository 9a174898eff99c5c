"""`python -m comfyui_blip3o.cli`."""

import sys

from .main import main

sys.exit(main())
