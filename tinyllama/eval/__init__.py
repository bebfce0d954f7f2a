"""What a trained model does: text, scores, perplexity."""
