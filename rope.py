"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

import functools

import torch


@functools.lru_cache(maxsize=8)
def rotary_table(
    head_dim: int, max_seq_len: int, theta: float, device: torch.device
) -> torch.Tensor:
    """The rotation exp(i · pos / theta^(2j/head_dim)) of every position and pair.

    Computed once and shared by all layers, so it must not be written to.

    Returns:
        complex64, `(max_seq_len, head_dim / 2)`.
    """
    # A tensor made in inference mode could not take part in a later backward pass.
    with torch.inference_mode(False):
        exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
        positions = torch.arange(max_seq_len, device=device).float()
        angles = torch.outer(positions, theta**-exponents)
        return torch.polar(torch.ones_like(angles), angles)


def reshape_for_broadcast(freqs_cis: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshape a table `(seqlen, last dimension)` so that it broadcasts over `x`, as in Llama 2."""
    seqlen, last = x.shape[1], x.shape[-1]
    return freqs_cis.view(1, seqlen, *[1] * (x.ndim - 3), last)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of neighbouring elements (0 and 1, 2 and 3, …) of every head.

    Equation 34 of the paper, in the interleaved order of the Llama 2 weights. A pair is taken as
    one complex number, so that its rotation is one product.

    Args:
        x: `(batch, seqlen, heads, head_dim)`.
        rotation: complex, broadcastable to `(batch, seqlen, heads, head_dim / 2)`.

    Returns:
        shape and type of `x`.
    """
    pairs = x.float().unflatten(-1, (-1, 2)).contiguous()  # (batch, seqlen, heads, head_dim / 2, 2)
    rotated = torch.view_as_complex(pairs) * rotation
    return torch.view_as_real(rotated).flatten(-2).type_as(x)


def apply_rotary_emb(
    query: torch.Tensor,
    key: torch.Tensor,
    head_dim: int,
    max_seq_len: int,
    theta: float = 10000.0,
    start: int | torch.Tensor = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate query and key by their positions, so that their product depends on the distance.

    Args:
        query: `(batch, seqlen, n_heads, head_dim)`.
        key: `(batch, seqlen, n_kv_heads, head_dim)`.
        head_dim: an even number.
        max_seq_len: the number of positions that the table covers.
        theta: base of the geometric progression of wavelengths.
        start: position of the first token, one number or one per row `(batch,)`.

    Returns:
        query and key, rotated; shapes and types as given.

    Raises:
        ValueError: `head_dim` is odd, or the sequence is longer than `max_seq_len`.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; rotary embedding needs an even number")
    table = rotary_table(head_dim, max_seq_len, theta, query.device)
    seqlen = query.shape[1]
    if isinstance(start, torch.Tensor):
        positions = start[:, None] + torch.arange(seqlen, device=start.device)
        rotation = table[positions, None]  # (batch, seqlen, 1, head_dim / 2)
    elif start + seqlen <= max_seq_len:
        rotation = table[start : start + seqlen, None]  # (seqlen, 1, head_dim / 2)
    else:
        raise ValueError(f"{start + seqlen} tokens do not fit the context of {max_seq_len}")
    return rotate(query, rotation), rotate(key, rotation)
