"""The two papers, redone: what is done with the method."""
