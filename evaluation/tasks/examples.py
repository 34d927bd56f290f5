"""Documents of the tasks in tasks/, which need no network: text that the checkpoint was not trained on, and made-up questions.

    heldout_bpb           the first 4,096 characters of each validation document of the checkpoint's own corpus
    copy_words            w1 w2 w3 w4 w5; w1 w2 w3 w4 -> w5
    recall_pairs          a 1, b 2, c 3, d 4; c -> 3
    small_sums            2 + 3 = 5; 4 + 1 = 5; 3 + 4 = -> 7

Each question has four choices, of which the three wrong ones are words that stand in it or numbers close by, so that knowing
what is likely at all does not help: chance is 1/4. What a tiny model can learn is the first two, by induction (Olsson et al.
2022, arXiv:2209.11895); sums are there to stay at chance. A task is a function of its kind and seed alone.
"""

import random

WORDS = "time people year work state world day country law peace war hand part power way right nation public great men".split()


def heldout(corpus: list[str] | None = None, characters: int = 4096, **_) -> dict:
    """{"test": Dataset of {"text"}} of the corpora in these folders. Raises ValueError without one."""
    from datasets import Dataset

    from data import Corpus

    if corpus is None:
        raise ValueError("heldout_bpb takes its text from the checkpoint's corpus, and none was named")
    found = map(Corpus, corpus)
    texts = [each.tokenizer.decode(ids)[:characters] for each in found for ids in each.documents("val")]
    return {"test": Dataset.from_list([{"text": text} for text in texts if text])}


def copy_words(rng: random.Random) -> tuple[str, list[str], str]:
    words = rng.sample(WORDS, 5)
    return f"{' '.join(words)}; {' '.join(words[:-1])}", words[:3], words[4]


def recall_pairs(rng: random.Random) -> tuple[str, list[str], str]:
    keys, values = rng.sample(WORDS, 4), rng.sample(range(1, 10), 4)
    asked = rng.randrange(4)
    pairs = ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    wrong = [str(value) for n, value in enumerate(values) if n != asked]
    return f"{pairs}; {keys[asked]}", wrong, str(values[asked])


def small_sums(rng: random.Random) -> tuple[str, list[str], str]:
    sums = [(rng.randint(1, 4), rng.randint(1, 4)) for _ in range(3)]
    shown = "; ".join(f"{a} + {b} = {a + b}" for a, b in sums[:-1])
    a, b = sums[-1]
    wrong = rng.sample([n for n in range(1, 10) if n != a + b], 3)
    return f"{shown}; {a} + {b} =", [str(n) for n in wrong], str(a + b)


KINDS = {make.__name__: make for make in (copy_words, recall_pairs, small_sums)}


def questions(kind: str, count: int = 200, seed: int = 0) -> list[dict]:
    """`count` documents {"context", "choices", "answer"} of a kind, the right choice at a place of its own in each."""
    rng = random.Random(f"{kind} {seed}")
    found = []
    for _ in range(count):
        context, wrong, right = KINDS[kind](rng)
        choices = [*wrong, right]
        rng.shuffle(choices)
        found.append({"context": context, "choices": choices, "answer": choices.index(right)})
    return found


def made_up(kind: str, **_) -> dict:
    """{"test": Dataset} of `questions`."""
    from datasets import Dataset

    return {"test": Dataset.from_list(questions(kind))}
