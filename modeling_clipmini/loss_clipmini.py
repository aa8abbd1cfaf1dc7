"""Contrastive losses as pure functions of embeddings and image ids.

Images look for their captions, and captions for their images: every *query* is compared with all *candidates* of the
other kind. A function ending in `_rows` returns one value per query and never looks at the other queries. So a batch
can be processed a few rows at a time, and each of several processes can take only its own rows.

Shapes: B pairs in the batch, D the width of the shared space; R queries, N candidates (R = N = B on one process).
Row i of `image_embeds` and row i of `text_embeds` are pair i. An *image id* says which image a caption describes. Two
pairs with the same id are positives of each other: if a batch holds two captions of one image, the model must not
learn that the second one is wrong.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def positive_pairs(query_ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """Return which candidates are positives of each query: (R,) and (N,) integer ids to (R, N) bool."""
    return query_ids[:, None] == candidate_ids[None, :]


def pairwise_logits(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
) -> Tensor:
    """Compute the scaled cosine similarity of every image with every caption.

    The product is taken in float32 even under bf16 autocast, which keeps three digits: at a scale of 100 that would be
    an error of 0.4 in a logit. Next to the towers it costs nothing.

    Args:
        image_embeds: (I, D), of length 1. When captions look for images, pass the captions here and the images below.
        text_embeds: (T, D), of length 1.
        logit_scale: scalar, the inverse temperature itself (not its logarithm).
        logit_bias: scalar added to every logit, or None.

    Returns:
        (I, T) float32.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        logits = logit_scale.float() * image_embeds.float() @ text_embeds.float().T
        return logits if logit_bias is None else logits + logit_bias.float()


def hard_negative_weights(logits: Tensor, positives: Tensor, hardness: float) -> Tensor:
    """Compute the logarithm of each negative's weight, which grows with its similarity to the query.

        w_ij = M_i exp(h l_ij) / sum_k exp(h l_ik),   over the M_i negatives of query i, with hardness h

    The weights of a query's negatives have mean 1. They are constants: no gradient flows through them. Source: the
    HN-NCE loss of DiHT (Radenovic et al. 2023), after Robinson et al. 2021.

    Args:
        logits: (R, N).
        positives: (R, N) bool.
        hardness: h, at least 0; 0 weighs all negatives equally.

    Returns:
        (R, N) logarithms of the weights, 0 for positives.
    """
    with torch.no_grad():
        log_share = (hardness * logits).masked_fill(positives, -torch.inf).log_softmax(dim=1)
        log_count = (~positives).sum(dim=1, keepdim=True).log()
        return (log_share + log_count).masked_fill(positives, 0.0)


def infonce_rows(
    queries: Tensor,
    candidates: Tensor,
    logit_scale: Tensor,
    query_ids: Tensor,
    candidate_ids: Tensor,
    label_smoothing: float = 0.0,
    hardness: float = 0.0,
) -> Tensor:
    """Compute InfoNCE for each query, with image-id positives.

    For query i with positives P(i), and s = logit_scale:

        L_i = - 1/|P(i)| * sum_{p in P(i)} log( exp(s <x_i, y_p>) / sum_j exp(s <x_i, y_j>) )

    Without shared ids this is a row of CLIP's loss (Radford et al. 2021, figure 3). With them it is a row of UniCL's
    (Yang et al. 2022, equations 1 to 3), which is L_out of supervised contrastive learning (Khosla et al. 2020,
    equation 2) across modalities; its minimum is then log |P(i)|, not zero.

    Args:
        queries: (R, D), of length 1.
        candidates: (N, D), of length 1.
        logit_scale: scalar, the inverse temperature itself (not its logarithm).
        query_ids: (R,) integers.
        candidate_ids: (N,) integers; every query id is among them.
        label_smoothing: share of the target that is spread evenly over all N candidates, in [0, 1).
        hardness: see `hard_negative_weights`; the weights multiply the negatives' terms in the sum over j.

    Returns:
        (R,) at least 0, in nats.
    """
    logits = pairwise_logits(queries, candidates, logit_scale)  # (R, N)
    positives = positive_pairs(query_ids, candidate_ids)
    if hardness:
        logits = logits + hard_negative_weights(logits, positives, hardness)
    targets = positives.float() / positives.sum(dim=1, keepdim=True)  # (R, N), rows sum to 1
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def sigmoid_rows(
    queries: Tensor,
    candidates: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    query_ids: Tensor,
    candidate_ids: Tensor,
    hardness: float = 0.0,
) -> Tensor:
    """Compute the pairwise sigmoid loss of each query, with image-id positives.

        L_i = - sum_j log sigmoid( z_ij (s <x_i, y_j> + b) ),   z_ij = +1 if ids i and j are equal, else -1

    Source: SigLIP (Zhai et al. 2023, section 3.2 and algorithm 1), where z_ij = +1 only on the diagonal.

    Args:
        queries: (R, D), of length 1.
        candidates: (N, D), of length 1.
        logit_scale: scalar s, the inverse temperature itself (not its logarithm).
        logit_bias: scalar b.
        query_ids: (R,) integers.
        candidate_ids: (N,) integers.
        hardness: see `hard_negative_weights`; the weights multiply the negatives' terms in the sum over j.

    Returns:
        (R,) at least 0, in nats.
    """
    logits = pairwise_logits(queries, candidates, logit_scale, logit_bias)  # (R, N)
    positives = positive_pairs(query_ids, candidate_ids)
    terms = -F.logsigmoid(torch.where(positives, logits, -logits))
    if hardness:
        terms = terms * hard_negative_weights(logits, positives, hardness).exp()
    return terms.sum(dim=1)


def affinity_rows(
    queries: Tensor,
    candidates: Tensor,
    logit_scale: Tensor,
    teacher_queries: Tensor,
    teacher_candidates: Tensor,
    teacher_scale: float,
) -> Tensor:
    """Compute how far the student's distribution over the candidates is from the teacher's, for each query.

        L_i = KL( softmax_j(s_t <u_i, v_j>) || softmax_j(s <x_i, y_j>) )

    Source: affinity mimicking of TinyCLIP (Wu et al. 2023), with the Kullback-Leibler divergence of MobileCLIP (Vasu
    et al. 2024). Student and teacher may differ in width, since only similarities are compared.

    Args:
        queries: (R, D), the student's, of length 1.
        candidates: (N, D), the student's, of length 1.
        logit_scale: scalar s, the student's inverse temperature.
        teacher_queries: (R, E), of length 1.
        teacher_candidates: (N, E), of length 1.
        teacher_scale: s_t, the teacher's inverse temperature.

    Returns:
        (R,) at least 0, in nats.
    """
    student = pairwise_logits(queries, candidates, logit_scale).log_softmax(dim=1)
    scale = torch.tensor(teacher_scale, device=queries.device)
    teacher = pairwise_logits(teacher_queries, teacher_candidates, scale).log_softmax(dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


def infonce_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, image_ids: Tensor | None = None
) -> Tensor:
    """Compute CLIP's loss of a batch: the mean of `infonce_rows` over images and over captions, averaged.

    Args:
        image_embeds: (B, D), of length 1.
        text_embeds: (B, D), of length 1.
        logit_scale: scalar, the inverse temperature itself (not its logarithm).
        image_ids: (B,) integers; pairs with equal ids are positives of each other. None means that no two pairs are.

    Returns:
        Scalar, at least 0, in nats.

    Raises:
        ValueError: `image_ids` is not a vector with one id per pair.
    """
    ids = _resolve_ids(image_ids, image_embeds)
    images_to_texts = infonce_rows(image_embeds, text_embeds, logit_scale, ids, ids)
    texts_to_images = infonce_rows(text_embeds, image_embeds, logit_scale, ids, ids)
    return (images_to_texts.mean() + texts_to_images.mean()) / 2


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None = None,
) -> Tensor:
    """Compute SigLIP's loss of a batch: the mean of `sigmoid_rows` over images, each of which meets every caption.

    Args:
        image_embeds: (B, D), of length 1.
        text_embeds: (B, D), of length 1.
        logit_scale: scalar, the inverse temperature itself (not its logarithm).
        logit_bias: scalar.
        image_ids: (B,) integers; pairs with equal ids are positives of each other. None means that no two pairs are.

    Returns:
        Scalar, at least 0, in nats.

    Raises:
        ValueError: `image_ids` is not a vector with one id per pair.
    """
    ids = _resolve_ids(image_ids, image_embeds)
    return sigmoid_rows(image_embeds, text_embeds, logit_scale, logit_bias, ids, ids).mean()


def _resolve_ids(image_ids: Tensor | None, embeds: Tensor) -> Tensor:
    num_pairs = len(embeds)
    if image_ids is None:
        return torch.arange(num_pairs, device=embeds.device)
    if image_ids.shape != (num_pairs,):
        raise ValueError(f"image_ids has shape {tuple(image_ids.shape)}; one id per pair is needed: ({num_pairs},).")
    return image_ids.to(embeds.device)
