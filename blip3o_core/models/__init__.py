"""The networks: NextDiT, EVA-CLIP, the Qwen2.5-VL backbone and the diffusion decoder."""
