"""Networks with side branches: attach branches, trace forwards, place exits, average outputs, save weights."""
