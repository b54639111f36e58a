"""Update rules, one per file; each is a torch optimizer called with a closure."""
