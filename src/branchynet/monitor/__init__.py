"""Watching a deployed network: drift alarms and budgets."""
