"""What evaluate.py is made of.

    rows.py        rows of a table: losses, paired differences                              evaluate.py RUN [RUN ...]
    exported.py    exported folders, as transformers loads them                              ... --exported DIR
    specs.py       names of specs                                                           ... --weights W --activations X
    posttrain.py   what a weight becomes after training, by papers' core algorithms
    sweep.py       a table of these: bits a parameter against loss; draw.py, pictures       ... --sweep
    questions.py   what is answered instead of the table, and samples                       ... --sample PROMPT
    harness.py     tasks of lm-eval: a checkpoint as trained, and exported folders          ... --tasks a,b
    tasks/         tasks that ship here, and examples.py, which makes their documents
    core.py        DCLM CORE, from a bundle the user has                                    ... --core-bundle DIR
    reproduce.py   batch sizes, threads, precisions: when do logits and greedy text part?   ... --reproduce

None of it trains anything, and nothing that trains imports it. Tasks lie here and not in data/, which is about text to train on
and imports nothing of ours.
"""
