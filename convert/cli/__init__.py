"""The command line: arguments in, one answer out. Nothing below this folder prints."""
