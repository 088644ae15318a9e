"""What a trained site produces: exports, predictions, transfers."""
