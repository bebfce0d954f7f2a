"""The parts of the training loop that pretrain/train.py calls."""
