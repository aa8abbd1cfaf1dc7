"""Measure retrieval by code that is not clipmini's: mteb, with a model folder loaded by sentence-transformers.

    python measure_by_mteb.py MODEL IMAGES

Needs mteb and sentence-transformers; clipmini need not be installed. MODEL is a folder; its code is run, so read it
first. IMAGES is a folder with images and a metadata.csv, which has the columns file_name and caption and one row for
each caption. A hit rate at k is the share of queries with a right answer among the first k: clipmini's R@k.
"""

import sys
from collections import defaultdict

import mteb
from datasets import Dataset, Image, load_dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer


class LocalRetrieval(AbsTaskRetrieval):
    """Retrieval among data on this machine: "t2i", of images by captions, or "i2t", of captions by images."""

    def __init__(self, category: str, queries: Dataset, corpus: Dataset, pairs: list[tuple[str, str]]) -> None:
        self.metadata = TaskMetadata(
            name=f"LocalRetrieval-{category}",
            description="Images and captions on this machine.",
            dataset={"path": "local", "revision": "local"},
            type="Any2AnyRetrieval",
            category=category,
            modalities=["text", "image"],
            eval_langs=["eng-Latn"],
            main_score="hit_rate_at_1",
        )
        super().__init__()
        right: dict[str, dict[str, int]] = defaultdict(dict)
        for query, answer in pairs:
            right[query][answer] = 1
        data = RetrievalSplitData(corpus=corpus, queries=queries, relevant_docs=dict(right), top_ranked=None)
        self.dataset, self.data_loaded = {"default": {"test": data}}, True


def measure(folder: str, images: str) -> dict[str, dict[str, float]]:
    """Return all scores of mteb by direction, rounded to five decimals."""
    rows = load_dataset("imagefolder", data_dir=images, split="all").cast_column("image", Image(decode=False))
    paths = [image["path"] for image in rows["image"]]
    numbers = [str(number) for number in range(len(rows))]
    files = sorted(set(paths))
    photos = Dataset.from_dict({"id": files, "image": files}).cast_column("image", Image())
    captions = Dataset.from_dict({"id": numbers, "text": rows["caption"]})
    tasks = {
        "text_to_image": LocalRetrieval("t2i", captions, photos, [*zip(numbers, paths, strict=True)]),
        "image_to_text": LocalRetrieval("i2t", photos, captions, [*zip(paths, numbers, strict=True)]),
    }
    model = SentenceTransformerEncoderWrapper(SentenceTransformer(folder, trust_remote_code=True))
    # mteb 2.26 takes every model of sentence-transformers that it does not know for one of texts alone.
    model.mteb_model_meta = model.mteb_model_meta.model_copy(update={"modalities": ["text", "image"]})
    # Its cache knows a model and a task by their names alone, so it would answer for other weights or other images.
    results = {name: mteb.evaluate(model, task, cache=None, show_progress_bar=False) for name, task in tasks.items()}
    return {name: result.task_results[0].scores["test"][0] for name, result in results.items()}


if __name__ == "__main__":
    for direction, scores in measure(*sys.argv[1:]).items():
        print(direction, *(f"{name} {scores[name]}" for name in ("hit_rate_at_1", "hit_rate_at_5", "hit_rate_at_10")))
