"""Operation of the studio: the doctor and the embedded services."""
