"""Transforms of images: augmentation, mixing, and several views."""
