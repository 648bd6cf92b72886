"""The formulas once more, in float64 numpy and as plainly as can be, to compare the code with."""

import numpy as np


def llama_forward(weights: dict, tokens: np.ndarray, args: dict) -> tuple[np.ndarray, np.ndarray]:
    """Llama 2's forward pass, one row, one head and one position at a time.

    Args:
        weights: the state dict as numpy arrays.
        tokens: ids `(batch, seqlen)`.
        args: the checkpoint's `model_args`; `causal` defaults to False.

    Returns:
        logits of all positions `(batch, seqlen, vocab_size)`, hidden states after the final norm
        `(batch, seqlen, dim)`.
    """
    weights = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    n_heads, n_kv_heads = args["n_heads"], args["n_kv_heads"]
    head_dim = args["dim"] // n_heads
    eps = args.get("layer_norm_eps", 1e-5)
    theta = args.get("rope_theta", 10000.0)

    def norm(x, name):
        return np.stack([row / np.sqrt((row @ row) / len(row) + eps) for row in x]) * weights[name]

    def rotated(vector, position):
        out = np.empty_like(vector)
        for j in range(0, head_dim, 2):
            angle = position / theta ** (j / head_dim)
            out[j] = vector[j] * np.cos(angle) - vector[j + 1] * np.sin(angle)
            out[j + 1] = vector[j] * np.sin(angle) + vector[j + 1] * np.cos(angle)
        return out

    def attention(x, prefix):
        query = x @ weights[f"{prefix}.compute_query.weight"].T
        key = x @ weights[f"{prefix}.compute_key.weight"].T
        value = x @ weights[f"{prefix}.compute_value.weight"].T
        seqlen = len(x)
        heads = []
        for head in range(n_heads):
            group = head // (n_heads // n_kv_heads)
            mine = slice(head * head_dim, (head + 1) * head_dim)
            shared = slice(group * head_dim, (group + 1) * head_dim)
            q = [rotated(query[i, mine], i) for i in range(seqlen)]
            k = [rotated(key[i, shared], i) for i in range(seqlen)]
            rows = []
            for i in range(seqlen):
                visible = range(i + 1) if args.get("causal") else range(seqlen)
                scores = np.array([q[i] @ k[j] for j in visible]) / np.sqrt(head_dim)
                probabilities = np.exp(scores - scores.max())
                probabilities /= probabilities.sum()
                rows.append(
                    sum(p * value[j, shared] for p, j in zip(probabilities, visible, strict=True))
                )
            heads.append(np.stack(rows))
        return np.concatenate(heads, axis=1) @ weights[f"{prefix}.compute_output.weight"].T

    def feed_forward(x, prefix):
        gate = x @ weights[f"{prefix}.w1.weight"].T
        gate = gate / (1 + np.exp(-gate))
        return (gate * (x @ weights[f"{prefix}.w3.weight"].T)) @ weights[f"{prefix}.w2.weight"].T

    def hidden_states(row):
        x = weights["tok_embeddings.weight"][row]
        for i in range(args["n_layers"]):
            layer = f"layers.{i}"
            x = x + attention(norm(x, f"{layer}.attention_norm.weight"), f"{layer}.attention")
            x = x + feed_forward(norm(x, f"{layer}.ffn_norm.weight"), f"{layer}.feed_forward")
        return norm(x, "norm.weight")

    hidden = np.stack([hidden_states(row) for row in tokens])
    return hidden @ weights["output.weight"].T, hidden


def rotary_embedding(x: np.ndarray, theta: float = 10000.0) -> np.ndarray:
    """Rotate the interleaved pairs of `(batch, seqlen, n_heads, head_dim)`."""
    x = np.asarray(x, dtype=np.float64)
    head_dim = x.shape[-1]
    out = np.empty_like(x)
    for position in range(x.shape[1]):
        for j in range(0, head_dim, 2):
            angle = position / theta ** (j / head_dim)
            rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            out[:, position, :, j : j + 2] = x[:, position, :, j : j + 2] @ rotation.T
    return out


def adamw(p, gradient, n_steps, lr, betas, eps, weight_decay, correct_bias) -> np.ndarray:
    """AdamW with the efficient bias correction, decay after the update.

    Args:
        p: where to start.
        gradient: function of step (from 1) and parameter.
    """
    p = np.asarray(p, dtype=np.float64)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t in range(1, n_steps + 1):
        g = gradient(t, p)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        alpha = lr
        if correct_bias:
            alpha = lr * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        p = p - alpha * m / (np.sqrt(v) + eps)
        p = p - lr * weight_decay * p
    return p
