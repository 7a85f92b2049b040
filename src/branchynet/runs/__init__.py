"""Run folders: the steps of the command line, which read and write files."""
