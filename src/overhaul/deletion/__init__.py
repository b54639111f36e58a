"""Models that examples can be deleted from: what is kept of them, what deletions leave, and how they answer."""
