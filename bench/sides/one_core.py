"""Imported before all else by a side that is to have one core, and no threads of a tokenizer beside it."""

import os

os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
os.environ["HF_HUB_OFFLINE"] = "1"
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
