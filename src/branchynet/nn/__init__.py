"""Networks with side branches: attaching, tracing, placing exits, averaging, weights."""
