"""One file a section; the order here is the order in help and reference."""
