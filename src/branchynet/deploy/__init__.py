"""Engines: run an exported network and say where each sample left."""
