"""Curation: from dataset files to tokenized, masked, split rows, with an account of every row that went elsewhere."""
