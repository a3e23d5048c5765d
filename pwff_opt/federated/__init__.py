"""The federated trainer: the only place that imports torch."""
