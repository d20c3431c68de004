"""What a job learns: one file per objective."""
