"""Where text becomes tokens: `prepare.py` (any corpus) and `fold.py` (the embedded one)."""
