"""`python -m comfyui_blip3o.lora_training fit RUN.yaml`: what accelerate launch starts on every process."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
