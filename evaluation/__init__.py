"""What evaluate.py can ask of a checkpoint besides its loss, one file a question:

    harness.py     tasks of lm-eval: a checkpoint as trained, and exported folders          evaluate.py RUN --tasks a,b
    tasks/         tasks that ship here, and examples.py, which makes their documents
    core.py        DCLM CORE, from a bundle the user has                                    evaluate.py RUN --core-bundle DIR
    reproduce.py   batch sizes, threads, precisions: when do logits and greedy text part?   evaluate.py RUN --reproduce

Tasks lie here and not in data/, which is about text to train on and imports nothing of ours.
"""
