"""Every bad input, fault and hostile file: the table of cases, its makers, and what runs them."""
