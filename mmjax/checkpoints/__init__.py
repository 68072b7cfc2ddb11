"""Converted checkpoints, frozen weights, training checkpoints, and restoring them onto a mesh."""
