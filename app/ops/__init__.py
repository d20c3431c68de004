"""What runs the studio: the doctor and the embedded services."""
