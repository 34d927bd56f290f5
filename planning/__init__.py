"""What a run will take before it runs: gpus.py has what data sheets say, probe.py what a model keeps and computes; memory.py
and roofline.py what follows for memory and time; published.py what others measured, failures.py what interruptions cost.
plan.py prints it."""
