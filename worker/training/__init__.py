"""The parts of the training recipe in worker/train.py."""
