"""Where in a frozen model the banks of a method go, one file a method."""
