"""Search held-out images with the model that `clipmini train demo` trained; the second half of `make demo`."""

from pathlib import Path

from clipmini.console import quiet_progress_bars

quiet_progress_bars()  # in a log; before the imports that read its setting

from transformers.utils import logging

from clipmini.data.images import find_images
from clipmini.inference.drawing import draw_results
from clipmini.inference.encoders import load_encoder
from clipmini.inference.search import rank

RUN = Path("runs/demo")
HELD_OUT = Path(__file__).parent / "photos" / "test"
# No training image shows drummers, carved faces or scissors; the model relies on what its towers knew before.
QUERIES = ("people making music", "faces carved into a mountain", "a tool to cut paper")


def main() -> None:
    """Embed the held-out images once, rank them for each query and draw the results."""
    logging.disable_progress_bar()  # for loading the weights, which takes no time
    encoder = load_encoder(RUN / "model")
    paths, embeddings = encoder.encode_files(find_images(HELD_OUT))
    query_embeds = encoder.encode_texts(QUERIES)
    hits = {query: rank(paths, embeddings, embed, top=5) for query, embed in zip(QUERIES, query_embeds, strict=True)}
    for query, found in hits.items():
        print(f'"{query}": {", ".join(f"{hit.image.stem} {hit.score:.2f}" for hit in found[:3])}')
    draw_results(hits, RUN / "search.png")
    print(f"Now look at {RUN / 'search.png'} and {RUN / 'curves.png'}.")


if __name__ == "__main__":
    main()
