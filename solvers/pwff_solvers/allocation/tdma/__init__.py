"""Time division: devices use the whole band one after another."""
