"""Device models as files that plain transformers and peft load."""
