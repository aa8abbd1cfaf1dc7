"""Contrastive losses as pure functions of embeddings and image ids.

Shapes: B pairs in the batch, D the width of the shared space. Row i of `image_embeds` and of `text_embeds` is pair i.
An *image id* says which image a caption describes. Two pairs with the same id are positives of each other: a batch
that holds two captions of one picture must not be told that the second caption is wrong.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def positive_pairs(image_ids: Tensor | None, num_pairs: int, device: torch.device) -> Tensor:
    """Say which image belongs to which caption.

    Args:
        image_ids: (B,) integer ids, or None: then each pair is its own.
        num_pairs: B, needed where there are no ids.
        device: where the result lives.

    Returns:
        (B, B) bool, symmetric, True on the diagonal: entry (i, j) tells whether image i and caption j belong together.

    Raises:
        ValueError: `image_ids` is not a vector with one id per pair.
    """
    if image_ids is None:
        return torch.eye(num_pairs, dtype=torch.bool, device=device)
    if image_ids.shape != (num_pairs,):
        raise ValueError(f"image_ids has shape {tuple(image_ids.shape)}; one id per pair is needed: ({num_pairs},).")
    image_ids = image_ids.to(device)
    return image_ids[:, None] == image_ids[None, :]


def pairwise_logits(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
) -> Tensor:
    """Scaled cosine similarity of every image with every caption, in float32.

    Under bf16 autocast a product would keep three digits; at a scale of 100 that is an error of 0.4 in a logit. So the
    product is taken in float32 whatever the towers ran in; next to them it costs nothing.

    Args:
        image_embeds: (I, D), of length 1.
        text_embeds: (T, D), of length 1.
        logit_scale: scalar, the inverse temperature itself (not its logarithm).
        logit_bias: scalar added to every logit, or None.

    Returns:
        (I, T) float32.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        logits = logit_scale.float() * image_embeds.float() @ text_embeds.float().T
        return logits if logit_bias is None else logits + logit_bias.float()


def infonce_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, image_ids: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE with image-id positives.

    For image i with positives P(i) among the captions, and s = logit_scale:

        L_i = - 1/|P(i)| * sum_{p in P(i)} log( exp(s <x_i, y_p>) / sum_j exp(s <x_i, y_j>) )

    The loss is the mean of L_i over images and of the same expression over captions, halved. Without shared ids it is
    CLIP's loss (Radford et al. 2021, figure 3); with them it is the bidirectional loss of UniCL (Yang et al. 2022,
    equations 1 to 3), which is L_out of supervised contrastive learning (Khosla et al. 2020, equation 2) across
    modalities. Its least value is then the mean of log |P(i)|, not zero.

    Args:
        image_embeds: (B, D), of length 1.
        text_embeds: (B, D), of length 1.
        logit_scale: scalar, the inverse temperature itself (not its logarithm).
        image_ids: (B,) integers; pairs with equal ids are positives of each other. None: each pair is its own.

    Returns:
        Scalar, at least 0, in nats.
    """
    logits = pairwise_logits(image_embeds, text_embeds, logit_scale)  # (B, B)
    targets = positive_pairs(image_ids, len(logits), logits.device).float()
    targets = targets / targets.sum(dim=1, keepdim=True)  # symmetric before; rows are distributions now, for both ways
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None = None,
) -> Tensor:
    """Pairwise sigmoid loss with image-id positives.

        L = - 1/B * sum_i sum_j log sigmoid( z_ij (s <x_i, y_j> + b) ),   z_ij = +1 if ids i and j are equal, else -1

    Source: SigLIP (Zhai et al. 2023, equation in section 3.2, algorithm 1); it takes z_ij = +1 on the diagonal alone.

    Args:
        image_embeds: (B, D), of length 1.
        text_embeds: (B, D), of length 1.
        logit_scale: scalar s, the inverse temperature itself (not its logarithm).
        logit_bias: scalar b.
        image_ids: (B,) integers; pairs with equal ids are positives of each other. None: each pair is its own.

    Returns:
        Scalar, at least 0, in nats.
    """
    logits = pairwise_logits(image_embeds, text_embeds, logit_scale, logit_bias)  # (B, B)
    signs = positive_pairs(image_ids, len(logits), logits.device).float() * 2 - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)
