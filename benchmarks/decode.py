"""Decoding speed on the 42M shape, against Transformers and against the machine's memory.

    .venv/bin/python -m pip install -r benchmarks/requirements.txt
    .venv/bin/python -m benchmarks.make_checkpoint random42M.pt
    .venv/bin/python -m benchmarks.decode --pretrained-model-path random42M.pt

256 tokens from a prompt of 5, temperature 0, causal, all in turns in one process; medians. Beside
each rate stand

- its fraction of the memory limit: the bytes of the weights times the steps in a second, over the
  best rate at which as many threads sum a tensor of 1 GiB;
- its ratio to Transformers' `generate` in float32 with the same weights, threads and batch size.

With `--llama2c DIR`, a folder with llama2.c's `run.c` and `runq.c`, these take the place of
Transformers, and the compiled step takes part:

    .venv/bin/python -m benchmarks.decode --pretrained-model-path random42M.pt --llama2c llama2.c \
        --tokenizer-path tokenizer.model --rounds 5

Then the time to the first token of a prompt of 1000 tokens, and where the time of a step goes at
batch size 1: in the products with the weights, in attention, and in all the rest, which is Python
and small operations.
"""

import os
import platform
import time
from argparse import RawDescriptionHelpFormatter
from collections import defaultdict
from statistics import median

import torch

from llama import Llama, load_pretrained
from minllama.common.program import ArgumentParser, run_script
from minllama.inference.decoding import decode
from minllama.inference.sampling import Sampling
from minllama.kernels.batch1 import OneRowLlama
from minllama.kernels.cpu import accelerate
from minllama.kernels.quantize import BYTES, DTYPES

PROMPT = [1, 306, 505, 5131, 304]


def as_transformers(llama: Llama) -> torch.nn.Module:
    """The same model in Transformers, whose rotary embedding pairs the halves of a head."""
    import transformers

    config = llama.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=llama.layers[0].feed_forward.w1.out_features,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.layer_norm_eps,
            tie_word_embeddings=True,
        )
    )

    def halves(weight: torch.Tensor) -> torch.Tensor:
        head_dim = config.dim // config.n_heads
        pairs = weight.view(-1, head_dim // 2, 2, config.dim)
        return pairs.transpose(1, 2).reshape(weight.shape)

    state = {"model.embed_tokens.weight": llama.tok_embeddings.weight}
    state |= {"lm_head.weight": llama.output.weight, "model.norm.weight": llama.norm.weight}
    for i, layer in enumerate(llama.layers):
        name, attention, feed_forward = f"model.layers.{i}", layer.attention, layer.feed_forward
        state |= {
            f"{name}.self_attn.q_proj.weight": halves(attention.compute_query.weight),
            f"{name}.self_attn.k_proj.weight": halves(attention.compute_key.weight),
            f"{name}.self_attn.v_proj.weight": attention.compute_value.weight,
            f"{name}.self_attn.o_proj.weight": attention.compute_output.weight,
            f"{name}.mlp.gate_proj.weight": feed_forward.w1.weight,
            f"{name}.mlp.down_proj.weight": feed_forward.w2.weight,
            f"{name}.mlp.up_proj.weight": feed_forward.w3.weight,
            f"{name}.input_layernorm.weight": layer.attention_norm.weight,
            f"{name}.post_attention_layernorm.weight": layer.ffn_norm.weight,
        }
    theirs.load_state_dict(state)
    return theirs.eval()


def load_packed(path: str, dtype: str) -> OneRowLlama:
    """The model as `run_llama.py` decodes with it."""
    llama = load_pretrained(path, causal=True, init_weights=False).eval()
    accelerate(llama)
    return OneRowLlama(llama, dtype)


def run_ours(llama: Llama, batch_size: int, n_new: int) -> list[list[int]]:
    steps = list(decode(llama, [PROMPT] * batch_size, n_new, Sampling(0.0), ()))
    return [list(row) for row in zip(*steps, strict=True)]


@torch.inference_mode()
def run_theirs(model: torch.nn.Module, batch_size: int, n_new: int) -> list[list[int]]:
    prompts = torch.tensor([PROMPT] * batch_size)
    ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=n_new,
        min_new_tokens=n_new,
        do_sample=False,
        pad_token_id=0,
    )
    return ids[:, len(PROMPT) :].tolist()


def seconds(run, *args) -> float:
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


OPERATIONS = {  # the profiler's names
    "weights": (
        *("aten::embedding_bag", "quantized::embedding_bag_byte_rowwise_offsets"),
        *("mkldnn::_linear_pointwise", "aten::_weight_int8pack_mm"),
    ),
    "attention": ("aten::scaled_dot_product_attention",),
}


def profile_step(llama: Llama, n_new: int, step: float) -> str:
    """Microseconds of a decoding step by kind of operation.

    The profiler slows everything down, so its times are scaled to those of a step without it;
    small operations are slowed down most, so the rest comes out a little too large.

    Args:
        step: seconds of a step without the profiler.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        slow = seconds(run_ours, llama, 1, n_new)
    total = {event.key: event.cpu_time_total for event in profiler.key_averages()}
    scale = step / slow
    parts = {
        kind: scale * sum(total.get(key, 0) for key in keys) for kind, keys in OPERATIONS.items()
    }
    parts["rest"] = step * 1e6 - sum(parts.values())
    return ", ".join(f"{kind} {microseconds:.0f}" for kind, microseconds in parts.items())


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained-model-path", required=True)
    parser.add_argument("--llama2c", metavar="DIR", help="race its run.c and runq.c instead")
    parser.add_argument("--tokenizer-path", help="for --llama2c")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16])
    args = parser.parse_args()
    if args.llama2c is not None:
        torch.set_num_threads(args.threads[-1])
        os.environ["NUMBA_NUM_THREADS"] = str(args.threads[-1])  # read when it is imported
        from benchmarks.llama2c import race

        path = args.pretrained_model_path
        race(args.llama2c, path, args.tokenizer_path, args.max_new_tokens, args.rounds)
        return
    import transformers

    args.batch_sizes = sorted({1, *args.batch_sizes})
    transformers.logging.set_verbosity_error()
    print(
        f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    plain = load_pretrained(args.pretrained_model_path, causal=True, init_weights=False).eval()
    theirs = as_transformers(plain)
    shared = {id(p): p.numel() for p in plain.parameters() if p.dim() == 2}
    n_weights = sum(shared.values())
    assert run_ours(plain, 1, 20) == run_theirs(theirs, 1, 20), "not the same model"

    gibibyte = torch.ones(2**28)
    print(f"{'threads':>7} {'batch':>5}  {'weights':13}{'tokens/s':>9}{'memory':>8}{'ratio':>7}")
    for n_threads in args.threads:
        torch.set_num_threads(n_threads)
        packed = {dtype: load_packed(args.pretrained_model_path, dtype) for dtype in DTYPES}
        runs = {
            (b, dtype): (run_ours, packed[dtype], b) for b in args.batch_sizes for dtype in DTYPES
        }
        runs |= {(b, "Transformers"): (run_theirs, theirs, b) for b in args.batch_sizes}
        times, bandwidth = defaultdict(list), 0.0
        for run in runs.values():  # warm-up
            seconds(*run, 8)
        for _ in range(args.rounds):
            for key, run in runs.items():
                times[key].append(seconds(*run, args.max_new_tokens))
                bandwidth = max(bandwidth, 2**30 / seconds(gibibyte.sum))
        for (batch_size, name), values in times.items():
            steps = args.max_new_tokens / median(values)
            memory = n_weights * BYTES.get(name, 4) * steps / bandwidth
            ratio = median(times[batch_size, "Transformers"]) / median(values)
            print(
                f"{n_threads:7} {batch_size:5}  {name:13}{steps * batch_size:9.1f}"
                f"{memory:8.2f}{ratio:7.2f}"
            )
        print(f"memory is read at {bandwidth / 1e9:.1f} GB/s")
        long_prompt = [PROMPT[:1] + [500] * 999]
        first = median(
            seconds(next, decode(packed["float32"], long_prompt, 1, Sampling(0.0)))
            for _ in range(3)
        )
        step = median(times[1, "float32"]) / args.max_new_tokens
        print(f"first token after 1000: {first:.2f} s, as long as {first / step:.0f} steps")
        for dtype in DTYPES:
            step = median(times[1, dtype]) / args.max_new_tokens
            print(
                f"{dtype}, µs of a step: {profile_step(packed[dtype], args.max_new_tokens, step)}"
            )


if __name__ == "__main__":
    run_script(main)
