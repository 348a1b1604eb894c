"""A plan carried out: source bytes read, output bytes made, hashed and written."""
