"""Converted checkpoints (folders), frozen weights, training checkpoints, and restoring any of them onto a mesh."""
