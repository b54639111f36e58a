"""Speed, memory and claims, measured: nothing here is installed with `overhaul`."""
