"""Tokens per second of Transformers' `generate`, for `benchmarks.decode --transformers`.

    .venv/bin/python -m benchmarks.transformers_peer FOLDER BATCH_SIZE MAX_NEW_TOKENS

FOLDER is a model in Hugging Face's layout. Texts start from BOS, at temperature 0, in float32.
"""

import sys
import time

import torch
import transformers


def main() -> None:
    folder, batch_size, n_new = sys.argv[1], *map(int, sys.argv[2:])
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = torch.ones(batch_size, 1, dtype=torch.long)
    settings = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        model.generate(prompts, max_new_tokens=8, **settings)
        start = time.perf_counter()
        model.generate(prompts, max_new_tokens=n_new, min_new_tokens=n_new, **settings)
        seconds = time.perf_counter() - start
    print(f"{batch_size * n_new / seconds:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
