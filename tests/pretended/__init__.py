"""A pretended accelerator: what would fail on a GPU fails on it, on any machine."""
