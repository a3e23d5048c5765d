"""What devices and server exchange in a round."""
