"""The Hugging Face Hub: one client, range reads, downloads, and publishing."""
