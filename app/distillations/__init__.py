"""Distillation by a dataset: a teacher answers prompts, a grader picks the best answers, and these become a dataset."""
