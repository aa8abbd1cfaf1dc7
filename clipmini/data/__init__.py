"""Images and captions before any tensor: found, read, counted, split by image."""
