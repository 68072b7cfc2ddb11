"""A training run: its steps, losses, optimizer, how it resumes, and what it logs."""
