"""Text, tables and models as files: read, checked and shared out, without torch."""
