"""Training through TRL's SFTTrainer: the trainer, its arguments, callbacks, checkpoints, memory and image features."""
