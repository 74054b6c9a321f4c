"""Training: one loop, a task for the generator and one for the tokenizer.

loop.py         steps, schedule, EMA, validation, previews, resume; task.py: its interface to a task
parallel.py     micro-batches and their seeds, DDP, FSDP2
checkpoints.py  writing, verifying and pruning checkpoints; settings.py: refusing another run's
optimizer.py    parameter groups, AdamW, Muon, the learning rate of a step
logging.py      TensorBoard, Weights & Biases, progress bar, gates, MFU
generator.py    codes + labels -> cross-entropy; initial.py: the model at step 0
scoring.py      FID and other scores of a few samples during training
tokenizer.py    images -> reconstruction and codebook losses; adversary.py: the discriminator
"""
