"""Reading released PyTorch weights, and writing them back."""
