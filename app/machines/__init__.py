"""The machines' hardware, and the workers that are alive."""
