"""Fine-tuning jobs: created, leased, followed, ended."""
