"""Named layers of a network, and their features."""
