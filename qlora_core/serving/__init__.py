"""A base and its adapters behind an OpenAI-compatible endpoint, for local use; and a chat in the terminal."""
