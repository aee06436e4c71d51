"""Activation patching and path patching: base prompts run with activations of their source prompts."""
