"""Serving over HTTP: a scheduler of stages, model repositories, and the Open Inference Protocol."""
