"""The tables of the paper: the runs that they need, and how they are drawn. Not needed to use the project."""
