"""The training stages, in the order they run: image encoder, VAE, decoder UNet, understanding, generation."""
