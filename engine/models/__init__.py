"""Llama-family models and the loading of their weights."""
