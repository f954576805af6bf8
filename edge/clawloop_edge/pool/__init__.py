"""The encrypted memory of one edge: what was said, token for token, and how it was judged. Knows no network."""
