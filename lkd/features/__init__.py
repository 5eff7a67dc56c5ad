"""Named layers of networks and their features."""
