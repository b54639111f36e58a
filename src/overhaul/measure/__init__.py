"""Methods that give numbers with intervals."""
