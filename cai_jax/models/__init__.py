"""One decoder for every family, its weights from Hugging Face folders and GGUF files."""
