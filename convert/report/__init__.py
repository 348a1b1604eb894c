"""A verdict as files: Markdown, JSON, a heat map, and a page that opens without a network."""
