"""Weights in and out: step directories of ours, upstream's .pth files, and Hugging Face folders of Llama models."""
