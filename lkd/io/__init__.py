"""Files that lkd reads and writes: untrusted files, YAML, and cached tensors."""
