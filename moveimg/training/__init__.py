"""Training: one loop, a task for the generator and one for the tokenizer.

loop.py         steps, schedule, EMA, validation, previews, resume; task.py: what it asks of a task
distributed.py  processes, how a batch is cut and seeded, DDP and FSDP2
checkpoints.py  what is kept of a run, written whole or not at all; record.py: what run it is
optimizer.py    parameter groups, AdamW, Muon, the learning rate of a step
watch.py        TensorBoard, Weights & Biases, the progress bar, gates, MFU
generator.py    codes + labels -> cross-entropy; initial.py: what it starts from
scoring.py      FID and its company of a few samples, now and then
tokenizer.py    images -> reconstruction and codebook losses; adversary.py: the discriminator
compare.py      several configs, several seeds -> runs; comparison*.py -> a table and plots
"""
