"""Command line. The modules that show help and check arguments do not import torch or Lightning."""
