"""LoRA training without ComfyUI: from a folder of pictures to a file that is proven to work."""
