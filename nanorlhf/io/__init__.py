"""What comes in and goes out: data, tokenizers, model folders, files."""
