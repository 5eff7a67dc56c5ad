"""Fuzz tests of everything that reads files: `python -m tests.fuzz`."""
