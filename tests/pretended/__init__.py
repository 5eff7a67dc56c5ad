"""A simulated accelerator named `pretended`: code that fails on a GPU fails on it, on any machine."""
