"""tokenizer.json: a SentencePiece BPE model of ours (tokenizer.py) as the Hugging Face libraries read it, id for id.

    text    U+E581 -> U+E581 "e", U+2581 -> U+E581 "s", " " -> U+2581        the escapes of tokenizer.py
    pieces  characters, or the bytes of those without a piece, merged in the order of SentencePiece's scores
    ids     the other way round, bytes joined before the escapes are undone

SentencePiece merges the two neighbours whose union has the best score; the list of merges has all pairs that make a piece,
sorted by it. "<s>" or "<0x0A>" in a text are text: they are made by no merge. Left out: models that alter text, which
`check_lossless` refuses.
"""

import json

from data.tokenizer import ESC, SPACE, Tokenizer


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The file's text; BOS goes before every text that is encoded with special tokens. Raises ValueError for a model that is
    no BPE of ours."""
    tokenizer.check_lossless()
    model = tokenizer.model
    pieces = [model.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    plain = [
        not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i) or model.is_unused(i)) for i in range(len(pieces))
    ]
    known = {piece for piece, is_plain in zip(pieces, plain, strict=True) if is_plain}
    order = sorted((i for i in range(len(pieces)) if plain[i] and len(pieces[i]) > 1), key=lambda i: -model.get_score(i))
    merges = [
        [pieces[i][:cut], pieces[i][cut:]]
        for i in order
        for cut in range(1, len(pieces[i]))
        if pieces[i][:cut] in known and pieces[i][cut:] in known
    ]
    bos = pieces[tokenizer.bos]

    def replace(old: str, new: str) -> dict:
        return {"type": "Replace", "pattern": {"String": old}, "content": new}

    def template(*kinds: str) -> list[dict]:
        return [{"SpecialToken": {"id": bos, "type_id": 0}}] + [{"Sequence": {"id": kind, "type_id": 0}} for kind in kinds]

    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [replace(ESC, ESC + "e"), replace(SPACE, ESC + "s"), replace(" ", SPACE)],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template("A"),
            "pair": template("A", "B"),
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                replace(SPACE, " "),
                replace(ESC + "s", SPACE),
                replace(ESC + "e", ESC),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[model.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }
    return json.dumps(document, ensure_ascii=False, indent=1)


def tokenizer_config(tokenizer: Tokenizer, length: int) -> str:
    """tokenizer_config.json. Special tokens that a text spells out stay text."""
    model = tokenizer.model
    names = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    return json.dumps(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: model.id_to_piece(i) for name, i in names.items() if i >= 0},
            "model_max_length": length,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        },
        indent=1,
    )
