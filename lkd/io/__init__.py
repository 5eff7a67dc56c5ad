"""Files that lkd reads and writes: untrusted ones, YAML, and tensors that are cached."""
