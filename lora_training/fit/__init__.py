"""The loop that fits an adapter, and its parts."""
