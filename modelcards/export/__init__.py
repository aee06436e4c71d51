"""Cards and fixes written into a checkout of pyvene; see `python -m modelcards.export --help`."""
