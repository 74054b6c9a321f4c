"""Training: one loop, a task for the generator and one for the tokenizer.

loop.py        steps, schedule, EMA, validation, previews, checkpoints, resume
optimizer.py   parameter groups, AdamW, the learning rate of a step
generator.py   codes + labels -> cross-entropy
tokenizer.py   images -> reconstruction and codebook losses
compare.py     several configs, several seeds -> runs; comparison*.py -> a table and plots
"""
