"""mmjax: MiniGPT-4 and its kin in JAX."""

__version__ = "0.1.0"
