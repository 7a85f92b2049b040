"""Choosing when to leave: records, the exit rule, scores, threshold search, evaluation and promises."""
