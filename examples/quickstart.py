"""Search, measure and classify with a trained model: python examples/quickstart.py runs/demo/model."""

import sys
from pathlib import Path

import clipmini

model = clipmini.load(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/model")
photos = Path(__file__).parent / "photos"
hits = clipmini.search(model, photos / "test", "fish in the sea", top=3)
print(*(f"{hit.score:.3f} {hit.name}" for hit in hits), sep="\n")
print(clipmini.evaluate(model, photos / "test"))
print(clipmini.classify(model, hits[0].image, ["a fish", "a horse"])[0].label)
