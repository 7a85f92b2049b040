"""Export a network with its exits, verify the file, and run it."""
