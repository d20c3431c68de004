"""What a job costs and whether it can run, known before it starts. Pure."""
