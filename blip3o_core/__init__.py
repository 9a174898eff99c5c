"""The BLIP3-o model and its pipeline, usable without ComfyUI."""
