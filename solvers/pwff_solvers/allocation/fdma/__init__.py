"""Frequency division: every device has a band of its own."""
