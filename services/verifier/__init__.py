"""The verifier: it holds the LLM, is the clock, and alone decides what is output."""
