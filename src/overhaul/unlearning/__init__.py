"""Training that data can be taken out of again; what is kept is in `overhaul.deletion`."""
