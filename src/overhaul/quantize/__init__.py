"""Methods that store weights as integers."""
