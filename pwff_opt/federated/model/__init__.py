"""The frozen language model and the blocks that devices bring to it."""
