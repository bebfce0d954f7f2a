"""Convert weights between our step directories, upstream's .pth files and Hugging Face folders of Llama models."""
