"""Runs a batch on a device: attention backends, model runner, sampling."""
