"""Serving over HTTP and gRPC: a scheduler of stages, model repositories, and the Open Inference Protocol."""

from ..extras import first_used

__getattr__ = first_used(__name__, {"cluster": ("ray_app",)}, extra="ray")
