"""Keep the vectors of images in an index on disk, and search it."""

import os

os.environ.setdefault("LANCEDB_LOG", "error")  # read once, by lancedb: it warns of a table that it is told to create
