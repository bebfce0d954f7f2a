"""Evaluate a trained model: generate text, score tasks, measure perplexity."""
