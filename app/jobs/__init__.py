"""Fine-tuning jobs: asked for, leased, followed, ended."""
