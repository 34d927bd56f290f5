"""From a named source of text to batches of tokens, in four steps that can each be read alone.

    sources.py     a source name -> documents (str), streamed, whatever they are stored as
    tokenizer.py   documents -> a SentencePiece BPE model; str <-> token ids, lossless
    shards.py      the files: a shard with its header, the manifest, atomic writing
    mixture.py     several sources: which one each sequence of the run is from, in shares that change by phase
    pipeline.py    prepare(config): documents -> shards in a cache folder, resumable  (CLI: python -m data.prepare)
    loader.py      Corpus(folder): batch = f(seed, global micro-batch index), no state, no global generator

This package imports nothing else of ours. Left out: shuffling or filtering documents, packing documents so that none
crosses a window, and tokenizing while training.
"""

from .loader import Corpus, usage_lines
from .mixture import near
from .pipeline import DataConfig, prepare
from .shards import place_for
from .tokenizer import Tokenizer

__all__ = ["Corpus", "DataConfig", "Tokenizer", "near", "place_for", "prepare", "usage_lines"]
