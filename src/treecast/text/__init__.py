"""Between text and tokens: tokenizer files, and output tokens to text. No torch here."""
