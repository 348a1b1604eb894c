"""Headers in, every output byte's place and origin out. Pure; nothing is read or written here."""
