"""`learn`: task after task, without forgetting the ones before."""
