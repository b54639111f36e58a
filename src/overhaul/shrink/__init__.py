"""Methods that make a model really smaller: fewer layers, heads, neurons, channels."""
