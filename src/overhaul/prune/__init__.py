"""Methods that set weights to exactly zero."""
