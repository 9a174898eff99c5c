"""LoRA files: written, converted, merged."""
