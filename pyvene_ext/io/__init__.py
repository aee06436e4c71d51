"""Files that are complete or absent, hashes, seeds, optional packages, and the command line.

Nothing here knows models, prompts or interventions, and nothing here imports torch's models or pyvene.
"""
