"""The scene world: pictures, captions, questions, and who checks them."""
