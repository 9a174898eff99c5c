"""From noise to image features to pixels."""
