"""Record the outputs of every exit, and measure costs and speed with one clock."""
