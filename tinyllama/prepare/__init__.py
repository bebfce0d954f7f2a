"""Raw text to packed tokens; runs without torch."""
