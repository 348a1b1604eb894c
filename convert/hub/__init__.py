"""The Hugging Face Hub. Sources read with `client`, `ranges` and `downloads`; `target` and `publish` put an output
folder there, and are what runs use."""
