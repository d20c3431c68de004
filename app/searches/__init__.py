"""Searches: learning rate, rank, epochs and method chosen by successive halving, and the winner repeated before it is called one."""
