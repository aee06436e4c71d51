"""Activation patching and path patching: base prompts run with something of their source prompts in them."""
