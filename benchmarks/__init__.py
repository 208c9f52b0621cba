"""Named cases, one command each, and the results recorded with them."""
