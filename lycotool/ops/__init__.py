"""One module per command: paths in, a small frozen result out. Nothing is printed here."""
