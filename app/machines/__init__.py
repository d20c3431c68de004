"""What the machines are and which workers live on them."""
