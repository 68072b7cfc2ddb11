"""Generation, loaded models, requests and predictions, the chat and its web page."""
