"""Phantoms: synthetic studies by code with known truth, used by the demo, the tests and the training alike."""
