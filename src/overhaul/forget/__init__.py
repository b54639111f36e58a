"""Methods of `forget`, one per file."""
