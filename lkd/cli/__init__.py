"""The command line. Modules that answer without torch import nothing heavy."""
