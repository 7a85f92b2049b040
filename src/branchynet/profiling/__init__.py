"""Recording every exit and measuring costs, with one fair clock."""
