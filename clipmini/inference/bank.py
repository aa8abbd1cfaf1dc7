"""Scores without hubs: a bank of training captions and images says how near each vector is to everything.

Some images are near many captions, and so are found first by captions that describe others: they are hubs. What a bank
of captions finds in an image is subtracted from its similarity to a query (querybank normalization with the inverted
softmax; Bogolin et al., 2022, Cross Modal Retrieval with Querybank Normalisation, arXiv:2112.12777).

Shape letters: n captions and m images in the bank, N vectors, D the width of the shared space.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipmini.files import BANK_FILE, WEIGHTS_FILE, weights_sha256
from clipmini.trust import fetch

MAX_SIMILARITIES = 1 << 22  # computed at once: 16 MB
MAX_LENGTH_ERROR = 0.01  # of a row; float16 rounds each value by less than 0.0005 of itself


@dataclass(frozen=True)
class Bank:
    """Vectors of training captions and images, which tell hubs from what fits a query.

    The score of an image for a query of words is their cosine minus `prior_of_images` of the image. That of a caption
    for an image is their cosine minus `prior_of_texts` of the caption.

    Attributes:
        texts: (n, D) float16, rows of length 1.
        images: (m, D) float16, likewise.
        scale: the model's factor on cosines before a softmax, above 0.

    Raises:
        ValueError: these are no vectors of one shared space, or a value is not finite.
    """

    texts: Tensor
    images: Tensor
    scale: float

    def __post_init__(self) -> None:
        for name in ("texts", "images"):
            vectors = getattr(self, name)
            if vectors.dtype != torch.float16 or vectors.ndim != 2 or not vectors.numel():
                raise ValueError(f"its {name} are {tuple(vectors.shape)} of {vectors.dtype}, not rows of float16")
            if not ((vectors.float().norm(dim=1) - 1).abs() <= MAX_LENGTH_ERROR).all():  # neither is NaN
                raise ValueError(f"its {name} are not all of length 1")
        if self.texts.shape[1] != self.images.shape[1]:
            raise ValueError(f"its texts are {self.texts.shape[1]} wide, its images {self.images.shape[1]}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"its scale is {self.scale}, not a number above 0")

    @property
    def sizes(self) -> dict[str, int]:
        """The numbers of vectors, as results and a push state them."""
        return {"num_captions": len(self.texts), "num_images": len(self.images)}

    def prior_of_images(self, vectors: Tensor) -> Tensor:
        """Return how well images fit the captions of the bank: the soft average of their cosines.

        For an image v, captions t_1 to t_n and the scale s it is log(mean_i(exp(s v.t_i))) / s, which lies between the
        mean and the maximum of the cosines. Bogolin et al. have the sum in place of the mean; the constant between
        them changes no ranking, but makes banks of any size comparable and gives scores a meaning: above 0, an image
        fits the query better than it fits the captions of the bank, softly averaged.

        Args:
            vectors: (N, D), rows of length 1.

        Returns:
            (N,) float32 in [-1, 1], on the device of `vectors`; NaN for a vector with NaN.

        Raises:
            ValueError: the vectors are not as wide as the bank's.
        """
        return self._prior(vectors, self.texts)

    def prior_of_texts(self, vectors: Tensor) -> Tensor:
        """Return how well captions fit the images of the bank; as `prior_of_images`."""
        return self._prior(vectors, self.images)

    def _prior(self, vectors: Tensor, bank: Tensor) -> Tensor:
        if vectors.ndim != 2 or vectors.shape[1] != bank.shape[1]:
            raise ValueError(f"The bank is {bank.shape[1]} wide, and vectors are {tuple(vectors.shape)}: not (N, D).")
        keys = bank.to(vectors.device, torch.float32).T
        sums = [
            torch.logsumexp(self.scale * (block.float() @ keys), dim=1)
            for block in vectors.split(max(1, MAX_SIMILARITIES // len(bank)))
        ]
        return (torch.cat(sums) - math.log(len(bank))) / self.scale


def save_bank(bank: Bank, folder: Path) -> None:
    """Save a bank beside the weights of its model, whose digest it states.

    Args:
        bank: of this model.
        folder: holds the weights.
    """
    digest = weights_sha256(folder)
    assert digest is not None, folder
    facts = {"weights_sha256": digest, "scale": repr(bank.scale)}
    vectors = {"texts": bank.texts.clone(), "images": bank.images.clone()}  # safetensors refuses shared memory
    save_file(vectors, folder / BANK_FILE, facts)
    shutil.copymode(folder / WEIGHTS_FILE, folder / BANK_FILE)  # safetensors lets only the owner read its files


def load_bank(model: str | Path, digest: str | None = None) -> Bank | None:
    """Load the bank of a clipmini model.

    Args:
        model: its folder or Hub id.
        digest: of the model's weights; by default of those in the folder, which may hold only graphs of them.

    Returns:
        The bank; None if the model has none.

    Raises:
        ValueError: the bank is damaged, belongs to other weights, or cannot be fetched.
    """
    folder = fetch(model, [BANK_FILE] if digest else [BANK_FILE, WEIGHTS_FILE])
    file = folder / BANK_FILE
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            facts = opened.metadata() or {}
            bank = Bank(opened.get_tensor("texts"), opened.get_tensor("images"), float(facts["scale"]))
            digest_of_bank = facts["weights_sha256"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it to score by cosine, or train again.") from error
    if digest_of_bank != (digest or weights_sha256(folder)):
        raise ValueError(
            f"{file} is of other weights than those beside it: delete it to score by cosine, or train again."
        )
    return bank
