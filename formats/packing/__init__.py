"""How codes lie in words: the plain definition, and two sets of compiled loops that share nothing."""
