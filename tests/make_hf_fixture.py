"""Store tiny random models of Transformers, each with the logits that it computes.

    python tests/make_hf_fixture.py

writes `tests/fixtures/transformers/`. It needs the packages of `benchmarks/requirements.txt`; the
tests that read the folder do not.
"""

import json
import shutil
from pathlib import Path

import torch
import transformers

FOLDER = Path(__file__).parent / "fixtures" / "transformers"
TOKENS = [[1, 5, 9, 30, 2, 17]]


def main() -> None:
    for tied in (True, False):
        for n_kv_heads in (4, 2, 1):
            torch.manual_seed(n_kv_heads)
            config = transformers.LlamaConfig(
                vocab_size=48,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=n_kv_heads,
                max_position_embeddings=64,
                rms_norm_eps=1e-5,
                tie_word_embeddings=tied,
                initializer_range=0.3,
            )
            model = transformers.LlamaForCausalLM(config).eval()
            folder = FOLDER / f"{'tied' if tied else 'untied'}-{n_kv_heads}"
            shutil.rmtree(folder, ignore_errors=True)
            model.save_pretrained(folder)
            with torch.inference_mode():
                logits = model(torch.tensor(TOKENS)).logits[0]
            (folder / "logits.json").write_text(json.dumps(logits.tolist()) + "\n")


if __name__ == "__main__":
    main()
