"""The tokenizer of a Hugging Face folder: a SentencePiece BPE model as `tokenizer.json`.

Transformers reads `tokenizer.model` only with more packages, and then puts a space after every line
break that is a piece of its own. From `tokenizer.json` it gives the ids that SentencePiece gives.
"""

from typing import Any

from tokenizer import SPACE, Tokenizer


def files(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """The files that Transformers reads, with their content.

    Raises:
        InputError: ids would differ; see `Tokenizer.check_exportable`.
    """
    tokenizer.check_exportable()
    piece = tokenizer.sp_model.id_to_piece
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": piece(tokenizer.bos_id),
        "eos_token": piece(tokenizer.eos_id),
        "unk_token": piece(tokenizer.sp_model.unk_id()),
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,  # for LlamaTokenizer of Transformers 4, which then asks SentencePiece
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {"tokenizer.json": tokenizer_json(tokenizer), "tokenizer_config.json": config}


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    sp = tokenizer.sp_model
    special = [(i, sp.id_to_piece(i)) for i in (sp.unk_id(), tokenizer.bos_id, tokenizer.eos_id)]
    bos = sp.id_to_piece(tokenizer.bos_id)
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": piece, "special": True, **flags} for i, piece in sorted(special)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, a],
            "pair": [begin, a, begin, b],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": bpe_model(tokenizer),
    }


def bpe_model(tokenizer: Tokenizer) -> dict[str, Any]:
    """The pieces, and all pairs of them that make a piece, the earliest merge first."""
    sp = tokenizer.sp_model
    pieces = [sp.id_to_piece(i) for i in range(tokenizer.n_words)]
    texts = tokenizer.text_scores()
    merges = []
    for piece in sorted(texts, key=lambda piece: -texts[piece]):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [[left, right] for left, right in splits if left in texts and right in texts]
    return {
        "type": "BPE",
        "unk_token": pieces[sp.unk_id()],
        "fuse_unk": True,
        "byte_fallback": sp.piece_to_id("<0x00>") != sp.unk_id(),
        "vocab": {piece: i for i, piece in enumerate(pieces)},
        "merges": merges,
    }
