"""Facts that ship with the package: the GPU table."""
