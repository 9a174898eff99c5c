"""From a folder of pictures to what training reads."""
