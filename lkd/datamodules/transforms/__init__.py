"""Image transforms: augmentation, mixing and multiple views."""
