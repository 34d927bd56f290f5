"""From a named source of text to batches of tokens, in four steps that can each be read alone.

    sources.py     a source name -> documents (str), streamed, whatever they are stored as
    tokenizer.py   documents -> a SentencePiece BPE model; str <-> token ids, lossless
    shards.py      the files: a shard with its header, the manifest, atomic writing
    pipeline.py    prepare(config): documents -> shards in a cache folder, resumable  (CLI: python -m data.prepare)
    loader.py      Corpus(folder): batch = f(seed, global micro-batch index), no state, no global generator

This package imports nothing else of ours. Left out: shuffling or filtering documents, mixing sources, packing documents
so that none crosses a window, and tokenizing while training.
"""

from .loader import Corpus
from .pipeline import DataConfig, prepare
from .shards import place_for
from .tokenizer import Tokenizer

__all__ = ["Corpus", "DataConfig", "Tokenizer", "place_for", "prepare"]
