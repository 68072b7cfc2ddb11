"""Towers, each one file that reads like its paper. They import `layers` and nothing of each other."""
