"""Run folders: the steps of the command line, each of which reads and writes files."""
