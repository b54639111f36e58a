"""What methods of `learn` keep from task to task, one file a family; the settings are in `overhaul.learn`."""
